"""Plain data that may come from anywhere, value by value: what it has to be, or ValueError with a short reason."""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def shown(value: object) -> str:
    """`repr`, cut short: the value may be hostile and of any size."""
    if isinstance(value, list | tuple | dict):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, int) and abs(value) >= 2**64:
        return "a huge integer"
    text = repr(value[:50] if isinstance(value, str) else value)
    return text if len(text) <= 60 else text[:56] + " ..."


def number(name: str, value: object, most: float = math.inf) -> float:
    """A finite float in [0, most]."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} is {shown(value)}, not a number")
    # Compared before it is converted: float() of a huge integer overflows.
    if not 0 <= value <= most or value == math.inf or (isinstance(value, int) and value > 2**64):
        raise ValueError(f"{name} is {shown(value)}, outside [0, {most:g}]")
    return float(value)


def integer(name: str, value: object, most: int) -> int:
    """An int in [0, most]."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} is {shown(value)}, not an integer")
    if not 0 <= value <= most:
        raise ValueError(f"{name} is {shown(value)}, outside [0, {most}]")
    return value


def text(name: str, value: object, most: int) -> str:
    """A string of at most `most` characters."""
    if not isinstance(value, str):
        raise ValueError(f"{name} is {shown(value)}, not a string")
    if len(value) > most:
        raise ValueError(f"{name} is {len(value)} characters long, more than {most}")
    return value


def flag(name: str, value: object) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {shown(value)}, not true or false")
    return value


def one_of(name: str, value: object, choices: tuple[Any, ...]) -> Any:
    """One of some strings."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} is {shown(value)}, not one of {', '.join(choices)}")
    return value


def check_format(what: str, value: object, newest: int, oldest: int = 1) -> None:
    """An object whose form can be read. What is stored says by a number, `format`, which form it has; what says nothing
    is from before there was one, and has the first. `what`: it has to be, as "a plan"."""
    if not isinstance(value, Mapping):
        raise ValueError(f"not {what}: {shown(value)}")
    found = integer("format", value.get("format", 1), 10**9)
    if not oldest <= found <= newest:
        whose, known = ("a newer", newest) if found > newest else ("an older", oldest)
        raise ValueError(f"{what} of format {found}, of {whose} version of jaxlayout: this one knows format {known}")


def optional(check: Callable[..., T], name: str, value: object, *limits: Any) -> T | None:
    """None, or what a check takes."""
    return None if value is None else check(name, value, *limits)
