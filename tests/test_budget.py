"""The time budget, by a clock that stands still until it is told."""

from __future__ import annotations

import sys
import threading
from typing import Any

import pytest
from helpers import python

from jaxlayout.tuning.budget import Budget


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def spent_over(events: str) -> float:
    """What is spent over events, each of which takes a second: `+a` a begins to spend, `-a` ends it, `>a` a thread of a
    begins to wait, `<a` it ends that."""
    clock = Clock()
    budget = Budget(clock)
    spenders = {name: budget.spender() for name in "abc"}
    inside: dict[str, list[Any]] = {name: [] for name in "abc"}
    waiting: dict[str, list[Any]] = {name: [] for name in "abc"}
    for what, name in events.split():
        spender, those = spenders[name], inside if what in "+-" else waiting
        if what in "+>":
            those[name].append(spender.spending() if what == "+" else spender.waiting())
            those[name][-1].__enter__()
        else:
            those[name].pop().__exit__(None, None, None)
        clock.now += 1.0
    return budget.spent()


@pytest.mark.parametrize(
    ("events", "seconds"),
    [
        ("", 0.0),
        ("+a -a", 1.0),
        ("+a", 1.0),  # under way
        ("+a -a +b -b", 2.0),  # one after the other, and a second between them that is nobody's
        ("+a +b -a -b", 3.0),  # overlapping
        ("+a +b -b -a", 3.0),  # one inside the other
        ("+a +a -a -a", 3.0),
        ("+a +b -b +c -a -c +b", 6.0),
        ("+a >a <a -a", 2.0),
        ("+a >a >a <a <a -a", 2.0),  # two of its threads wait
        ("+a +b >a >a -b <a <a -a", 5.0),  # both for the other, which does not count as waiting
        ("+a +b >a >b <b <a -b -a", 6.0),
        (">a +a <a -a", 1.0),
        (">a <a", 0.0),  # whoever does not spend may wait
    ],
)
def test_time_that_several_spend_counts_once_and_none_is_lost(events, seconds):
    assert spent_over(events) == seconds


def test_threads_spend_together():
    clock = Clock()
    budget = Budget(clock)
    entered, leave = threading.Barrier(9), threading.Barrier(9)

    def spend() -> None:
        with budget.spender().spending():
            entered.wait(30)
            leave.wait(30)

    threads = [threading.Thread(target=spend) for _ in range(8)]
    for thread in threads:
        thread.start()
    entered.wait(30)
    clock.now += 5.0
    leave.wait(30)
    for thread in threads:
        thread.join(30)
    clock.now += 5.0
    assert budget.spent() == 5.0


def test_what_raises_has_spent():
    clock = Clock()
    budget = Budget(clock)
    with pytest.raises(KeyError), budget.spender().spending():
        clock.now += 2.0
        raise KeyError
    clock.now += 2.0
    assert budget.spent() == 2.0


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_a_forked_child_has_spent_nothing():
    script = """
import os
from jaxlayout.tuning.budget import process_budget
with process_budget.value.spender().spending():
    if (child := os.fork()) == 0:
        wrong = process_budget.value.spent() != 0.0
if child == 0:
    os._exit(wrong or process_budget.value.spent() != 0.0)
assert os.waitpid(child, 0)[1] == 0 and process_budget.value.spent() > 0.0
"""
    python("-c", script, timeout=60)
