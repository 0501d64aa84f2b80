"""What all commands have in common: how they are declared, how they fail, how they print."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any


class UsageError(Exception):
    """The command was not given what it needs: exit code 2."""


class Failure(Exception):
    """The command could not do what it was asked: exit code 1."""


def command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    more: str,
    *,
    prints_data: bool = False,
    interrupted: str = "",
) -> argparse.ArgumentParser:
    """A new command. `more`: what its help ends with, a worked example. `interrupted`: what to say of Ctrl-C."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary[0].lower() + summary[1:].rstrip("."),
        description=summary,
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, parser=parser, interrupted=interrupted)
    if prints_data:
        parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    return parser


def print_json(value: Any) -> None:
    """To standard output."""
    print(json.dumps(value, indent=1))


def print_text(*things: Any) -> None:
    """To standard output, by rich: what it can render, and text as it is, in lines as long as they come."""
    from rich.console import Console
    from rich.protocol import is_renderable
    from rich.text import Text

    console = Console(highlight=False)
    for thing in things:
        shown = thing if is_renderable(thing) else str(thing)
        console.print(shown, markup=False, soft_wrap=isinstance(shown, str | Text))


def milliseconds(ns: float | None) -> str:
    """A time in words."""
    return "" if ns is None else f"{ns / 1e6:.3g} ms"
