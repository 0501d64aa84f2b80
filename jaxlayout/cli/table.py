"""`jaxlayout table ...`: the cost table, looked at (see `show`) and moved about."""

from __future__ import annotations

import argparse
import time
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxlayout.cli.base import Failure, UsageError, command, print_json, print_text
from jaxlayout.cli.settings import add_options
from jaxlayout.cli.show import SHOW, counted, in_words, looked, print_refused, show_table, table_path
from jaxlayout.table.contents import holdings, place_of, places
from jaxlayout.table.table import CostTable, TableWarning

DAY = 86_400.0

EXPORT = """\
example:

  $ jaxlayout table export measured.json
  812 measurements and 9 plans are in measured.json
"""
IMPORT = """\
example, what another machine of the same kind measured:

  $ jaxlayout table import measured.json
  829 records taken

Records replace those of the same convolution, environment and candidate; what an environment is, is a record too. What
fails its checksum or makes no sense is refused, and listed.

exit codes: 0, 1 if any record was refused."""
MERGE = """\
example:

  $ jaxlayout table merge /mnt/other/table.sqlite
  829 records taken

Like `jaxlayout table import`, from a table's own file, which is only read and may be damaged or in use.

exit codes: 0, 1 if any record was refused."""
PRUNE = """\
example:

  $ jaxlayout table prune --dry-run
  would remove 640 measurements of 41 signatures, 7 plans: jax 0.11.1, jaxlib 0.11.1, ...
  $ jaxlayout table prune
  removed 640 measurements of 41 signatures, 7 plans: ...

An environment here is versions, device, processor and its cores; what was measured on the present one stays, whatever
the XLA_FLAGS and settings of JAX and of malloc. Where a table does not say what an environment was (it is from before
it did), its records stay, but for --unknown.

With --plans it forgets what was decided of whole functions, and no measurement: also that a process ended while one was
run for the first time, after which that is not tried again.
"""
PATH = """\
example:

  $ jaxlayout table path
  ~/.cache/jaxlayout/table.sqlite
"""


def add_to(commands: Any) -> None:
    """Declare them."""
    parser = commands.add_parser("table", help="look at the cost table, export, import, merge, prune it")
    actions = parser.add_subparsers(metavar="ACTION", required=True)

    def action(name: str, run: Any, summary: str, more: str, prints_data: bool = True) -> argparse.ArgumentParser:
        made = command(actions, name, run, summary, more, prints_data=prints_data)
        add_options(made, only=("table",))
        return made

    show = action("show", show_table, "Count what the table holds, by environment.", SHOW)
    show.add_argument("--signature", metavar="TEXT", help="list the candidates of signatures with this in them, timed")
    export = action("export", _export, "Write every record to a file of JSON values, one a line.", EXPORT)
    export.add_argument("file", metavar="FILE")
    importing = action("import", _import, "Add the records of an exported file.", IMPORT)
    importing.add_argument("file", metavar="FILE")
    merge = action("merge", _merge, "Add the records of another table's file.", MERGE)
    merge.add_argument("file", metavar="OTHER.sqlite")
    prune = action("prune", _prune, "Remove what was measured in other environments than the present one.", PRUNE)
    text = "instead: remove environments that nothing was written to for so long, the present one too"
    prune.add_argument("--older-than", type=float, metavar="DAYS", help=text)
    text = "instead: remove all plans and verdicts, and keep what was measured: functions are planned and judged anew"
    prune.add_argument("--plans", action="store_true", help=text)
    prune.add_argument("--unknown", action="store_true", help="remove those too of which the table does not say what")
    prune.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    action("path", _path, "Print the path of the table's file, whether it is there or not.", PATH, prints_data=False)


@contextmanager
def _opened(given: argparse.Namespace, must_be: bool = True) -> Any:
    """The table; what it would only warn of is a failure here."""
    path = table_path(given)
    if must_be and not Path(path).is_file():
        raise Failure(f"no cost table at {path} yet")
    with warnings.catch_warnings():
        warnings.simplefilter("error", TableWarning)
        try:
            with CostTable(path) as table:
                yield table
        except (TableWarning, OSError) as problem:
            raise Failure(str(problem)) from None


def _path(given: argparse.Namespace) -> int:
    print(table_path(given))
    return 0


def _export(given: argparse.Namespace) -> int:
    with _opened(given) as table:
        table.export_json(given.file)
        counts = table.counts()
    if given.json:
        print_json({"file": given.file, "measurements": counts["measurements"], "plans": counts["plans"]})
    else:
        print_text(f"{counts['measurements']} measurements and {counts['plans']} plans are in {given.file}")
    return 0


def _import(given: argparse.Namespace) -> int:
    return _taken(given, CostTable.import_json)


def _merge(given: argparse.Namespace) -> int:
    return _taken(given, CostTable.merge)


def _taken(given: argparse.Namespace, take: Any) -> int:
    if not Path(given.file).is_file():
        raise UsageError(f"no file {given.file}")
    with _opened(given, must_be=False) as table:
        accepted, refused = take(table, given.file)
    if given.json:
        print_json({"accepted": accepted, "refused": refused})
    else:
        print_text(f"{accepted} records taken")
        print_refused(refused)
    return int(bool(refused))


def _prune(given: argparse.Namespace) -> int:
    _, rows, _ = looked(given)
    found = holdings(rows)
    known = [holding for holding in found if holding.environment is not None]
    if given.plans:  # what is decided has environments of its own
        gone = [holding for holding in found if holding.plans and not holding.measurements]
    elif given.older_than is not None:
        oldest = time.time() - given.older_than * DAY
        gone = [holding for holding in known if holding.written is not None and holding.written < oldest]
    else:
        from jaxlayout.measure.environment import current_environment

        here = place_of(current_environment().to_json(), settings=False)
        gone = [h for h in known if h.environment is not None and place_of(h.environment, settings=False) != here]
    if given.unknown:
        gone += [holding for holding in found if holding.environment is None]
    if gone and not given.dry_run:
        with _opened(given) as table:
            table.forget({holding.env for holding in gone})
    if given.json:
        print_json({"removed": [holding.to_json() for holding in gone], "dry_run": given.dry_run})
        return 0
    for together in places(gone):
        what = "would remove" if given.dry_run else "removed"
        print_text(f"{what} {counted(together)}: {in_words(together[0])}")
    unknown = len(found) - len(known)
    if unknown and not given.unknown and not given.plans:
        print_text(f"kept {unknown} environments of which the table does not say what they are (see --unknown)")
    elif not gone:
        print_text("nothing to remove")
    return 0
