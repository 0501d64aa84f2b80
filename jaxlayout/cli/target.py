"""The function that a command is about, `module:function`, and the arguments that it is called with."""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import os
import re
import sys
from pathlib import Path
from typing import Any

from jaxlayout.cli.base import UsageError

HOW = """\
MODULE:FUNCTION is a module that can be imported from here, or a file, and a function in it: plain, jitted, or under
auto_layout already. Arguments are written as JAX prints their types, and made up: f32[8,224,224,3], bf16[64], i32[],
key[]. Dictionaries, lists and tuples of them are written as in Python or JSON; numbers, true and false stand for
themselves; name=... is a keyword argument. Quote what the shell would take apart: '{"w": f32[3,3,3,64]}'.
"""

_SHORT = {"bf": "bfloat", "f": "float", "i": "int", "u": "uint", "c": "complex"}
_NAMES = {"true": True, "false": False, "null": None}


def add_target(parser: argparse.ArgumentParser) -> None:
    """The function and its arguments."""
    parser.add_argument("target", metavar="MODULE:FUNCTION", help="the function: package.module:name or file.py:name")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--args", nargs="+", default=[], metavar="TYPE", help="its arguments, by their types")
    either.add_argument(
        "--args-from",
        metavar="MODULE:FUNCTION",
        help="a function that returns its arguments: (args, kwargs), a tuple and a dictionary",
    )


def target_of(given: argparse.Namespace) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The function and its arguments: as `jax.ShapeDtypeStruct` where only types were given."""
    if given.args_from is None:
        args, kwargs = arguments(given.args)
        return loaded(given.target), args, kwargs
    fun, found = loaded(given.target), loaded(given.args_from)()
    match found:
        case (tuple() | list()) as args, dict() as kwargs:
            return fun, tuple(args), kwargs
    raise UsageError(f"--args-from {given.args_from}: expected (args, kwargs), a tuple and a dictionary, got {found!r}")


def loaded(text: str) -> Any:
    """The function that `module:function` names; UsageError where there is none."""
    place, _, path = text.rpartition(":")
    if not place or not path:
        raise UsageError(f"{text}: expected module:function or file.py:function")
    module = _file(Path(place)) if place.endswith(".py") else _module(place)
    try:
        fun = functools.reduce(getattr, path.split("."), module)
    except AttributeError as error:
        raise UsageError(f"{text}: {error}") from None
    if not callable(fun):
        raise UsageError(f"{text} is no function: {fun!r}")
    return fun


def _module(name: str) -> Any:
    """By import, the current folder included, as `python -m` has it."""
    _look_in(os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # it is there, but imports what is not
        raise UsageError(f"no module {error.name!r} here, nor installed") from None


def _file(path: Path) -> Any:
    """A file as the module of its name, with its folder to import from, as `python file.py` has it."""
    if not path.is_file():
        raise UsageError(f"no file {path}")
    _look_in(str(path.resolve().parent))
    module = importlib.import_module(path.stem)
    if Path(module.__file__ or "").resolve() != path.resolve():
        raise UsageError(f"{path} has the name of a module that is imported already, {module.__name__}: rename it")
    return module


def _look_in(folder: str) -> None:
    if folder not in sys.path:
        sys.path.insert(0, folder)


def arguments(texts: list[str]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments as they are written on the command line."""
    args, kwargs = [], {}
    for text in texts:
        if keyword := re.fullmatch(r"([A-Za-z_]\w*)=(.*)", text, re.DOTALL):
            kwargs[keyword[1]] = argument(keyword[2])
        else:
            args.append(argument(text))
    return tuple(args), kwargs


def argument(text: str) -> Any:
    """One argument. An array's type is a subscript in Python's grammar too, but for one of no axes."""
    try:
        return _value(ast.parse(re.sub(r"(?<=\w)\[\s*\]", "[()]", text.strip()), mode="eval").body)
    except (SyntaxError, ValueError) as error:
        why = str(error) if type(error) is ValueError else "not an argument"
        raise UsageError(f"--args {text}: {why}; expected the likes of f32[8,224,224,3]") from None


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Subscript(value=ast.Name(id=dtype), slice=sizes):
            return _array(dtype, _constant(sizes))
        case ast.Dict(keys=keys, values=values) if None not in keys:
            return {_constant(key): _value(value) for key, value in zip(keys, values, strict=True) if key}
        case ast.List(elts=parts):
            return [_value(part) for part in parts]
        case ast.Tuple(elts=parts):
            return tuple(_value(part) for part in parts)
        case ast.Name(id="true" | "false" | "null" as name):
            return _NAMES[name]
        case ast.Constant() | ast.UnaryOp(op=ast.USub()):
            return _constant(node)
    raise ValueError(f"what is {ast.unparse(node)!r}?")


def _constant(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):  # which would quote the syntax tree
        raise ValueError(f"what is {ast.unparse(node)!r}?") from None


def _array(name: str, sizes: Any) -> Any:
    import jax
    import jax.numpy as jnp

    shape = sizes if isinstance(sizes, tuple) else (sizes,)
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"{list(shape)} is no shape")
    if name == "key":
        return jax.ShapeDtypeStruct(shape, jax.eval_shape(jax.random.key, 0).dtype)
    short = re.fullmatch(r"(bf|f|i|u|c)(\d\w*)", name)
    try:
        dtype = jnp.dtype(_SHORT[short[1]] + short[2] if short else name)
    except TypeError:
        raise ValueError(f"{name} is no dtype") from None
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"{name} needs JAX_ENABLE_X64=1 in the environment")
    return jax.ShapeDtypeStruct(shape, dtype)
