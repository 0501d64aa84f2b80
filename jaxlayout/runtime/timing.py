"""Timing that holds on a noisy machine: samples that last, two functions in turn in one process, ratios by pairs."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import jax

Run = Callable[[], Any]

WARM_NS = 1e8
"""A run that takes so long takes as long the first time."""
PAIRED_NS = 2e7
"""How long the samples of `paired` last, at least."""


@dataclass(frozen=True, slots=True)
class Paired:
    """Medians in milliseconds; `ratio` is the median of the pairs' first / second, above 1: second is faster."""

    first_ms: float
    second_ms: float
    ratio: float
    spread: float
    """Half the interquartile range of the ratios."""
    pairs: int

    @classmethod
    def of(cls, times: Sequence[tuple[float, float]]) -> Paired:
        """The medians of pairs of nanoseconds; there are two pairs at least."""
        ratios = [a / b for a, b in times]
        low, _, high = statistics.quantiles(ratios, n=4)
        return cls(
            first_ms=statistics.median(a for a, _ in times) / 1e6,
            second_ms=statistics.median(b for _, b in times) / 1e6,
            ratio=statistics.median(ratios),
            spread=(high - low) / 2,
            pairs=len(times),
        )

    def to_json(self, first: str, second: str) -> dict[str, float]:
        """Plain data, the two called by these names."""
        times = {f"{first}_ms": self.first_ms, f"{second}_ms": self.second_ms}
        return times | {"ratio": self.ratio, "spread": self.spread, "pairs": self.pairs}


def timed_call(run: Run) -> tuple[Any, float]:
    """What a call gives, and the nanoseconds until it is there."""
    start = time.perf_counter_ns()
    out = jax.block_until_ready(run())
    return out, float(time.perf_counter_ns() - start)


def samples(run: Run, seconds: float, fewest: int) -> list[float]:
    """Nanoseconds of each of the calls that fit into so many seconds, and of at least so many."""
    stop, found = time.monotonic() + seconds, []
    while len(found) < fewest or time.monotonic() < stop:
        found.append(timed_call(run)[1])
    return found


def sample(run: Run, repeat: int) -> float:
    """Nanoseconds of a call, of so many in a row."""
    start = time.perf_counter_ns()
    for _ in range(repeat):
        out = run()
    jax.block_until_ready(out)
    return (time.perf_counter_ns() - start) / repeat


def enough(repeat: int, ns: float, least_ns: float) -> int:
    """How many calls last `least_ns`, when `repeat` have taken `ns` each: no other number if these have."""
    return repeat if repeat * ns >= least_ns else max(repeat + 1, math.ceil(least_ns / max(1.0, ns)))


def lasting(run: Run, least_ns: float, repeat: int = 1) -> tuple[float, int]:
    """A sample that lasts `least_ns`, of `repeat` calls or as many as it takes, and how many they are. The function is
    warm: what its first call takes says nothing of the others."""
    while True:
        ns = sample(run, repeat)
        if (wanted := enough(repeat, ns, least_ns)) == repeat:
            return ns, repeat
        repeat = wanted


def in_pairs(first: Run, second: Run, least_ns: float, turned: Iterable[bool]) -> Iterator[tuple[float, float]]:
    """Nanoseconds of a call of each of two functions, both warm, pair by pair. `turned`: of each pair whether the
    second runs first. Both are called equally often for a sample, and so often that the shorter one lasts `least_ns`;
    a pair of which it does not is left out."""
    repeat = 1
    for turn in turned:
        a, b = (sample(run, repeat) for run in ((second, first) if turn else (first, second)))
        if (wanted := enough(repeat, min(a, b), least_ns)) == repeat:
            yield (b, a) if turn else (a, b)
        repeat = wanted


def paired(
    first: Callable[..., Any],
    second: Callable[..., Any],
    *args: Any,
    pairs: int = 15,
    seconds: float = math.inf,
    fewest: int = 3,
) -> Paired:
    """Each is called once before. The order within a pair turns from pair to pair; short calls are repeated to 20 ms.
    Where `pairs` take longer than `seconds`, as many as fit, but at least `fewest`."""
    jax.block_until_ready((first(*args), second(*args)))
    times: list[tuple[float, float]] = []
    stop = time.monotonic() + seconds
    for pair in in_pairs(lambda: first(*args), lambda: second(*args), PAIRED_NS, cycle((False, True))):
        times.append(pair)
        if len(times) >= pairs or (len(times) >= fewest and time.monotonic() > stop):
            break
    return Paired.of(times)
