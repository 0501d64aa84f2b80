"""`Options`: all that can be set, in one value; each also by an environment variable."""

from __future__ import annotations

import os
import typing
from dataclasses import dataclass, fields
from typing import Any, Literal, Self


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a function is tuned. The variable `JAXLAYOUT_<NAME>` sets a default, a keyword of `auto_layout` wins."""

    policy: Literal["auto", "channels_last", "off"] = "auto"
    """auto: what is measured to be fastest, never slower than the original. channels_last: every convolution channels
    last through XLA, unmeasured and unjudged, so maybe slower. off: as `jax.jit`, nothing is tuned."""
    on_miss: Literal["measure", "heuristic", "error"] = "measure"
    """What to do where the table does not know a convolution: time it, believe the device's `LayoutPolicy`, or raise
    TableMiss."""
    time_budget: float = 300.0
    """Seconds that this process may spend on measuring, over all functions and shapes."""
    memory_limit: float = 1.25
    """Memory that the rewritten function may need, arguments and results included, relative to the original, or to
    256 MiB where that needs less: at 1.25 temporary memory, and what is prepared of frozen arguments, may grow by a
    quarter of the whole, and by 64 MiB anyway."""
    numerics: Literal["strict", "relaxed"] = "strict"
    """strict: a candidate's error against float64 is at most max(2x XLA's own, 3 eps sqrt(K)); relaxed: 100 times
    that."""
    verdict: bool = True
    """Whether the whole rewritten function must also be timed faster than the original."""
    lock_timeout: float = 300.0
    """Seconds to wait for a turn at timing, which one process or thread of a machine has at a time. After that the call
    goes on as `jax.jit` would, and the next call tries again."""
    table: str | None = None
    """The cost table's file; None for `table.sqlite` in the user's cache folder, ':memory:' for none."""

    def __post_init__(self) -> None:
        if isinstance(self.table, os.PathLike):
            object.__setattr__(self, "table", os.fspath(self.table))
        for name, hint in typing.get_type_hints(type(self)).items():
            value = getattr(self, name)
            if problem := _problem(hint, value, _LEAST.get(name, 0.0)):
                raise ValueError(f"{name}={value!r}: expected {problem}")

    @property
    def relaxed(self) -> bool:
        """Whether lowerings that are less accurate than XLA's convolution may be chosen."""
        return self.numerics == "relaxed"

    @property
    def relax(self) -> float:
        """What the numerics policy multiplies allowed errors by."""
        return 100.0 if self.relaxed else 1.0

    @classmethod
    def from_environment(cls, **given: Any) -> Self:
        """The defaults, what the environment sets, and what is given, the last winning."""
        hints = typing.get_type_hints(cls)
        values: dict[str, Any] = {}
        for name in hints.keys() - given.keys():
            variable = f"JAXLAYOUT_{name.upper()}"
            if text := os.environ.get(variable):
                try:
                    values[name] = _parsed(hints[name], text)
                    cls(**{name: values[name]})
                except ValueError as error:
                    raise ValueError(f"{variable}={text!r}: {error}") from None
        return cls(**values, **given)


_DECIDES_ALIKE = {"policy", "on_miss", "time_budget", "lock_timeout", "table"}
"""What may differ between who stores a plan and who takes it."""


def that_decide(options: Options) -> dict[str, Any]:
    """The options on which it depends what is decided of a program: a stored plan holds under the same values of them
    alone. A new option is one of these unless `_DECIDES_ALIKE` says otherwise."""
    return {field.name: getattr(options, field.name) for field in fields(options) if field.name not in _DECIDES_ALIKE}


_LEAST = {"memory_limit": 1.0}


def _problem(hint: Any, value: Any, least: float) -> str:
    """What a value of some type should have been; '' if it is that."""
    if typing.get_origin(hint) is Literal:
        return "" if value in typing.get_args(hint) else f"one of {', '.join(typing.get_args(hint))}"
    if hint is float:
        number = isinstance(value, int | float) and not isinstance(value, bool) and value >= least
        return "" if number else f"a number, at least {least}"
    return "" if isinstance(value, hint) else f"{getattr(hint, '__name__', hint)}"


def _parsed(hint: Any, text: str) -> Any:
    """The value that an environment variable stands for."""
    if hint is float:
        return float(text)
    if hint is bool:
        if text.lower() not in ("0", "1", "true", "false", "on", "off"):
            raise ValueError("expected one of 0, 1, true, false, on, off")
        return text.lower() in ("1", "true", "on")
    return text
