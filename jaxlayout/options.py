"""`Options`: all that can be set, in one value; each also by an environment variable."""

from __future__ import annotations

import os
import typing
from dataclasses import dataclass, fields
from typing import Any, Literal, Self


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a function is tuned. The variable JAXLAYOUT_<NAME> sets a default, a keyword of `auto_layout` wins."""

    on_miss: Literal["measure", "heuristic", "error"] = "measure"
    """What to do where the table does not know a convolution: time it, believe the policy, or raise TableMiss."""
    time_budget: float = 300.0
    """Seconds that this process may spend on measuring, over all functions and shapes."""
    memory_limit: float = 1.25
    """Peak temporary memory that the rewritten function may need, relative to the original's."""
    numerics: Literal["strict", "relaxed"] = "strict"
    """strict: a candidate's error against float64 is at most max(2x XLA's own, 3 eps sqrt(K)); relaxed: 100 times
    that."""
    verdict: bool = True
    """Whether the whole rewritten function must also be timed faster than the original."""
    table: str | None = None
    """The cost table's file; None for `table.sqlite` in the user's cache folder, ':memory:' for none."""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("on_miss", ("measure", "heuristic", "error")),
            ("numerics", ("strict", "relaxed")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(allowed)}")
        for name, least in (("time_budget", 0.0), ("memory_limit", 1.0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected at least {least}")

    @classmethod
    def from_environment(cls, **given: Any) -> Self:
        """The defaults, what the environment sets, and what is given, the last winning."""
        hints = typing.get_type_hints(cls)
        values: dict[str, Any] = {}
        for field in fields(cls):
            text = os.environ.get(f"JAXLAYOUT_{field.name.upper()}")
            if text is not None:
                try:
                    values[field.name] = _parsed(hints[field.name], text)
                except ValueError as error:
                    raise ValueError(f"JAXLAYOUT_{field.name.upper()}={text!r}: {error}") from None
        return cls(**(values | given))


def _parsed(hint: Any, text: str) -> Any:
    if hint is float:
        return float(text)
    if hint is bool:
        if text.lower() not in ("0", "1", "true", "false", "on", "off"):
            raise ValueError("expected one of 0, 1, true, false, on, off")
        return text.lower() in ("1", "true", "on")
    return text
