"""Timing that holds on a noisy machine: two functions in turn in one process, ratios pair by pair."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True, slots=True)
class Paired:
    """Medians in milliseconds; `ratio` is the median of the pairs' first / second, above 1: second is faster."""

    first_ms: float
    second_ms: float
    ratio: float
    spread: float
    """Half the interquartile range of the ratios."""
    pairs: int

    def to_json(self, first: str, second: str) -> dict[str, float]:
        """Plain data, the two called by these names."""
        times = {f"{first}_ms": self.first_ms, f"{second}_ms": self.second_ms}
        return times | {"ratio": self.ratio, "spread": self.spread, "pairs": self.pairs}


def paired(
    first: Callable[..., Any],
    second: Callable[..., Any],
    *args: Any,
    pairs: int = 15,
    seconds: float = math.inf,
    fewest: int = 3,
) -> Paired:
    """Both are warm. The order within a pair turns from pair to pair; short calls are repeated to 20 ms.
    Where `pairs` take longer than `seconds`, as many as fit, but at least `fewest`."""

    def timed(f: Callable[..., Any], repeat: int) -> float:
        start = time.perf_counter()
        for _ in range(repeat):
            out = f(*args)
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / repeat

    once = timed(first, 1), timed(second, 1)
    repeat = max(1, round(0.02 / max(1e-9, min(once))))
    pairs = min(pairs, max(fewest, int(min(pairs, seconds / (repeat * sum(once))))))
    times: list[tuple[float, float]] = []
    for n in range(pairs):
        order = (first, second) if n % 2 == 0 else (second, first)
        a, b = timed(order[0], repeat), timed(order[1], repeat)
        times.append((a, b) if n % 2 == 0 else (b, a))
    ratios = [a / b for a, b in times]
    low, _, high = statistics.quantiles(ratios, n=4)
    return Paired(
        first_ms=1e3 * statistics.median(a for a, _ in times),
        second_ms=1e3 * statistics.median(b for _, b in times),
        ratio=statistics.median(ratios),
        spread=(high - low) / 2,
        pairs=pairs,
    )
