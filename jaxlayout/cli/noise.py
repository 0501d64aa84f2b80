"""How steady times are on this machine, and what that means for tuning."""

from __future__ import annotations

import os
import statistics
from dataclasses import asdict, dataclass
from typing import Any, Literal

Grade = Literal["ok", "note", "warning", "problem"]

QUIET, NOISY = 0.05, 0.15
"""Up to the one, half the interquartile range relative to the median is fine; beyond the other it is a warning."""
OUTLIER = 1.5
"""A run this many times as long as the median one."""
OUTLIERS = 0.05
"""The share of them that is fine."""
LOCK_SECONDS = 5.0
"""How long to wait for another process that is timing."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    check: str
    grade: Grade
    found: str
    advice: str = ""
    """What it means, or what to do."""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Noise:
    """How runs of one program, which does the same each time, differ in time."""

    median_ns: float
    spread: float
    """Half the interquartile range, relative to the median."""
    outliers: float
    """The share of runs of OUTLIER times the median."""
    runs: int


def noise(seconds: float) -> Finding:
    """How steady times are on this machine, now."""
    from jaxlayout.measure.turns import NoTurn, Turns

    try:
        with Turns(LOCK_SECONDS).timing():
            seen = measured_noise(seconds)
    except NoTurn as error:
        return Finding("noise", "note", f"not measured: {error}", "One process of a machine times at a time.")
    return judged(seen)


def measured_noise(seconds: float) -> Noise:
    """The noise of a matrix product of a few milliseconds, run for so many seconds and at least nine times."""
    import jax
    import jax.numpy as jnp

    from jaxlayout.runtime.timing import samples

    x = jnp.full((768, 768), 1 / 768, jnp.float32)
    product = jax.jit(jnp.matmul)
    for _ in range(3):
        jax.block_until_ready(product(x, x))
    times = samples(lambda: product(x, x), seconds, fewest=9)
    low, median, high = statistics.quantiles(times, n=4)
    slow = sum(one > OUTLIER * median for one in times) / len(times)
    return Noise(median_ns=median, spread=(high - low) / 2 / median, outliers=slow, runs=len(times))


def judged(seen: Noise) -> Finding:
    """What noise means for tuning."""
    load = f"; load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    words = (
        f"a matrix product takes {seen.median_ns / 1e6:.2f} ms ±{seen.spread:.1%}, {seen.outliers:.1%} of {seen.runs} "
        f"runs took {OUTLIER} times that or more{load}"
    )
    if seen.spread <= QUIET and seen.outliers <= OUTLIERS:
        return Finding("noise", "ok", words)
    if seen.spread <= NOISY and seen.outliers <= 3 * OUTLIERS:
        advice = f"Which of two forms is faster may come out wrong below a difference of {2 * seen.spread:.0%}."
        return Finding("noise", "note", words, advice)
    advice = (
        "Something else runs on this machine. Times are taken in turn, so large gains are found all the same; those "
        f"below {2 * seen.spread:.0%} may be missed, or be none. Tune again when it is idle."
    )
    return Finding("noise", "warning", words, advice)
