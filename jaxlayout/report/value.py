"""What there is to say of a program: plain data. Times in nanoseconds, memory in bytes."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

from jaxlayout.convs.candidates import Candidate
from jaxlayout.table.measurement import Measurement
from jaxlayout.tuning.outcome import Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """One candidate of a convolution and what became of it."""

    candidate: Candidate
    measurement: Measurement | None
    """None where the table has none: a pinned plan, a guess."""
    written: bool
    chosen: bool

    def to_json(self) -> dict[str, Any]:
        """Plain data; what was measured is null where nothing was."""
        names = ("status", "median_ns", "spread_ns", "runs", "error", "temp_bytes", "detail")
        found = {} if self.measurement is None else self.measurement.to_json()
        return {
            "candidate": str(self.candidate),
            "lowering": self.candidate.lowering,
            "orders": str(self.candidate.dims),
            "written": self.written,
            "chosen": self.chosen,
            **{name: found.get(name) for name in names},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteFacts:
    """One convolution and what became of it."""

    path: tuple[int, ...]
    """Where its equation is, as in a `Plan`."""
    line: str
    """The source line that wrote it."""
    caller: str
    """The innermost one outside of installed packages: the user's, where a library wrote the convolution."""
    scope: str
    """The name scopes that it stands in: a Flax module's path, `transpose(jvp(...))` of a derivative."""
    kind: str
    """The sort of convolution in a few words: "depthwise 3x3 stride 2"."""
    lhs: tuple[int, ...]
    rhs: tuple[int, ...]
    out: tuple[int, ...]
    """Shapes, in the orders written."""
    dtype: str
    signature: str
    """What is computed: the key in the cost table."""
    times: float
    """How often it runs each time the function does."""
    tried: tuple[Tried, ...]
    """The fastest first; what has no time last."""

    @property
    def written(self) -> Tried:
        """The form that the user wrote."""
        return next(one for one in self.tried if one.written)

    @property
    def wrong(self) -> str:
        """What is wrong with the numbers that XLA gives for the form written; '' where nothing was found to be."""
        found = self.written.measurement
        return found.detail if found is not None and found.status == "wrong" else ""

    @property
    def chosen(self) -> Tried:
        """The form that the plan has."""
        return next(one for one in self.tried if one.chosen)

    def to_json(self) -> dict[str, Any]:
        """Plain data; see `Explanation.to_json`."""
        names = ("line", "caller", "scope", "kind", "dtype", "signature", "times")
        rest = {name: list(getattr(self, name)) for name in ("path", "lhs", "rhs", "out")}
        chosen = {"written": str(self.written.candidate), "chosen": str(self.chosen.candidate)}
        plain = {name: getattr(self, name) for name in names}
        return rest | plain | chosen | {"candidates": [one.to_json() for one in self.tried]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A conversion that the plan puts in: one value of logical `shape`, from one axis order to another."""

    shape: tuple[int, ...]
    dtype: str
    held: str
    wanted: str
    """Orders by the letters of a convolution's axes where they are known, by the numbers of the axes elsewhere."""
    held_by: str
    """What made the value, and what that has its order from."""
    wanted_by: tuple[str, ...]
    times: float
    ns: float
    """Of one: the measured median and spread, or a bound."""
    measured: bool
    """Whether that was timed; else it is less than it can be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transpose:
    """One of the user's own."""

    line: str
    shape: tuple[int, ...]
    permutation: tuple[int, ...]
    absorbed: bool
    """Whether the plan has none there: its operand is made in the order that its result is read in."""
    times: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Barrier:
    """A primitive that stops orders: its operands arrive in the order written."""

    name: str
    count: int
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of the program as the plan has it, elementwise work left out: what is drawn."""

    kind: str
    """argument, convolution, equation, transpose (the user's), conversion, join (where branches meet), barrier or
    result."""
    label: str
    inputs: tuple[int, ...]
    """The steps before it whose values it reads."""
    order: str
    """The order that its result has."""
    site: int | None = None
    """Which convolution it is."""
    ns: float = 0.0
    times: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What was chosen for a function and why."""

    name: str
    outcome: Outcome
    sites: tuple[SiteFacts, ...]
    """The convolutions, in the program's order."""
    moves: tuple[Move, ...]
    transposes: tuple[Transpose, ...]
    barriers: tuple[Barrier, ...]
    steps: tuple[Step, ...]

    @property
    def provisional(self) -> bool:
        """Whether it was decided without all measurements; another process measures what is missing."""
        return self.outcome.source == "heuristic"

    @property
    def saved_ns(self) -> float | None:
        """Measured to be saved by each call; None where the whole functions were not timed."""
        verdict = self.outcome.verdict
        if not self.outcome.kept:
            return 0.0
        if verdict.original_ns is None or verdict.tuned_ns is None:
            return None
        return verdict.original_ns - verdict.tuned_ns

    @property
    def break_even(self) -> int | None:
        """After how many calls the seconds of tuning are won back; None: never, or not timed."""
        return math.ceil(self.outcome.seconds * 1e9 / self.saved_ns) if self.saved_ns and self.saved_ns > 0 else None


def short_line(line: str) -> str:
    """A source line without folders and column: "model.py:12 (f)"."""
    place, _, function = line.rpartition(" (")
    parts = (place or line).split(":")
    return ":".join([os.path.basename(parts[0]), *parts[1:2]]) + (f" ({function}" if place else "")
