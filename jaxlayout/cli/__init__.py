"""`jaxlayout`: the command line. JAX is imported where a command needs it.

- `tune`, `bench`, `table`, `doctor`: the commands. `base`: what they share; `target`: the function that one is about.
- `settings`: options as flags; `show`: tables printed; `checks`, `noise`: what `doctor` looks at.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import jaxlayout
from jaxlayout.cli import bench, doctor, table, tune
from jaxlayout.cli.base import Failure, UsageError

EXIT_CODES = """\
exit codes: 0 fine, 1 something failed or was found, 2 wrong usage, 130 interrupted.

jaxlayout COMMAND --help shows a worked example of each command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command (None: that of `sys.argv`); gives its exit code. Wrong usage and --help raise SystemExit, as
    argparse does; what the user's own function raises comes through."""
    parser = argparse.ArgumentParser(
        prog="jaxlayout",
        description="Convolutions in JAX in the layouts and forms that are fastest on this machine.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"jaxlayout {jaxlayout.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for family in (tune, bench, table, doctor):
        family.add_to(commands)
    given = parser.parse_args(argv)
    try:
        return given.run(given)
    except UsageError as error:
        of_command: argparse.ArgumentParser = given.parser
        of_command.error(str(error))
    except Failure as error:
        print(f"jaxlayout: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"jaxlayout: interrupted{given.interrupted}", file=sys.stderr)
        return 130
