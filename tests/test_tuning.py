"""What tuning decides: what it leaves alone, what it does on a miss, when it ends, and what it tells meanwhile."""

from __future__ import annotations

import gc
import io
import itertools
import logging
import os
import signal
import sys
import threading
import time
import weakref
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import K, X, conv, normal
from jax import lax
from made_up import not_asked
from toys import offer, table

from jaxlayout import TableMiss, auto_layout
from jaxlayout.measure.compiled import compile_in
from jaxlayout.measure.turns import NoTurn
from jaxlayout.runtime.threads import in_own_thread
from jaxlayout.runtime.timing import Paired
from jaxlayout.tuning import pipeline
from jaxlayout.tuning.budget import Budget
from jaxlayout.tuning.options import Options
from jaxlayout.verify.accept import Verdict, accept, compare
from jaxlayout.verify.accuracy import Accuracy

# Programs that are left alone, and why


def test_symbolic_shapes_are_left_alone(forced):
    f = auto_layout(conv)
    b, h = jax.export.symbolic_shape("b, h")
    abstract = jax.ShapeDtypeStruct((b, 3, h, 5), jnp.float32), jax.ShapeDtypeStruct(K.shape, K.dtype)
    exported = jax.export.export(f)(*abstract)
    np.testing.assert_allclose(exported.call(X, K), conv(X, K), rtol=1e-5, atol=1e-5)
    outcome = f.outcome(*abstract)
    assert not outcome.kept and outcome.verdict.reason == "its shapes are symbolic"
    assert "symbolic" in str(f.explain(*abstract))
    assert forced == []


def test_empty_programs_are_tuned_or_not_but_right():
    f = auto_layout(lambda x, k: conv(x, k) + 1, verdict=False)
    for x, k in ((X[:0], K), (X[:, :, :0], K), (X, K[:0]), (X[:, :0], K[:, :0])):
        np.testing.assert_array_equal(f(x, k), conv(x, k) + 1)


def test_whatever_goes_wrong_in_tuning_leaves_the_program_as_it_is(monkeypatch, caplog):
    def broken(*_):
        raise ZeroDivisionError("the solver is tired")

    monkeypatch.setattr(pipeline, "solve", broken)
    f = auto_layout(conv, time_budget=0.0)
    np.testing.assert_allclose(f(X, K), conv(X, K))
    assert "the solver is tired" in f.outcome(X, K).verdict.reason
    assert "tuning failed" in caplog.text
    caplog.clear()
    monkeypatch.undo()


# What to do on a miss


def test_on_miss_error_names_the_signature():
    f = auto_layout(conv, on_miss="error")
    with pytest.raises(TableMiss, match=r"lacks 1 convolutions, the first: lhs=2x3\[6, 5\]float32"):
        f(X, K)


def test_on_miss_error_is_content_with_what_is_known(forced):
    auto_layout(conv)(X, K)
    f = auto_layout(conv, on_miss="error")
    np.testing.assert_allclose(f(X, K), conv(X, K), rtol=1e-5, atol=1e-5)
    assert f.outcome(X, K).kept
    plus_one = auto_layout(lambda x, k: conv(x, k) + 1, on_miss="error")  # another program of the same convolution
    np.testing.assert_allclose(plus_one(X, K), conv(X, K) + 1, rtol=1e-5, atol=1e-5)
    assert plus_one.outcome(X, K).kept


@pytest.mark.parametrize("options", [{"on_miss": "heuristic"}, {"time_budget": 0.0}])
def test_heuristics_measure_nothing(monkeypatch, options):
    monkeypatch.setattr(pipeline, "measure", not_asked)

    def depthwise(x, k):
        return lax.conv_general_dilated(
            x, k, (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW"), feature_group_count=16
        )

    x, k = normal(2, 2, 16, 12, 12), normal(3, 16, 1, 3, 3)
    f = auto_layout(depthwise, verdict=False, memory_limit=1000.0, **options)
    np.testing.assert_allclose(f(x, k), depthwise(x, k), rtol=1e-4, atol=1e-4)
    outcome = f.outcome(x, k)
    assert outcome.source == "heuristic"
    assert outcome.kept and not outcome.plan.trivial  # the policy knows depthwise convolutions to be slow in XLA
    assert table().counts() == {"measurements": 0, "plans": 0, "unsaved": 0}  # beliefs are not kept
    monkeypatch.setattr(pipeline.Pipeline, "run", None)
    assert f.outcome(x, k) == outcome  # but by this process, which would come to the same again


def test_a_budget_is_for_the_process(forced, monkeypatch):
    monkeypatch.setattr(pipeline.process_budget.value, "spent", lambda: 100.0)
    assert auto_layout(conv, time_budget=99.0).outcome(X, K).source == "heuristic"
    assert forced == []
    assert auto_layout(conv, time_budget=101.0).outcome(X, K).source == "measured"


def test_waiting_for_a_turn_spends_nothing(forced, monkeypatch):
    now = [0.0]
    budget, real = Budget(lambda: now[0]), pipeline.measure

    def measure(jobs, *, turns, **how):
        with turns.waiting():
            now[0] += 1000.0
        for one in real(jobs, turns=turns, **how):
            now[0] += 1.0
            yield one

    monkeypatch.setattr(pipeline.process_budget, "value", budget)
    monkeypatch.setattr(pipeline, "measure", measure)
    assert auto_layout(conv, time_budget=300.0).outcome(X, K).source == "measured"
    assert now[0] > 1000.0 and budget.spent() == now[0] % 1000.0 == len(forced)


def test_verdict_by_timing(costs, monkeypatch):
    monkeypatch.setenv("JAXLAYOUT_VERDICT", "1")
    monkeypatch.setattr(pipeline, "COMPILER_OPTION_SETS", {})

    def verdict(bias: int, tuned_ns: float) -> Verdict:
        monkeypatch.setattr("jaxlayout.verify.race.in_pairs", lambda *_: itertools.repeat((1e6, tuned_ns)))
        return auto_layout(lambda x, k: conv(x, k) + bias).outcome(X, K).verdict

    seen = verdict(1, 2e6)
    assert not seen.kept and seen.cause == "time" and seen.ratio == 0.5 and seen.reason.startswith("not faster: 0.50x")
    seen = verdict(2, 0.5e6)
    assert seen.kept and seen.ratio == 2.0
    assert (seen.original_ns, seen.tuned_ns) == (1e6, 0.5e6)
    seen = verdict(3, 1e6)
    assert not seen.kept and seen.reason.startswith("not faster: 1.00x")


def test_the_machine_is_asked_for_while_two_are_timed_and_at_no_other_time(monkeypatch):
    seen = []

    @contextmanager
    def turn():
        seen.append("taken")
        yield
        seen.append("given back")

    def told(name, real):
        return lambda *args: seen.append(name) or real(*args)

    monkeypatch.setattr("jaxlayout.verify.accept.compare", told("compared", compare))
    monkeypatch.setattr("jaxlayout.verify.accept.race", told("timed", lambda *_: (False, Paired.of([(1e6, 1e6)] * 3))))
    before, after = (compile_in("entry", lambda x: [x + 1], [X]) for _ in range(2))
    rest = {"accuracy": [Accuracy()], "memory_limit": 1.0, "turn": turn}
    assert accept(before, after, [X], **rest).cause == "time"
    assert [name for name, _ in itertools.groupby(seen)] == ["compared", "taken", "timed", "given back"]
    seen.clear()
    assert accept(before, after, [X], timed=False, **rest).kept
    assert seen == ["compared"]


def test_an_interrupt_ends_a_race(monkeypatch):
    stop, calls = threading.Event(), []

    def race(first, second):
        for _ in range(3):
            calls.append(first())
        stop.set()
        second()

    monkeypatch.setattr("jaxlayout.verify.accept.race", race)
    before, after = (compile_in("entry", lambda x: [x + 1], [X]) for _ in range(2))
    with pytest.raises(NoTurn, match="interrupted while two programs were timed"):
        accept(before, after, [X], accuracy=[Accuracy()], memory_limit=1.0, stop=stop)
    assert len(calls) == 3


def test_whatever_a_signals_handler_raises_ends_tuning():
    class Late(Exception):
        pass

    def ring(*_: Any) -> None:
        raise Late

    def work(stop: threading.Event) -> bool:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        ended.append(stop.wait(60))
        return True

    ended: list[bool] = []
    handler = signal.signal(signal.SIGALRM, ring)
    try:
        with pytest.raises(Late):
            in_own_thread(work)
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert ended == [True]


def test_arrays_that_are_closed_over_are_let_go(costs):
    held = jnp.ones(3)
    auto_layout(lambda x, k, held=held: conv(x, k) + held.sum())(X, K)
    there = weakref.ref(held)
    del held
    gc.collect()
    assert there() is None


# Interruption


def test_an_interrupted_tuning_goes_on_from_there(monkeypatch):
    def two(x, k):
        return conv(conv(x, k), jnp.ones((2, 4, 1, 1)))

    jobs: list[str] = []
    interrupted = threading.Event()
    real = pipeline.measure

    def measure(these, **keywords):
        for job, found in real(these, **keywords):
            jobs.append(job.key)
            if not interrupted.is_set():
                interrupted.set()
                os.kill(os.getpid(), signal.SIGINT)  # as Ctrl-C does
                time.sleep(0.5)
            yield job, found

    monkeypatch.setattr(pipeline, "measure", measure)
    offer(monkeypatch, "xla")
    f = auto_layout(two, verdict=False)
    with pytest.raises(KeyboardInterrupt, match="tuning two was interrupted; what was measured is kept"):
        f(X, K)
    assert len(jobs) == 1
    assert table().counts()["plans"] == 0 and table().counts()["measurements"] >= 1
    jobs_before = list(jobs)
    np.testing.assert_allclose(f(X, K), two(X, K), rtol=1e-4, atol=1e-4)
    assert jobs_before[0] not in jobs[1:] and len(jobs) > 1
    assert f.outcome(X, K).source == "stored"


# Progress


def test_progress_on_a_terminal_only(costs, monkeypatch, capsys):
    f = auto_layout(conv)
    f(X, K)
    assert capsys.readouterr() == ("", "")

    class Terminal:
        text = ""

        def isatty(self):
            return True

        def write(self, text):
            Terminal.text += text

        def flush(self):
            pass

        encoding = "utf-8"

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    auto_layout(conv).outcome(X, K)  # stored: nothing to show
    assert Terminal.text == ""
    auto_layout(lambda x, k: conv(x, k) + 1).outcome(X, K)
    assert "jaxlayout <lambda>: judging" in Terminal.text
    closed, simple = io.StringIO(), SimpleNamespace(write=lambda text: None, flush=lambda: None)
    closed.close()
    for i, stream in enumerate((None, closed, simple)):
        monkeypatch.setattr(sys, "stderr", stream)
        auto_layout(lambda x, k, i=i: conv(x, k) + 2 + i).outcome(X, K)


def test_nothing_is_printed_or_warned(costs, capfd, recwarn):
    auto_layout(conv)(X, K)
    assert capfd.readouterr() == ("", "") and not recwarn.list


def test_the_logger_is_the_librarys(costs, caplog):
    with caplog.at_level(logging.DEBUG):
        auto_layout(conv)(X, K)
    assert {r.name for r in caplog.records if "jaxlayout" in r.pathname} <= {"jaxlayout"}


def test_options_are_one_frozen_value():
    with pytest.raises(AttributeError):
        Options().verdict = False  # type: ignore[misc]
    assert hash(Options()) == hash(Options())
