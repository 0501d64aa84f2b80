"""`Plan`: what has been decided about a program, as a value that can be shown, saved and loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from types import MappingProxyType
from typing import Any

from jaxlayout.convs.candidates import Candidate
from jaxlayout.graph.build import Mode, Path
from jaxlayout.layout import Order
from jaxlayout.runtime.plain_data import check_format, flag, integer, number, optional, shown, text

FORMAT = 4
"""The number of the form that `to_json` gives. The one before is read, too."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """One transpose in the rewritten program: a value of logical `shape` (on one device) from one order to another. The
    user's own transposes that stay are among them."""

    shape: tuple[int, ...]
    dtype: str
    held: Order
    wanted: Order
    before: Path
    """The equation that wants it, or the user's own transpose; () for the function's own results."""
    times: float = 1.0
    """How often it is done each time the program runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The modes of all equations that are not left as the user wrote them, by path, and of all convolutions where there
    is any such. Times in nanoseconds, as the additive model has them: of convolutions, conversions, and other equations
    whose time depends on the order."""

    choices: Mapping[Path, Mode] = field(default_factory=dict)
    """By path. A convolution that has a mode becomes a `tuned_conv`, also where it stays as written."""
    conversions: tuple[Conversion, ...] = ()
    """The transposes that the rewritten program does each time it runs (not what `freeze` does once)."""
    predicted_ns: float = 0.0
    """The cost of the program as planned: times with what is added to them (`CostModel.node_ns`)."""
    written_ns: float = 0.0
    """The cost of the program as the user wrote it."""
    bound_ns: float = 0.0
    """No plan over the same candidates and costs is cheaper."""
    exact: bool = True
    """Whether none is cheaper than this one."""
    compiler_options: Mapping[str, str] = field(default_factory=dict)
    """What the whole program is compiled with beside the options that the user gave `jax.jit`."""
    materialised_bytes: int | None = None
    """How large an array is at most that is written out because a convolution reads it often and it is costly to
    compute (see `rewrite.retrace`); None: any."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "choices", MappingProxyType(dict(self.choices)))
        object.__setattr__(self, "compiler_options", MappingProxyType(dict(self.compiler_options)))

    @property
    def trivial(self) -> bool:
        """Nothing is to change."""
        return not self.choices and not self.compiler_options

    @property
    def gap(self) -> float:
        """How far from optimal the plan may be under its costs, as a share: 0.0 means optimal."""
        return 0.0 if self.exact else self.predicted_ns / self.bound_ns - 1 if self.bound_ns else float("inf")

    def to_json(self) -> dict[str, Any]:
        """Plain data: numbers, strings, lists, dictionaries."""
        return {
            "format": FORMAT,
            "choices": [
                [
                    list(path),
                    [list(o) for o in mode.operands],
                    [list(o) for o in mode.results],
                    mode.candidate and str(mode.candidate),
                ]
                for path, mode in self.choices.items()
            ],
            "conversions": [
                [list(c.shape), c.dtype, list(c.held), list(c.wanted), list(c.before), c.times]
                for c in self.conversions
            ],
            "predicted_ns": self.predicted_ns,
            "written_ns": self.written_ns,
            "bound_ns": self.bound_ns,
            "exact": self.exact,
            "compiler_options": dict(self.compiler_options),
            "materialised_bytes": self.materialised_bytes,
        }

    @classmethod
    def from_json(cls, data: Any) -> Plan:
        """The inverse of `to_json`. ValueError, saying why, for anything else."""
        check_format("a plan", data, FORMAT, oldest=3)
        try:
            materialised = data["sealed_bytes" if data["format"] == 3 else "materialised_bytes"]
            return cls(
                choices={
                    _integers(path): Mode(
                        _orders(operands),
                        _orders(results),
                        None if candidate is None else Candidate.parse(text("candidate", candidate, 1000)),
                    )
                    for path, operands, results, candidate in data["choices"]
                },
                conversions=tuple(
                    Conversion(
                        shape=_integers(shape),
                        dtype=text("dtype", dtype, 100),
                        held=_orders([held])[0],
                        wanted=_orders([wanted])[0],
                        before=_integers(before),
                        times=number("times", times),
                    )
                    for shape, dtype, held, wanted, before, times in data["conversions"]
                ),
                **{name: number(name, data[name]) for name in ("predicted_ns", "written_ns", "bound_ns")},
                exact=flag("exact", data["exact"]),
                compiler_options={
                    text("option", name, 1000): text("option", value, 1000)
                    for name, value in data["compiler_options"].items()
                },
                materialised_bytes=optional(integer, "materialised_bytes", materialised, 2**60),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a plan: {error!r}"[:200]) from error

    def save(self, path: str | FilePath) -> None:
        """Write it to a file, as JSON."""
        FilePath(path).write_text(json.dumps(self.to_json()), encoding="utf-8")

    @classmethod
    def load(cls, path: str | FilePath) -> Plan:
        """Read what `save` wrote. ValueError for what is no plan, or one of another version's format."""
        return cls.from_json(json.loads(FilePath(path).read_text(encoding="utf-8")))


def _integers(data: Any) -> tuple[int, ...]:
    return tuple(integer("an axis, size or place", value, 2**60) for value in data)


def _orders(data: Any) -> tuple[Order, ...]:
    orders = tuple(map(_integers, data))
    if any(sorted(order) != list(range(len(order))) for order in orders):
        raise ValueError(f"not axis orders: {shown(data)}")
    return orders
