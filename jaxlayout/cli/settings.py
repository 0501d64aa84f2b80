"""The fields of `Options` as flags, with the help that their docstrings give."""

from __future__ import annotations

import argparse
import ast
import functools
import inspect
import itertools
import textwrap
import typing
from collections.abc import Collection
from types import NoneType
from typing import Any, Literal

from jaxlayout.cli.base import UsageError
from jaxlayout.tuning.options import Options

PREFIX = "option_"


def add_options(parser: argparse.ArgumentParser, only: Collection[str] = (), leave_out: Collection[str] = ()) -> None:
    """A flag for each option that a word on the command line can give."""
    group = parser.add_argument_group("options of auto_layout, where not given those of JAXLAYOUT_<NAME>")
    documented = _documented()
    for name, hint in typing.get_type_hints(Options).items():
        kind = _kind(hint)
        if kind is None or name in leave_out or (only and name not in only):
            continue
        default = getattr(Options(), name)
        text = documented.get(name, "") + ("" if default is None else f" (default: {default})")
        group.add_argument(
            f"--{name.replace('_', '-')}", dest=PREFIX + name, default=None, help=text.replace("%", "%%"), **kind
        )


def options_of(given: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """The options that were given, and `more`. UsageError where one, or a variable of the environment, is wrong."""
    flags = {name.removeprefix(PREFIX): value for name, value in vars(given).items() if name.startswith(PREFIX)}
    options = {name: value for name, value in flags.items() if value is not None} | more
    try:
        Options.from_environment(**options)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return options


def _kind(hint: Any) -> dict[str, Any] | None:
    """How argparse reads a value of some type; None where no word stands for one."""
    if typing.get_origin(hint) is Literal:
        return {"choices": typing.get_args(hint)}
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    types = [part for part in typing.get_args(hint) or (hint,) if part is not NoneType]
    return {"type": types[0], "metavar": _METAVARS[types[0]]} if len(types) == 1 and types[0] in _METAVARS else None


_METAVARS: dict[Any, str] = {float: "NUMBER", int: "NUMBER", str: "TEXT"}


@functools.cache
def _documented() -> dict[str, str]:
    """What stands below each field of `Options` in its source, which Python itself does not keep."""
    try:
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(Options))).body
    except OSError:  # no source here
        return {}
    body = typing.cast(ast.ClassDef, definition).body
    return {
        field.target.id: inspect.cleandoc(text.value.value).replace("\n", " ")
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }
