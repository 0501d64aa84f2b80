"""Timing that holds on a noisy machine: functions in turn in one process, ratios pair by pair."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

Contender = Callable[[], Any]
"""Runs once, to the end."""


@dataclass(frozen=True, slots=True)
class Paired:
    """Medians in milliseconds; `ratio` is the median of the pairs' first / second, above 1: second is faster."""

    first_ms: float
    second_ms: float
    ratio: float
    spread: float
    """Half the interquartile range of the ratios."""
    pairs: int


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


def first_call(f: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """What a function gives, and the seconds until it is there."""
    start = time.perf_counter()
    out = jax.block_until_ready(f(*args))
    return out, time.perf_counter() - start


def in_turn(contenders: Mapping[str, Contender], rounds: int) -> dict[str, list[float]]:
    """Seconds of each in each round, all warm. Each begins its turn with a call that is not timed, while the threads
    of the one before it go to sleep; short calls are repeated to 0.1 s; the order turns from round to round."""

    def timed(call: Contender, repeat: int) -> float:
        start = time.perf_counter()
        for _ in range(repeat):
            call()
        return (time.perf_counter() - start) / repeat

    repeats = {name: max(1, round(0.1 / timed(call, 1))) for name, call in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for n in range(rounds):
        turned = names[n % len(names) :] + names[: n % len(names)]
        for name in turned if n % 2 == 0 else reversed(turned):
            contenders[name]()
            seconds[name].append(timed(contenders[name], repeats[name]))
    return seconds


def middle(values: Sequence[float]) -> tuple[float, float]:
    """The median, and half the interquartile range."""
    low, _, high = statistics.quantiles(values, n=4)
    return statistics.median(values), (high - low) / 2
