"""What is timed lasts long enough. No real time is looked at."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest

from jaxlayout import timing
from jaxlayout.costs import measure
from jaxlayout.timing import in_pairs, lasting, paired


class Clock:
    """Stands still but while something runs."""

    def __init__(self, monkeypatch):
        self.ns = 0
        here = SimpleNamespace(perf_counter_ns=lambda: self.ns, monotonic=lambda: self.ns / 1e9)
        for module in (timing, measure):
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
    trial = measure._Trial(clock.running(4e6, *slow_at_first, 5e4), None, "")
    trial.warm_up()
    for sample in (trial.first, *[trial.sample] * 3):
        before = clock.ns
        ns = sample()
        assert clock.ns - before >= measure.MIN_SAMPLE_NS
        assert ns * trial.inner >= measure.MIN_SAMPLE_NS
    assert trial.inner == 4 and ns == 5e4


def test_a_candidate_that_takes_long_is_not_run_twice_for_its_first_sample(clock):
    ran = []
    trial = measure._Trial(clock.running(1.5e8, log=ran), None, "")
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
