"""What is timed lasts long enough, and who wins by chance is not kept. No real time is looked at."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from random import Random
from types import SimpleNamespace

import pytest

from jaxlayout.measure import trials
from jaxlayout.runtime import timing
from jaxlayout.runtime.timing import Paired, in_pairs, lasting, paired
from jaxlayout.verify import race
from jaxlayout.verify.race import MAX_PAIRS, ODDS, evidence, is_faster


class Clock:
    """Stands still but while something runs."""

    def __init__(self, monkeypatch):
        self.ns = 0
        here = SimpleNamespace(perf_counter_ns=lambda: self.ns, monotonic=lambda: self.ns / 1e9)
        for module in (timing, race):
            monkeypatch.setattr(module, "time", here)

    def running(self, *takes: float, log: list[float] | None = None):
        """A function that takes so many nanoseconds each time it is called, and the last of them from then on."""
        left = list(takes)

        def run() -> None:
            ns = left.pop(0) if len(left) > 1 else left[0]
            self.ns += round(ns)
            if log is not None:
                log.append(ns)

        return run


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


# Samples


@pytest.mark.parametrize("slow_at_first", [[], [3e5], [3e5, 9e4], [3e5, 9e4, 6e4, 6e4, 6e4, 6e4]])
def test_a_candidate_is_timed_as_often_as_it_takes_once_it_is_warm(clock, slow_at_first):
    trial = trials.Trial(clock.running(4e6, *slow_at_first, 5e4), None, "")
    trial.warm_up()
    for sample in (trial.first, *[trial.sample] * 3):
        before = clock.ns
        ns = sample()
        assert clock.ns - before >= trials.MIN_SAMPLE_NS
        assert ns * trial.inner >= trials.MIN_SAMPLE_NS
    assert trial.inner == 4 and ns == 5e4


def test_a_candidate_that_takes_long_is_not_run_twice_for_its_first_sample(clock):
    ran = []
    trial = trials.Trial(clock.running(1.5e8, log=ran), None, "")
    trial.warm_up()
    assert trial.first() == 1.5e8 and len(ran) == 1


def test_a_sample_lasts(clock):
    assert lasting(clock.running(9e4, 7e4, 3e4), 2e5) == (3e4, 7)
    assert lasting(clock.running(3e4), 2e5, repeat=7) == (3e4, 7)
    assert lasting(clock.running(3e6), 2e5) == (3e6, 1)


def test_pairs_last_and_are_told_in_order(clock):
    ran = []
    first, second = clock.running(3e6, 1e6, log=ran), clock.running(4e5, log=ran)
    found = list(itertools.islice(in_pairs(first, second, 1e6, itertools.cycle((False, True))), 3))
    assert found == [(1e6, 4e5)] * 3
    assert ran == [3e6, 4e5, *([4e5] * 3 + [1e6] * 3 + [1e6] * 3 + [4e5] * 3) * 2][: len(ran)] and len(ran) == 20


def test_a_pair_that_is_long_enough_counts_and_none_that_warms_up(clock):
    ran = []
    seen = paired(clock.running(9e9, 5e7, log=ran), clock.running(4e7, log=ran), pairs=3)
    assert seen.pairs == 3 and len(ran) == 8 and seen.ratio == 1.25


def test_pairs_end_with_the_time(clock):
    assert paired(clock.running(5e8), clock.running(5e8), seconds=6.5).pairs == 7
    assert paired(clock.running(5e8), clock.running(5e8), seconds=0.5, fewest=4).pairs == 4


# The sequential test


def chance_of_being_kept(share: float, large: float = 0.0, most: int = MAX_PAIRS) -> float:
    """Of a function that wins this share of pairs, each independently: the sum over all ways there are. `large`: the
    share of pairs that are won or lost by more than SURE."""
    kept, ways = 0.0, {(0, 0, True): 1.0}  # wins, losses, whether all were large
    for _ in range(most):
        after = defaultdict[tuple[int, int, bool], float](float)
        for (wins, losses, sure), chance in ways.items():
            for win, big in itertools.product((True, False), repeat=2):
                by = (share if win else 1 - share) * (large if big else 1 - large)
                after[wins + win, losses + (not win), sure and big] += chance * by
        ways = {}
        for (wins, losses, sure), chance in after.items():
            match is_faster([3.0 if sure else 1.1] * wins + [0.3 if sure else 0.9] * losses):
                case True:
                    kept += chance
                case None:
                    ways[wins, losses, sure] = chance
    return kept


@pytest.mark.parametrize("large", [0.0, 1 / 3])
def test_one_of_two_equal_functions_is_kept_one_time_in_twenty_at_most(large):
    """However noisy the machine is, and wherever time stops the race; even where it is raced twice."""
    chance = chance_of_being_kept(0.5, large)
    assert 0.02 < chance < 0.03
    assert large or 1 - (1 - chance) ** 2 < 0.05


def test_a_slower_one_is_hardly_ever_kept():
    assert chance_of_being_kept(0.4) < 0.003


@pytest.mark.parametrize(
    ("share", "most", "power"), [(0.65, MAX_PAIRS, 0.96), (0.7, 100, 0.9), (0.8, 40, 0.9), (0.9, 20, 0.9)]
)
def test_a_faster_one_is_kept(share, most, power):
    assert chance_of_being_kept(share, most=most) > power


def test_odds():
    assert evidence(0, 0) == 1.0
    for wins, losses in itertools.product(range(6), repeat=2):  # a martingale
        assert (evidence(wins + 1, losses) + evidence(wins, losses + 1)) / 2 == pytest.approx(evidence(wins, losses))
    assert evidence(7, 0) == pytest.approx(2**8 / 8 * (1 - 2**-8)) and evidence(6, 0) < ODDS < evidence(7, 0)


def test_when_a_race_ends():
    assert is_faster([1.1] * 6) is None and is_faster([1.1] * 7) is True
    assert is_faster([2.1] * 3) is True and is_faster([2.1, 2.1, 1.9]) is None
    assert is_faster([0.4] * 3) is False and is_faster([0.9] * 9) is None and is_faster([0.9] * 10) is False
    assert is_faster([1.0] * 10) is False  # ties are not won
    assert is_faster([1.1, 0.9] * 40) is False
    assert is_faster([1.1] * 172 + [0.9] * 127) is None and is_faster([1.1] * 172 + [0.9] * 128) is False


def test_a_race(clock):
    faster, seen = race.race(clock.running(1.1e6), clock.running(1e6))
    assert faster and seen.pairs == 7 and seen.ratio == pytest.approx(1.1) and seen.first_ms == 1.1
    assert race.race(clock.running(1e6), clock.running(1.1e6)) == (False, Paired.of([(1e6, 1.1e6)] * 10))
    assert not race.race(clock.running(1e6), clock.running(1e6))[0]


def test_which_runs_first_is_drawn(clock):
    ran = []
    first, second = clock.running(1.01e7, log=ran), clock.running(1e7, log=ran)
    for _ in range(10):
        assert race.race(first, second)[0]
    firsts = ran[::2]
    assert len(firsts) == 70 and 10 < sum(ns == 1e7 for ns in firsts) < 60


def test_noise_that_goes_on_from_pair_to_pair_makes_no_winner(clock, monkeypatch):
    """Of equal functions the first of a pair is slower by a fifth, of the next pair the second, among waves: if they
    took turns, one of them would always win."""

    def kept(seed: int) -> bool:
        calls = itertools.count()

        def run() -> None:
            n = next(calls)
            clock.ns += round(5e6 * (1 + 0.2 * ((n // 2 + n + 1) % 2) + 0.3 * math.sin(n / 5)))

        monkeypatch.setattr(race, "random", SimpleNamespace(Random=lambda: Random(seed)))
        return race.race(run, run)[0]

    monkeypatch.setattr(race, "SAMPLE_NS", 1.0)
    assert sum(map(kept, range(100))) <= 5


def test_a_long_race_goes_on_while_nothing_is_lost(clock):
    faster, seen = race.race(clock.running(1.1e10), clock.running(1e10))
    assert faster and seen.pairs == 7
    faster, seen = race.race(clock.running(1.1e10), clock.running(1e10, 1.2e10, 1e10))
    assert not faster and seen.pairs == 2
