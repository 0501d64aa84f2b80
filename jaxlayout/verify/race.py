"""`race`: whether one of two functions is faster than the other, by a test that may be looked at after every pair.

Which function of a pair runs first is drawn. So of two equal ones each wins a pair with probability 1/2, whatever the
noise is like, however it goes on from pair to pair, and whatever it is worth to come first (a randomisation test:
Fisher 1935, "The Design of Experiments"). What is counted is who wins, not by how much: a sign test. Looked at again
and again until it is content, an ordinary one of 5% errs many times as often (Armitage, McPherson, Rowe 1969); this one
is sequential, see `evidence`.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Sequence

from jaxlayout.runtime.timing import Paired, Run, in_pairs

ODDS = 30.0
"""The odds of a claim against its opposite, for it to be believed: one in so many is wrong, at most. A program may be
raced twice, the second time with compiler options, and both times together may err one time in twenty."""
GAIN = 0.65
"""The share of pairs won that is worth looking for. A function that is 5% faster wins it where samples vary by a
standard deviation of 9%."""
MAX_PAIRS = 300
TRIAL_SECONDS = 20.0
"""Time for pairs; then a race goes on only while the function has not lost any."""
SURE, SURE_PAIRS = 2.0, 3
"""So many times faster or slower in so many pairs from the first: that is no noise. Were a third of all pairs of equal
functions apart by so much, one race in 200 would come to it."""
SAMPLE_NS = 5e6
"""How long a sample lasts, at least."""


def evidence(wins: int, losses: int) -> float:
    """How many times more likely this is where the chance to win is anything from 1/2 to 1, all alike, than where it is
    1/2: 2^(n+1) ∫ p^wins (1-p)^losses dp over [1/2, 1], n pairs, by way of binomial sums.

    Between equal functions it is a martingale from 1 on, and such a one ever comes to `x` with probability 1/x at most
    (Ville 1939), so one may look as often as one likes (Robbins 1970, "Statistical Methods Related to the Law of the
    Iterated Logarithm", whose mixture this is).
    """
    n = wins + losses + 1
    return sum(math.comb(n, k) for k in range(wins + 1)) / (n * math.comb(n - 1, wins))


def is_faster(ratios: Sequence[float]) -> bool | None:
    """What pairs say so far: that the second function is faster, that nothing comes of it, or nothing yet. `ratios`:
    first / second; a tie is not won."""
    if len(ratios) >= SURE_PAIRS and (min(ratios) > SURE or max(ratios) < 1 / SURE):
        return min(ratios) > SURE
    wins = sum(ratio > 1 for ratio in ratios)
    losses = len(ratios) - wins
    if evidence(wins, losses) >= ODDS:
        return True
    # As Wald's sequential test gives up (1945): that it wins GAIN of all pairs is refuted.
    refuted = (2 * GAIN) ** wins * (2 - 2 * GAIN) ** losses <= 1 / ODDS
    return False if refuted or len(ratios) >= MAX_PAIRS else None


def race(first: Run, second: Run) -> tuple[bool, Paired]:
    """Whether the second function is faster than the first, beyond doubt, and what was seen. Both are warm."""
    draw = random.Random()
    pairs = in_pairs(first, second, SAMPLE_NS, (draw.random() < 0.5 for _ in itertools.count()))
    times: list[tuple[float, float]] = []
    faster, stop = None, time.monotonic() + TRIAL_SECONDS
    while faster is None:
        times.append(next(pairs))
        ratios = [old / new for old, new in times]
        faster = is_faster(ratios)
        if faster is None and time.monotonic() > stop and len(ratios) > 1 and min(ratios) <= 1:
            faster = False
    return faster, Paired.of(times)
