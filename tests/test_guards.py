"""What is wrong never runs: bad lowerings, bad plans, bad tables, and programs that cannot be tried.

Lowerings that lie are registered for the length of a test. Nothing here waits for a verdict by timing, which is
made to come out in the rewritten function's favour where it matters.
"""

from __future__ import annotations

import gc
import importlib
import io
import itertools
import json
import logging
import math
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import measurement
from jax import lax
from jax.extend.core import Primitive

from jaxlayout import CostTable, Lowering, Outcome, Plan, TableMiss, TableWarning, auto_layout
from jaxlayout.convs.candidates import Candidate
from jaxlayout.convs.lowering import evaluate, lowerings, registered
from jaxlayout.convs.primitive import tuned_conv_p
from jaxlayout.graph.build import Mode
from jaxlayout.graph.program import equations
from jaxlayout.graph.validate import check_plan
from jaxlayout.layout import ConvDimensionNumbers, ConvLayout, KernelLayout, LayoutPolicy
from jaxlayout.measure.jobs import TOLERANCE, compile_in
from jaxlayout.measure.turns import NoTurn
from jaxlayout.runtime.progress import Silent
from jaxlayout.runtime.threads import in_own_thread
from jaxlayout.runtime.timing import Paired
from jaxlayout.table.table import ENVIRONMENT
from jaxlayout.tuning import model, pipeline, stores
from jaxlayout.tuning.budget import Budget
from jaxlayout.tuning.options import Options
from jaxlayout.verify.accept import Comparison, Verdict, accept, compare, draws, liveliest
from jaxlayout.verify.accuracy import MAX_TOLERANCE, Accuracy, accuracies

ROOT = Path(__file__).parents[1]


def conv(x, k):
    return lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW"))


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), np.float32)


X = normal(0, 2, 3, 6, 5)
K = normal(1, 4, 3, 3, 3)


def table() -> CostTable:
    return CostTable(os.environ["JAXLAYOUT_TABLE"])


def records() -> dict[str, Any]:
    """What the table holds of convolutions, by candidate without version."""
    rows = table()._select("measurements")
    return {row[2]: json.loads(row[3]) for row in rows if not row[1].startswith("transpose")}


# Lowerings that lie


class Toy(Lowering):
    """In the order of PyTorch, by XLA; subclasses go wrong somewhere."""

    name = "toy"

    def orders(self, conv):
        last = ConvLayout.channels_first(conv.rank)
        yield ConvDimensionNumbers(last, KernelLayout.oi_first(conv.rank), last)

    def apply(self, conv, dims, lhs, prepared):
        return lax.conv_general_dilated(lhs, prepared, dimension_numbers=dims.to_lax(), **conv.params)


class Wrong(Toy):
    def apply(self, conv, dims, lhs, prepared):
        return super().apply(conv, dims, lhs, prepared) * 1.001


class WrongSomewhere(Toy):
    def apply(self, conv, dims, lhs, prepared):
        return super().apply(conv, dims, lhs, prepared).at[-1, -1, -1, -1].set(0)


class WrongDtype(Toy):
    def apply(self, conv, dims, lhs, prepared):
        return super().apply(conv, dims, lhs, prepared).astype(jnp.bfloat16)


class WrongShape(Toy):
    def apply(self, conv, dims, lhs, prepared):
        return super().apply(conv, dims, lhs, prepared)[:, :, 1:]


class WrongOrder(Toy):
    def apply(self, conv, dims, lhs, prepared):
        return super().apply(conv, dims, lhs, prepared).transpose(0, 2, 3, 1)


class NotANumber(Toy):
    def apply(self, conv, dims, lhs, prepared):
        return super().apply(conv, dims, lhs, prepared) * jnp.nan


class NotANumberSomewhere(Toy):
    def apply(self, conv, dims, lhs, prepared):
        return super().apply(conv, dims, lhs, prepared).at[0, 0, 0, 0].set(jnp.inf)


class Raises(Toy):
    def apply(self, conv, dims, lhs, prepared):
        raise RuntimeError("of all the bad luck")


class RaisesInPrepare(Toy):
    def prepare(self, conv, dims, rhs):
        raise KeyError("nothing prepared")


class GivesNothing(Toy):
    def apply(self, conv, dims, lhs, prepared):
        return None


class CannotBeLowered(Toy):
    def apply(self, conv, dims, lhs, prepared):
        return unlowerable_p.bind(super().apply(conv, dims, lhs, prepared))


class CannotBeCompiled(Toy):
    def apply(self, conv, dims, lhs, prepared):
        return jax.ffi.ffi_call("no_such_target_anywhere", jax.ShapeDtypeStruct(lhs.shape, lhs.dtype))(
            super().apply(conv, dims, lhs, prepared)
        )


class Hungry(Toy):
    def apply(self, conv, dims, lhs, prepared):
        out = super().apply(conv, dims, lhs, prepared)
        many = lax.optimization_barrier(jnp.zeros((1 << 20,), jnp.float32) + out.ravel()[0])
        return out + 0 * lax.optimization_barrier(jnp.sort(many))[0]


unlowerable_p = Primitive("unlowerable")
unlowerable_p.def_abstract_eval(lambda x: x)

BAD: list[tuple[type[Toy], str, str]] = [
    (Wrong, "wrong", "error 0.00"),
    (WrongSomewhere, "wrong", "error"),
    (WrongDtype, "wrong", ""),
    (WrongShape, "wrong", ""),
    (WrongOrder, "wrong", ""),
    (NotANumber, "wrong", "error inf"),
    (NotANumberSomewhere, "wrong", "error inf"),
    (Raises, "failed", "of all the bad luck"),
    (RaisesInPrepare, "failed", "nothing prepared"),
    (GivesNothing, "failed", ""),
    (CannotBeLowered, "failed", "unlowerable"),
    (CannotBeCompiled, "failed", "no_such_target_anywhere"),
    (Hungry, "memory", "bytes of temporary memory"),
]


@pytest.mark.parametrize(("lowering", "status", "detail"), BAD, ids=lambda x: getattr(x, "__name__", ""))
def test_bad_lowerings_are_recorded_and_never_chosen(monkeypatch, lowering, status, detail):
    for stage in (pipeline, model):
        monkeypatch.setattr(stage, "available_memory", lambda device: 1 << 20)
    monkeypatch.setattr("jaxlayout.measure.jobs._race", tempting)
    monkeypatch.setattr("jaxlayout.convs.candidates.lowerings", lambda: {"toy": lowering(), "xla": lowerings()["xla"]})
    used: list[str] = []
    monkeypatch.setattr(
        "jaxlayout.convs.primitive.evaluate", lambda name, *rest: used.append(name) or evaluate(name, *rest)
    )
    with registered(lowering()):
        f = auto_layout(conv, verdict=False, memory_limit=1000.0)
        np.testing.assert_allclose(f(X, K), conv(X, K), rtol=1e-4, atol=1e-4)
        (record,) = [value for name, value in records().items() if name.startswith("toy@")]
        assert record["status"] == status
        assert detail in record["detail"]
        chosen = {mode.candidate.lowering for mode in f.plan(X, K).choices.values() if mode.candidate}
        assert chosen and "toy" not in chosen and "toy" not in used


def test_what_did_not_fit_is_measured_where_there_is_room(monkeypatch):
    """In a container, or while others took the memory: that says nothing of another machine or time."""
    monkeypatch.setattr("jaxlayout.measure.jobs._race", tempting)
    monkeypatch.setattr("jaxlayout.convs.candidates.lowerings", lambda: {"toy": Hungry(), "xla": lowerings()["xla"]})
    asked, real = [], pipeline.measure
    monkeypatch.setattr(pipeline, "measure", lambda jobs, **how: asked.extend(jobs) or real(jobs, **how))
    rooms = [(1 << 20, jnp.tanh, "memory", True), (1 << 20, jnp.sin, "memory", False), (None, jnp.cos, "ok", True)]
    with registered(Hungry()):
        for room, function, status, anew in rooms:
            for stage in (pipeline, model):
                monkeypatch.setattr(stage, "available_memory", lambda device, room=room: room)
            asked.clear()
            auto_layout(lambda x, k, function=function: function(conv(x, k)), verdict=False)(X, K)
            assert bool(asked) == anew
            (record,) = [value for name, value in records().items() if name.startswith("toy@")]
            assert record["status"] == status


@pytest.mark.parametrize(("limit", "way"), [(1.0, "modest"), (1.25, "modest"), (1000.0, "hungry")])
def test_a_derived_convolution_keeps_within_the_limit_by_itself(costs, monkeypatch, limit, way):
    """Nobody judges the program that it is in."""
    found = {"hungry": (1e3, 2**27), "modest": (2e3, 10), "xla": (1e9, 10)}
    toys = {name: type(name, (Toy,), {"name": name})() for name in ("hungry", "modest")}
    monkeypatch.setattr("jaxlayout.convs.candidates.lowerings", lambda: toys)

    def measure(jobs, **_):
        for job in jobs:
            seen = {way: found.get(way.partition("@")[0], (1.0, 0)) for way in job.alternatives}
            yield job, {way: replace(measurement(ns), temp_bytes=temp) for way, (ns, temp) in seen.items()}

    monkeypatch.setattr(pipeline, "measure", measure)
    with registered(toys["hungry"]), registered(toys["modest"]):
        plan = pipeline.choose(jax.make_jaxpr(conv)(X, K), Options(memory_limit=limit), Silent(), threading.Event())
    assert [mode.candidate.lowering for mode in plan.choices.values() if mode.candidate] == [way]


def test_compiler_options_hold_for_measuring_and_judging(monkeypatch):
    monkeypatch.setattr("jaxlayout.measure.jobs._race", tempting)
    monkeypatch.setattr("jaxlayout.convs.candidates.lowerings", lambda: {"xla": lowerings()["xla"]})
    seen = []
    stage = jax.stages.Lowered
    real = stage.compile
    monkeypatch.setattr(
        stage,
        "compile",
        lambda self, compiler_options=None: seen.append(compiler_options) or real(self, compiler_options),
    )
    options = {"xla_cpu_enable_fast_math": False}
    plain = auto_layout(conv, verdict=False, memory_limit=1000.0)
    told = auto_layout(conv, verdict=False, memory_limit=1000.0, compiler_options=options)
    plain.outcome(X, K)
    assert len(seen) > 4 and not any(seen)
    seen.clear()
    assert told.outcome(X, K).source == "measured"  # what is known of other options does not count
    assert len(seen) > 4 and all(given == options for given in seen)
    assert told.outcome(X, K).source == "stored"
    seen.clear()
    jax.make_jaxpr(told)(X, K)  # inside another jit they do not hold
    assert len(seen) > 4 and not any(seen)


def test_numerics_may_be_relaxed(monkeypatch):
    class Inexact(Toy):
        def apply(self, conv, dims, lhs, prepared):
            return super().apply(conv, dims, lhs, prepared) * (1 + 1e-5)

    monkeypatch.setattr("jaxlayout.measure.jobs._race", tempting)
    monkeypatch.setattr("jaxlayout.convs.candidates.lowerings", lambda: {"toy": Inexact()})
    with registered(Inexact()):
        strict, relaxed = (auto_layout(conv, verdict=False, numerics=n) for n in ("strict", "relaxed"))
        assert not strict.outcome(X, K).kept
        assert relaxed.outcome(X, K).kept
        np.testing.assert_allclose(relaxed(X, K), conv(X, K) * (1 + 1e-5), rtol=1e-6)
        assert not strict.outcome(X, K).kept


def tempting(trials: list[Any]) -> None:
    """In place of timing: any candidate is faster than the one written."""
    for i, trial in enumerate(trials):
        trial.samples = [1e9 if i == 0 and len(trials) > 1 else 1e3] * 9


def test_a_good_toy_is_chosen(monkeypatch):
    """The tests above would see it if a bad one were."""
    monkeypatch.setattr("jaxlayout.measure.jobs._race", tempting)
    with registered(Toy()):
        f = auto_layout(conv, verdict=False, memory_limit=1000.0)
        f(X, K)
        assert records()["toy@1:NCHW,OIHW->NCHW"]["program"] == records()["xla@1:NCHW,OIHW->NCHW"]["program"]

    class Halves(Toy):  # another program, the same numbers
        def apply(self, conv, dims, lhs, prepared):
            params = {"dimension_numbers": dims.to_lax(), **conv.params}
            return jnp.concatenate([lax.conv_general_dilated(lhs, k, **params) for k in jnp.split(prepared, 2)], 1)

    monkeypatch.setattr("jaxlayout.convs.candidates.lowerings", lambda: {"toy": Halves()})
    with registered(Halves()):
        f = auto_layout(lambda x, k: conv(x, k) + 1, verdict=False, memory_limit=1000.0, table=":memory:")
        f(X, K)
        (mode,) = f.plan(X, K).choices.values()
        assert mode.candidate.lowering == "toy"
        np.testing.assert_allclose(f(X, K), conv(X, K) + 1, rtol=1e-5, atol=1e-5)


class Turncoat(Toy):
    """Right when it is measured, wrong in the program."""

    name = "turncoat"
    how: Any = None

    def apply(self, conv, dims, lhs, prepared):
        out = super().apply(conv, dims, lhs, prepared)
        return out if Turncoat.how is None else Turncoat.how(out)


def grow(out):
    many = lax.optimization_barrier(jnp.zeros((1 << 20,), jnp.float32) + out.ravel()[0])
    return out + 0 * lax.optimization_barrier(jnp.sort(many))[0]


def fail(out):
    raise RuntimeError("not here")


@pytest.mark.parametrize(
    ("how", "cause", "words"),
    [
        (lambda out: out * 1.01, "numbers", "differs by 0.0"),
        (lambda out: out.at[0, 0, 0, 0].set(jnp.nan), "numbers", "differs by inf"),
        (lambda out: out * jnp.nan, "numbers", "differs by inf"),
        (lambda out: out[:1], "failure", "stablehlo.tanh"),
        (fail, "failure", "not here"),
        (lambda out: unlowerable_p.bind(out), "failure", "unlowerable"),
        (grow, "memory", "bytes of temporary memory"),
    ],
)
def test_what_goes_wrong_in_the_program_only(costs, monkeypatch, how, cause, words):
    monkeypatch.setenv("JAXLAYOUT_MEMORY_LIMIT", "1.25")
    monkeypatch.setattr("jaxlayout.verify.accept.LITTLE", 0)
    monkeypatch.setattr(Turncoat, "how", None)
    monkeypatch.setattr("jaxlayout.convs.candidates.lowerings", lambda: {"turncoat": Turncoat()})
    with registered(Turncoat()):
        f = auto_layout(lambda x, k: jnp.tanh(conv(x, k)))
        monkeypatch.setattr(Turncoat, "how", staticmethod(how))
        np.testing.assert_allclose(f(X, K), jnp.tanh(conv(X, K)), rtol=1e-5, atol=1e-5)
        outcome = f.outcome(X, K)
        assert not outcome.kept
        if cause == "memory":  # asked again without it, and nothing else was on offer
            assert "nothing is to be gained" in outcome.verdict.reason or words in outcome.verdict.reason
        else:
            assert outcome.verdict.cause == cause and words in outcome.verdict.reason
        assert outcome.source == "stored"
        assert not any(eqn.primitive is tuned_conv_p for eqn in equations(f.trace(X, K).jaxpr))


class Spy(Toy):
    """Says each time that it runs where that is, and multiplies by what it was told for there."""

    name = "spy"
    where = "call"
    factors: ClassVar[dict[str, float]] = {}
    ran: ClassVar[set[str]] = set()

    def apply(self, conv, dims, lhs, prepared):
        def factor() -> np.ndarray:
            Spy.ran.add(Spy.where)
            return np.float32(Spy.factors.get(Spy.where, 1.0))

        return super().apply(conv, dims, lhs, prepared) * jax.pure_callback(factor, jax.ShapeDtypeStruct((), "float32"))


@pytest.fixture
def spy(monkeypatch):
    """A lowering that is faster than all others, and knows when it is measured, judged, or run for the user."""
    real_measure, real_judge = pipeline.measure, pipeline.Pipeline.judge

    @contextmanager
    def being(what: str) -> Iterator[None]:
        before, Spy.where = Spy.where, what
        try:
            yield
        finally:
            Spy.where = before

    def measure(jobs: Any, **keywords: Any) -> Iterator[Any]:
        with being("measured"):
            yield from list(real_measure(jobs, **keywords))

    def judge(self: Any, *args: Any) -> Verdict:
        with being("judged"):
            return real_judge(self, *args)

    def race(trials: list[Any]) -> None:
        for i, trial in enumerate(trials):  # conversions are raced too, one at a time
            trial.samples = [1e9 if i == 0 and len(trials) > 1 else 1e3] * 9

    monkeypatch.setattr(pipeline, "measure", measure)
    monkeypatch.setattr(pipeline.Pipeline, "judge", judge)
    monkeypatch.setattr("jaxlayout.measure.jobs._race", race)
    monkeypatch.setattr("jaxlayout.convs.candidates.lowerings", lambda: {"spy": Spy()})
    monkeypatch.setattr(Spy, "factors", {})
    monkeypatch.setattr(Spy, "ran", set())
    monkeypatch.setenv("JAXLAYOUT_VERDICT", "0")
    monkeypatch.setenv("JAXLAYOUT_MEMORY_LIMIT", "1000")
    with registered(Spy()):
        yield Spy


NOWHERE: dict[str, float] = {}
ALONE = {"measured": 2.0, "judged": 2.0, "call": 2.0}
IN_THE_PROGRAM = {"judged": 2.0, "call": 2.0}
AMONG_OTHERS = {"call": 2.0}
"""Where a planted lowering is wrong: whenever it runs, where it is not by itself, where it is not in the function as it
is judged."""


def block(x, k):
    return jnp.tanh(conv(x, k)) + 1


@pytest.mark.parametrize(
    ("wrong", "ran"),
    [(NOWHERE, {"measured", "judged", "call"}), (ALONE, {"measured"}), (IN_THE_PROGRAM, {"measured", "judged"})],
    ids=["right", "wrong alone", "wrong in the program"],
)
def test_a_wrong_candidate_never_runs_for_the_user(spy, monkeypatch, wrong, ran):
    """In calls that are under no transformation. A right one does, so that these tests would see it."""
    spy.factors.update(wrong)

    def check(f: Any, *args: Any) -> None:
        np.testing.assert_allclose(f(*args), block(*(args if len(args) > 1 else (*args, K))), rtol=1e-5, atol=1e-5)

    f = auto_layout(block)
    for x in (X, X + 1, X, X[:1], X[:, :, 1:], 0 * X, 1e3 * X):  # the first call, later ones, other shapes
        check(f, x, K)
    f.clear_cache()
    check(f, X, K)
    check(auto_layout(block), X, K)
    check(auto_layout(jax.jit(block)), X, K)
    monkeypatch.setattr(stores, "_tables", {})  # as another process finds the table
    again = auto_layout(block)
    check(again, X, K)
    assert again.outcome(X, K).source == "stored" and again.outcome(X, K).kept is (wrong == NOWHERE)
    check(again.lower(X, K).compile(), X, K)
    check(auto_layout(lambda k, x: block(x, k)).freeze(K), X)
    assert spy.ran == ran


@pytest.mark.parametrize(
    ("wrong", "ran"),
    [(ALONE, {"measured"}), (IN_THE_PROGRAM, {"measured", "judged"}), (AMONG_OTHERS, {"measured", "judged", "call"})],
    ids=["wrong alone", "wrong in the program", "wrong among others"],
)
def test_what_is_guaranteed_under_a_jit_of_the_users(spy, wrong, ran):
    """The function is measured and judged by itself, in a branch. What the compiler makes of it and its surroundings
    is seen by nobody."""
    spy.factors.update(wrong)
    f = auto_layout(block)
    found = jax.jit(lambda x, k: 3 * f(2 * x, k))(X, K)
    assert spy.ran == ran
    right = np.allclose(found, 3 * block(2 * X, K), rtol=1e-5, atol=1e-5)
    assert right is ("call" not in ran)


@pytest.mark.parametrize(
    ("wrong", "may_run"), [(ALONE, False), (IN_THE_PROGRAM, True)], ids=["wrong alone", "wrong in the program"]
)
def test_what_is_guaranteed_of_derived_convolutions(spy, wrong, may_run):
    """They are measured one by one, and not judged."""
    spy.factors.update(wrong)
    f = auto_layout(block)
    found = jax.vmap(f)(X[None], K[None])
    assert ("call" in spy.ran) is may_run
    right = np.allclose(found[0], block(X, K), rtol=1e-5, atol=1e-5)
    assert right is not may_run


@pytest.mark.parametrize("wrong", [ALONE, IN_THE_PROGRAM], ids=["wrong alone", "wrong in the program"])
def test_what_is_guaranteed_where_a_function_must_not_be_run(spy, monkeypatch, wrong):
    """One with side effects is measured, and not judged; and where it could not be measured either, left alone."""
    spy.factors.update(wrong)
    believed = lambda policy, kind, lowering, *_, **__: 1.0 if lowering == "spy" else 1e6  # noqa: E731
    monkeypatch.setattr(LayoutPolicy, "conv_ns", believed)

    def noisy(x: Any, k: Any) -> Any:
        jax.debug.callback(lambda: None)
        return block(x, k)

    untimed = auto_layout(noisy, on_miss="heuristic").outcome(X, K)
    assert not untimed.kept and "not all of it has been measured" in untimed.verdict.reason
    auto_layout(noisy)(X, K)
    assert spy.ran == ({"measured"} if wrong == ALONE else {"measured", "call"})


def test_memory_is_looked_at_where_a_function_must_not_be_run(costs, monkeypatch):
    monkeypatch.setenv("JAXLAYOUT_MEMORY_LIMIT", "1.25")
    monkeypatch.setattr("jaxlayout.verify.accept.LITTLE", 0)
    monkeypatch.setattr("jaxlayout.convs.candidates.lowerings", lambda: {"turncoat": Turncoat()})
    monkeypatch.setattr(Turncoat, "how", staticmethod(grow))
    ran = []

    def f(x, k):
        jax.debug.callback(lambda: ran.append(1))
        return conv(x, k)

    with registered(Turncoat()):
        tuned = auto_layout(f)
        outcome = tuned.outcome(X, K)
        assert not outcome.kept and "turncoat" not in str(outcome.plan.choices)
        jax.effects_barrier()
        assert ran == []


@pytest.mark.parametrize(
    ("candidate", "kernel"),
    [("winograd2:NHWC,HWIO->NHWC", (0, 1, 2, 3)), ("xla:NHWC,OHWI->NHWC", (3, 0, 1, 2))],
    ids=["of relaxed numerics", "of a device that prefers other kernels"],
)
def test_a_pinned_plan_may_have_been_made_elsewhere(candidate, kernel):
    def f(x, k):
        dims = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=dims)

    written = (0, 1, 2, 3)
    plan = Plan(choices={(0,): Mode((written, kernel), (written,), Candidate.parse(candidate))})
    tuned, args = auto_layout(f, plan=plan), (normal(4, 1, 8, 8, 8), normal(5, 3, 3, 8, 8))
    assert tuned.outcome(*args).source == "pinned"
    np.testing.assert_allclose(tuned(*args), f(*args), rtol=1e-4, atol=1e-4)


def test_ruled_out_with_all_that_need_as_much(costs, monkeypatch):
    """Memory is short because of a lowering, and its twin would be no better."""
    found = {"hungry": (1e3, 1000), "twin": (2e3, 1000), "modest": (3e3, 10), "xla": (1e9, 2000)}
    toys = {name: type(name, (Toy,), {"name": name})() for name in ("hungry", "twin", "modest")}
    monkeypatch.setattr("jaxlayout.convs.candidates.lowerings", lambda: toys)
    tried = []

    def measure(jobs, **_):
        for job in jobs:
            seen = {way: found.get(way.partition("@")[0], (1.0, 0)) for way in job.alternatives}
            yield job, {way: replace(measurement(ns), temp_bytes=temp) for way, (ns, temp) in seen.items()}

    def judge(self, plan):
        tried.append({mode.candidate.lowering for mode in plan.choices.values() if mode.candidate})
        verdict = Verdict(kept=True, cause="untried", reason="enough")
        return verdict if "modest" in tried[-1] else replace(verdict, kept=False, cause="memory", tuned_temp=100)

    monkeypatch.setattr(pipeline, "measure", measure)
    monkeypatch.setattr(pipeline.Pipeline, "judge", judge)
    with registered(toys["hungry"]), registered(toys["twin"]), registered(toys["modest"]):
        assert auto_layout(lambda x, k: conv(x, k)).outcome(X, K).kept
    assert tried == [{"hungry"}, {"modest"}]


def test_what_is_ruled_out_in_vain_is_allowed_again(costs, monkeypatch):
    """Memory is short because of the smaller convolution, and the larger one is suspected first."""
    monkeypatch.setattr("jaxlayout.convs.candidates.lowerings", lambda: {"turncoat": Turncoat()})
    monkeypatch.setattr(Turncoat, "how", None)
    large, small = normal(5, 8, 4, 5, 5), normal(6, 2, 8, 3, 3)
    tried = []

    def judge(self, plan):
        chosen = {
            node.conv.out_features
            for node in self.graph({}).sites
            if (mode := plan.choices.get(node.path)) and mode.candidate and mode.candidate.lowering == "turncoat"
        }
        tried.append(chosen)
        if 2 in chosen:
            return Verdict(kept=False, cause="memory", reason="too much", tuned_temp=100)
        return Verdict(kept=True, cause="untried", reason="enough")

    monkeypatch.setattr(pipeline.Pipeline, "judge", judge)
    with registered(Turncoat()):
        outcome = auto_layout(lambda x, k1, k2: conv(conv(x, k1), k2)).outcome(normal(4, 2, 4, 9, 9), large, small)
    assert outcome.kept and tried == [{8, 2}, {2}, {8}]
    assert outcome.verdict.reason == "enough (of the plan that should be fastest: too much)"


def test_other_processes_may_measure_while_this_one_waits(monkeypatch, costs):
    """Many start at once, on the same functions: what the first has measured, the others need not."""
    auto_layout(conv)(X, K)
    known = list(costs)
    path = os.environ["JAXLAYOUT_TABLE"]

    def waiting(jobs, **more):
        table().import_json(exported)
        return measured(jobs, **more)

    measured = pipeline.measure
    exported = Path(path).with_name("exported.json")
    table().export_json(exported)
    monkeypatch.setattr(pipeline, "measure", waiting)
    f = auto_layout(conv, table=Path(path).with_name("another.sqlite"))
    monkeypatch.setenv("JAXLAYOUT_TABLE", str(Path(path).with_name("another.sqlite")))
    np.testing.assert_allclose(f(X, K), conv(X, K), rtol=1e-5, atol=1e-5)
    assert f.outcome(X, K).kept
    assert costs == known


def test_the_next_best_plan_is_tried_where_memory_fails(costs, monkeypatch):
    monkeypatch.setenv("JAXLAYOUT_MEMORY_LIMIT", "1.25")
    monkeypatch.setattr("jaxlayout.verify.accept.LITTLE", 0)
    monkeypatch.setattr(Turncoat, "how", staticmethod(grow))
    images = normal(5, 2, 16, 16, 8)

    def f(x, k):
        dims = ("NHWC", "OIHW", "NHWC")
        return lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=dims)

    class Native(Turncoat):
        def orders(self, conv):
            last = ConvLayout.channels_last(conv.rank)
            yield ConvDimensionNumbers(last, KernelLayout.oi_first(conv.rank), last)

    k = normal(6, 8, 8, 3, 3)
    with registered(Native()):
        tuned = auto_layout(f)
        np.testing.assert_allclose(tuned(images, k), f(images, k), rtol=1e-4, atol=1e-4)
        chosen = {mode.candidate.lowering for mode in tuned.plan(images, k).choices.values() if mode.candidate}
        assert "turncoat" not in chosen


# Comparing


def allowing(tolerance: float) -> list[Accuracy]:
    """Of one output, whose tolerance it is."""
    return [Accuracy(tolerance / TOLERANCE)]


def agree(expected: Any, found: Any, original: Any = None, args: Any = ()) -> Comparison:
    expected = jnp.asarray(expected)
    return compare(original or (lambda: [expected]), args, [expected], [jnp.asarray(found)], allowing(1e-5))


INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("expected", "found", "agrees"),
    [
        ([1.0, 2.0], [1.0, 2.00001], True),
        ([1.0, 2.0], [1.0, 2.001], False),
        ([100.0, 1e-7], [100.0, 2e-7], True),  # relative to the output as a whole
        ([1.0, NAN], [1.0, NAN], True),
        ([1.0, NAN], [1.0, 1.0], False),
        ([1.0, 1.0], [1.0, NAN], False),
        ([1.0, INF, -INF], [1.0, INF, -INF], True),
        ([1.0, INF, INF], [1.0, INF, -INF], False),
        ([NAN, NAN], [NAN, NAN], True),
        ([INF], [NAN], False),
        ([0.0, 0.0], [0.0, 0.0], True),
        ([0.0, 0.0], [0.0, 1e-3], False),
        ([], [], True),
        (np.zeros((3, 0)), np.zeros((3, 0)), True),
        (np.complex64([1 + 1j, 2]), np.complex64([1 + 1j, 2 + 1e-6j]), True),
        (np.complex64([1 + 1j, 2]), np.complex64([1 - 1j, 2]), False),
        (np.complex64([complex(NAN, 1), 2]), np.complex64([complex(NAN, 2), 2]), True),
        ([1, 2], [1, 2], True),
        ([1, 2], [1, 3], False),
        ([True, False], [True, False], True),
        ([True, False], [True, True], False),
        (np.float32([1]), np.float16([1]), False),
        (np.float32([1]), np.float32([[1]]), False),
        (np.int32([1]), np.int8([1]), False),
        (np.uint32([1, 2**32 - 1]), np.uint32([1, 2**32 - 1]), True),
    ],
)  # fmt: skip
def test_when_outputs_agree(expected, found, agrees):
    seen = agree(expected, found)
    assert (seen.reason == "") is agrees
    assert seen.difference >= 0


@pytest.mark.parametrize("size", [1e-320, 1e-200, 1e200, 1e300])
def test_numbers_whose_squares_are_out_of_range_are_compared(size):
    expected = np.array([1.0, -2.0, 0.0]) * size
    accuracy = allowing(1e-5)
    assert compare(lambda: [expected], (), [expected], [expected], accuracy) == Comparison(0.0)
    assert "differs" in compare(lambda: [expected], (), [expected], [expected * 1.5], accuracy).reason


def test_keys_agree_when_equal():
    a, b = jax.random.key(1), jax.random.key(2)
    assert compare(lambda: [a], [], [a], [a], allowing(0.0)).reason == ""
    assert "differs" in compare(lambda: [a], [], [a], [b], allowing(0.0)).reason


def test_any_answer_agrees_on_a_tie_and_no_other():
    def original(x):
        return [jnp.argmax(x, axis=-1), jnp.sum(x, axis=-1)]

    x = jnp.asarray([[1.0, 1.0, 0.0], [3.0, 1.0, 0.0]])
    expected, accuracy = original(x), allowing(1e-5) * 2
    assert compare(original, [x], expected, [jnp.asarray([1, 0]), expected[1]], accuracy).reason == ""
    assert "no tie" in compare(original, [x], expected, [jnp.asarray([0, 1]), expected[1]], accuracy).reason


def test_what_the_original_moves_by_itself_is_allowed():
    def original(x):
        return [1e4 * (x - 1.0)]

    x = 1.0 + 1e-3 * normal(3, 100)
    expected = original(x)
    rms = float(jnp.sqrt(jnp.mean(expected[0] ** 2)))
    near, far = expected[0].at[3].add(1e-3 * rms / 10), expected[0].at[3].add(rms / 100)
    accuracy = allowing(4e-7)
    assert compare(original, [x], expected, [near], accuracy) == Comparison(0.0, noise=(0,))
    assert "allowed" in compare(original, [x], expected, [far], accuracy).reason


def test_an_output_that_is_noise_is_told_as_such():
    """What a bias in front of a normalisation is worth: nothing, and its gradient is what rounding leaves."""

    def loss(bias, k, x):
        y = conv(x, k) + bias[:, None, None]
        y = (y - y.mean((0, 2, 3), keepdims=True)) / jnp.sqrt(y.var((0, 2, 3), keepdims=True) + 1e-5)
        return jnp.square(y * jnp.arange(5.0)).sum()

    grad, args = jax.jit(jax.grad(loss, (0, 1))), (normal(4, 4), K, X)
    expected = grad(*args)
    seen = compare(grad, args, expected, (-expected[0], expected[1]), accuracies(jax.make_jaxpr(grad)(*args)))
    assert seen == Comparison(0.0, noise=(0,))


def test_a_large_network_in_half_precision_has_no_free_pass():
    """c*eps*sqrt(K) would allow 100% of the rms: K is 8 million."""
    half = float(jnp.finfo(jnp.bfloat16).eps)
    assert Accuracy(half, 8e6).tolerance() == MAX_TOLERANCE == Accuracy(half, 4.0).tolerance(relax=100.0)
    assert Accuracy(half, 4.0).tolerance() == 6 * half


# What outputs are compared on


def test_a_float32_output_that_is_wrong_beside_a_bfloat16_one_is_refused(costs, monkeypatch):
    def f(x, k):
        return conv(x.astype(jnp.bfloat16), k.astype(jnp.bfloat16)), conv(x, k)

    monkeypatch.setattr(Turncoat, "how", staticmethod(lambda out: out if out.dtype == jnp.bfloat16 else out * 1.07))
    monkeypatch.setattr("jaxlayout.convs.candidates.lowerings", lambda: {"turncoat": Turncoat()})
    with registered(Turncoat()):
        tuned = auto_layout(f)
        np.testing.assert_allclose(tuned(X, K)[1], conv(X, K), rtol=1e-5, atol=1e-5)
        verdict = tuned.outcome(X, K).verdict
        assert verdict.cause == "numbers" and verdict.reason.startswith("output 1 differs by")


def test_live_outputs_are_sought():
    ran = []

    def run(x):
        ran.append(x)
        return [jnp.asarray(x), jnp.asarray(3)]

    dead, half, alive = [np.zeros(3)], [np.float32([1, NAN])], [np.arange(3.0)]
    assert liveliest(run, [dead, half, alive, dead]) is alive and len(ran) == 3
    assert liveliest(run, [dead, half]) is dead
    assert liveliest(lambda x, y: [jnp.asarray(x), jnp.asarray(y)], [(*dead, *dead), (*alive, *dead)]) == (
        *alive,
        *dead,
    )


def test_zeros_prove_nothing(costs, monkeypatch):
    """The user's first call is often on zeros, on which every wrong convolution is right."""
    monkeypatch.setattr("jaxlayout.convs.candidates.lowerings", lambda: {"turncoat": Turncoat()})
    monkeypatch.setattr(Turncoat, "how", staticmethod(lambda out: 2 * out))
    with registered(Turncoat()):
        f = auto_layout(conv)
        f(0 * X, 0 * K)
        assert f.outcome(X, K).verdict.cause == "numbers"
        np.testing.assert_allclose(f(X, K), conv(X, K), rtol=1e-5, atol=1e-5)


def test_draws_are_of_what_was_asked_for():
    shapes = [
        jax.ShapeDtypeStruct((2, 3), jnp.bfloat16),
        jax.ShapeDtypeStruct((4,), jnp.complex64),
        jax.ShapeDtypeStruct((), jnp.float32),
        jax.ShapeDtypeStruct((2, 2), jnp.int8),
        jax.ShapeDtypeStruct((0, 3), jnp.float32),
        jax.ShapeDtypeStruct((2,), jnp.bool_),
        jax.ShapeDtypeStruct((3,), jax.random.key(0).dtype),
        jax.ShapeDtypeStruct((), jax.random.key(0, impl="rbg").dtype),
        jax.ShapeDtypeStruct((0,), jax.random.key(0).dtype),
    ]
    drawn = list(draws(shapes))
    assert len(drawn) == 3
    for args in drawn:
        assert [(x.shape, x.dtype) for x in args] == [(s.shape, s.dtype) for s in shapes]


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
    f = auto_layout(lambda x, k: conv(x, k) + 1)
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


def no_measuring(*_: Any, **__: Any) -> Iterator[Any]:
    raise AssertionError("measured")


def test_on_miss_error_names_the_signature():
    f = auto_layout(conv, on_miss="error")
    with pytest.raises(TableMiss, match=r"lacks 1 convolutions, the first: lhs=2x3\[6, 5\]float32"):
        f(X, K)


def test_on_miss_error_is_content_with_what_is_known(costs):
    auto_layout(conv)(X, K)
    f = auto_layout(conv, on_miss="error")
    np.testing.assert_allclose(f(X, K), conv(X, K), rtol=1e-5, atol=1e-5)
    assert f.outcome(X, K).kept
    plus_one = auto_layout(lambda x, k: conv(x, k) + 1, on_miss="error")  # another program of the same convolution
    np.testing.assert_allclose(plus_one(X, K), conv(X, K) + 1, rtol=1e-5, atol=1e-5)
    assert plus_one.outcome(X, K).kept


@pytest.mark.parametrize("options", [{"on_miss": "heuristic"}, {"time_budget": 0.0}])
def test_heuristics_measure_nothing(monkeypatch, options):
    monkeypatch.setattr(pipeline, "measure", no_measuring)

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


def test_a_budget_is_for_the_process(costs, monkeypatch):
    monkeypatch.setattr(pipeline.process_budget, "spent", lambda: 100.0)
    assert auto_layout(conv, time_budget=99.0).outcome(X, K).source == "heuristic"
    assert costs == []
    assert auto_layout(conv, time_budget=101.0).outcome(X, K).source == "measured"


def test_waiting_for_a_turn_spends_nothing(costs, monkeypatch):
    now = [0.0]
    budget, real = Budget(lambda: now[0]), pipeline.measure

    def measure(jobs, *, turns, **how):
        with turns.waiting():
            now[0] += 1000.0
        for one in real(jobs, turns=turns, **how):
            now[0] += 1.0
            yield one

    monkeypatch.setattr(pipeline, "process_budget", budget)
    monkeypatch.setattr(pipeline, "measure", measure)
    assert auto_layout(conv, time_budget=300.0).outcome(X, K).source == "measured"
    assert now[0] > 1000.0 and budget.spent() == now[0] % 1000.0 == len(costs)


def test_verdict_by_timing(costs, monkeypatch):
    monkeypatch.setenv("JAXLAYOUT_VERDICT", "1")
    monkeypatch.setattr(pipeline, "OPTION_SETS", {})

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


def test_nothing_but_zeros_is_equal_to_zeros_alone():
    zeros, next_to = np.zeros(4, np.float32), np.full(4, 1e-9, np.float32)
    for found, agrees in ((zeros, True), (-zeros, True), (next_to, False)):
        seen = compare(lambda x: [zeros], [jnp.ones(4)], [zeros], [found], [Accuracy()])
        assert (seen.reason == "") == agrees, seen


# Plans


def test_a_plan_is_saved_loaded_and_pinned(forced, monkeypatch, tmp_path):
    f = auto_layout(conv)
    f(X, K)
    f.plan(X, K).save(tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    assert plan == f.plan(X, K) and not plan.trivial
    monkeypatch.setattr(pipeline, "measure", no_measuring)
    monkeypatch.setattr(pipeline.Pipeline, "judge", no_measuring)
    pinned = auto_layout(conv, plan=plan)
    with monkeypatch.context() as no_table:
        for stage in (pipeline, model, stores):
            no_table.setattr(stage, "open_table", no_measuring)
        assert str(pinned.trace(X, K).jaxpr) == str(f.trace(X, K).jaxpr)
        np.testing.assert_array_equal(pinned(X, K), f(X, K))
        assert pinned.outcome(X, K).source == "pinned" and pinned.outcome(X, K).kept
        assert str(jax.make_jaxpr(pinned)(X, K)) == str(jax.make_jaxpr(auto_layout(conv, plan=plan))(X, K))
    assert "pinned" in str(pinned.explain(X, K))  # with the times of the table, if it has any


@pytest.mark.parametrize(
    "data",
    [
        None,
        3,
        "plan",
        [],
        {},
        {"format": 99},
        {"format": 2, "choices": 3},
        {"format": 2, "choices": [[[0], [[0, 0]], [[0]], None]], "conversions": []},
        {"format": 2, "choices": [[[0], [[0]], [[0]], "xla"]], "conversions": []},
        {"format": 2, "choices": [[[0], [[0]], [[0]], "xla:NCHW"]], "conversions": []},
        {"format": 2, "choices": [], "conversions": [[1]]},
        {"format": 2, "choices": [], "conversions": [], "predicted_ns": "fast"},
    ],
)
def test_what_is_no_plan(tmp_path, data):
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(ValueError):
        Plan.load(tmp_path / "plan.json")


def test_a_pinned_plan_fits_other_sizes(forced):
    plan = auto_layout(conv).plan(X, K)
    pinned = auto_layout(conv, plan=plan)
    np.testing.assert_allclose(pinned(X[:1, :, 1:], K), conv(X[:1, :, 1:], K), rtol=1e-5, atol=1e-5)
    assert pinned.outcome(X[:1, :, 1:], K).kept


def pointwise(x, k):
    return lax.conv_general_dilated(x, k, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def nchw_chain(x, k):
    return jnp.max(jnp.tanh(conv(x, k)), axis=1)


def another_axis(x, k):
    return jnp.max(jnp.tanh(conv(x, k)), axis=3)


def another_chain(x, k):
    return jnp.tanh(jnp.sort(conv(x, k), axis=1))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda choices, mode: {(7,): mode}, r"no equation \(7,\)"),
        (lambda choices, mode: {(0, 3): mode}, r"no equation \(0, 3\)"),
        (lambda choices, mode: {(1,): mode}, r"equation \(1,\) tanh.* has other operands"),
        (lambda choices, mode: {(0,): Mode(mode.operands[:1], mode.results, mode.candidate)}, "has other operands"),
        (lambda choices, mode: {(0,): Mode(mode.results * 2, mode.results, mode.candidate)}, "other orders than its"),
        (lambda choices, mode: {(0,): Mode(mode.operands, mode.results)}, r"conv_general_dilated.*no rule"),
        (lambda choices, mode: {(1,): Mode(mode.results, mode.results, mode.candidate)}, "not a convolution"),
        (lambda choices, mode: {(1,): Mode(((0, 1, 2, 3),), mode.results)}, "cannot have the orders"),
        (lambda choices, mode: {(2,): Mode(mode.results, ((1, 0, 2),))}, "reduce_max.*cannot have the orders"),
    ],
)
def test_a_pinned_plan_that_does_not_fit(forced, change, words):
    plan = auto_layout(nchw_chain).plan(X, K)
    assert plan.choices.keys() == {(0,), (1,), (2,)}
    mode = plan.choices[(0,)]
    with pytest.raises(ValueError, match=f"does not fit: .*{words}"):
        auto_layout(nchw_chain, plan=Plan(choices=change(plan.choices, mode)))(X, K)


@pytest.mark.parametrize("other", [another_axis, another_chain, lambda x, k: jnp.tanh(x), lambda x, k: conv(x, k)])
def test_a_plan_for_another_version_of_a_program_does_not_fit(forced, other):
    plan = auto_layout(nchw_chain).plan(X, K)
    with pytest.raises(ValueError, match="does not fit"):
        auto_layout(other, plan=plan)(X, K)


def test_a_plan_whose_lowering_is_gone_or_does_not_apply(costs, monkeypatch):
    monkeypatch.setattr("jaxlayout.convs.candidates.lowerings", lambda: {"turncoat": Turncoat()})
    monkeypatch.setattr(Turncoat, "how", None)
    with registered(Turncoat()):
        plan = auto_layout(conv).plan(X, K)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="cannot be computed by turncoat:NCHW"):
        auto_layout(conv, plan=plan)(X, K)
    one, three = normal(7, 1, 1, 5, 4), normal(8, 3, 3, 5, 4)
    images = normal(9, 2, 6, 6, 5)
    dims = ConvDimensionNumbers(ConvLayout("NHWC"), KernelLayout("HWIO"), ConvLayout("NHWC"))
    identity = (0, 1, 2, 3)
    dot = Plan(choices={(0,): Mode((identity, identity), (identity,), Candidate("dot", dims))})
    np.testing.assert_allclose(
        auto_layout(pointwise, plan=dot)(images, one), pointwise(images, one), rtol=1e-5, atol=1e-5
    )
    with pytest.raises(ValueError, match=r"equation \(0,\) conv_general_dilated.*cannot be computed by dot:NHWC"):
        auto_layout(pointwise, plan=dot)(images, three)


def test_every_plan_that_the_solver_makes_fits(forced):
    def f(x, k):
        y = jax.nn.relu(conv(x, k)).reshape(2, 4, 30).reshape(2, 4, 6, 5)
        y = lax.reduce_window(y, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 1, 1), "SAME")
        return jnp.concatenate([y, conv(jnp.transpose(x, (0, 1, 3, 2)), k).transpose(0, 1, 3, 2)], 1).mean((2, 3))

    tuned = auto_layout(f)
    assert len(tuned.plan(X, K).choices) > 5
    check_plan(jax.make_jaxpr(f)(X, K), tuned.plan(X, K))


def test_an_export_runs_where_there_is_no_jaxlayout(forced, tmp_path):
    f = auto_layout(conv)
    exported = jax.export.export(f)(X, K)
    assert "transpose" in exported.mlir_module()
    (tmp_path / "export").write_bytes(exported.serialize())
    np.save(tmp_path / "expected.npy", f(X, K))
    script = """
import sys
sys.modules["jaxlayout"] = None
import jax, numpy as np
from pathlib import Path
here = Path(sys.argv[1])
call = jax.export.deserialize(bytearray((here / "export").read_bytes())).call
x = np.random.default_rng(0).standard_normal((2, 3, 6, 5)).astype("f")
k = np.random.default_rng(1).standard_normal((4, 3, 3, 3)).astype("f")
np.testing.assert_allclose(call(x, k), np.load(here / "expected.npy"), rtol=1e-6, atol=1e-6)
print("right")
"""
    assert python(script, tmp_path).stdout == "right\n"


def python(script: str, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", script, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


# The table


CALL = """
import logging, sys
import jax, numpy as np
from jax import lax
import jaxlayout
from jaxlayout.tuning import pipeline
from jaxlayout.convs import candidates, lowering
candidates.lowerings = lambda: {"xla": lowering.lowerings()["xla"]}  # enough
calls = []
real_measure, real_judge = pipeline.measure, pipeline.Pipeline.judge
pipeline.measure = lambda jobs, **k: calls.extend(j.key for j in jobs) or real_measure(jobs, **k)
pipeline.Pipeline.judge = lambda self, *plan: calls.append("judge") or real_judge(self, *plan)

@jaxlayout.auto_layout
def f(x, k, scale):
    y = jax.nn.relu(lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW")))
    return {"mean": y.mean((2, 3)) * scale, "y": y}

x = np.random.default_rng(0).standard_normal((2, 3, 6, 5)).astype("f")
k = np.random.default_rng(1).standard_normal((4, 3, 3, 3)).astype("f")
out = f(x, k, 2.0)
np.testing.assert_allclose(out["y"], f.__wrapped__(x, k, 2.0)["y"], rtol=1e-5, atol=1e-5)
lowered = f.lower(x, k, 2.0)
print(len(calls), f.outcome(x, k, 2.0).source)
"""


def test_a_second_process_neither_measures_nor_judges(tmp_path):
    first = python(CALL, PYTHONHASHSEED="1").stdout.split()
    assert int(first[0]) >= 1 and first[1] == "stored"
    moved = tmp_path / "moved.py"  # to other lines of another file
    moved.write_text("\n\n\n" + CALL)
    script = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
    assert python(script, moved, PYTHONPATH=str(ROOT), PYTHONHASHSEED="2").stdout.split() == ["0", "stored"]
    assert table().counts()["plans"] == 1


def test_a_damaged_table(costs):
    path = Path(os.environ["JAXLAYOUT_TABLE"])
    path.write_bytes(b"this is no database" * 1000)
    f = auto_layout(conv)
    with pytest.warns(TableWarning, match="set aside"):
        out = f(X, K)
    np.testing.assert_allclose(out, conv(X, K), rtol=1e-5, atol=1e-5)
    assert f.outcome(X, K).kept
    assert table().counts()["plans"] == 1


def test_a_table_of_another_schema(costs):
    path = Path(os.environ["JAXLAYOUT_TABLE"])
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE plans (something, quite, different)")
    connection.close()
    f = auto_layout(conv)
    with pytest.warns(TableWarning):
        out = f(X, K)
    np.testing.assert_allclose(out, conv(X, K), rtol=1e-5, atol=1e-5)
    assert f.outcome(X, K).kept


def test_a_table_that_cannot_be_written(costs, tmp_path):
    (tmp_path / "file").write_text("in the way")
    f = auto_layout(conv, table=tmp_path / "file" / "table.sqlite")
    with pytest.warns(TableWarning, match="for this process only"):
        out = f(X, K)
    np.testing.assert_allclose(out, conv(X, K), rtol=1e-5, atol=1e-5)
    asked = len(costs)
    assert f.outcome(X, K).kept and f.outcome(X, K).source == "stored"
    assert len(costs) == asked  # this process remembers


def test_a_table_that_can_only_be_read(costs, monkeypatch):
    f = auto_layout(conv)
    f(X, K)
    asked = len(costs)
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda name, *a, **k: connect(name.replace("=rwc", "=ro"), *a, **k))
    monkeypatch.setattr(stores, "_tables", {})
    again = auto_layout(conv)
    np.testing.assert_array_equal(again(X, K), f(X, K))  # as it was deployed: without a warning
    assert again.outcome(X, K).source == "stored" and len(costs) == asked
    other = auto_layout(lambda x, k: conv(x[:1], k))
    with pytest.warns(TableWarning, match="cannot be written"):
        out = other(X, K)
    np.testing.assert_allclose(out, conv(X[:1], K), rtol=1e-5, atol=1e-5)
    assert other.outcome(X, K).kept and other.outcome(X, K).source == "stored"


def test_a_stored_plan_that_cannot_be_read_is_made_anew(costs, caplog):
    f = auto_layout(conv)
    f(X, K)
    ((env, function, skeleton, sizes, _),) = (row for row in table()._select("plans") if row[1] != ENVIRONMENT)
    for payload in ('{"plan": 1}', "[]", '"text"', '{"plan": {"format": 99}, "verdict": {}}'):
        table().store_plan(env, function, skeleton, sizes, payload)
        assert f.outcome(X, K).source == "measured"
        assert f.outcome(X, K).source == "stored"
    assert "made anew: not an outcome: a list of 0" in caplog.text


def test_outcomes_survive_json(costs):
    outcome = auto_layout(conv).outcome(X, K)
    assert Outcome.from_json(json.loads(json.dumps(outcome.to_json()))) == outcome
    for bad in (None, 3, {}, {"plan": {}}, outcome.to_json() | {"more": 1}):
        with pytest.raises(ValueError, match="not a"):
            Outcome.from_json(bad)


def test_verdicts_that_name_no_noise_are_read():
    """As they were stored until they did."""
    verdict = Verdict(kept=True, reason="faster", difference=1e-6, noise=(0, 3))
    data = json.loads(json.dumps(verdict.to_json()))
    assert Verdict.from_json(data) == verdict
    assert Verdict.from_json({name: value for name, value in data.items() if name != "noise"}) == replace(
        verdict, noise=()
    )
    for bad in (3, "03", [-1], [0.5], [True], {"0": 1}):
        with pytest.raises(ValueError, match="noise"):
            Verdict.from_json(data | {"noise": bad})


def test_different_options_have_different_plans(costs):
    auto_layout(conv)(X, K)
    for options in ({"memory_limit": 999.0}, {"numerics": "relaxed"}, {"verdict": True}):
        assert auto_layout(conv, **options).outcome(X, K).source == "measured"
    assert auto_layout(conv, time_budget=5.0).outcome(X, K).source == "stored"


def test_a_release_plans_anew_from_what_was_measured(costs, monkeypatch):
    auto_layout(conv)(X, K)
    asked = len(costs)
    monkeypatch.setattr(pipeline, "__version__", "99.0")
    assert auto_layout(conv).outcome(X, K).source == "measured"
    assert auto_layout(conv).outcome(X, K).source == "stored"
    assert len(costs) == asked


def test_a_rule_that_is_another_has_other_plans_and_times(costs, monkeypatch):
    def pooled(x, k):
        return lax.reduce_window(conv(x, k), -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")

    x = normal(4, 2, 3, 128, 128)
    rules, pooling = importlib.import_module("jaxlayout.graph.rules.base"), lax.reduce_window_max_p
    auto_layout(pooled)(x, K)
    asked = len(costs)
    monkeypatch.setitem(rules._table, pooling, replace(rules.rule_for(pooling), version=2))
    assert auto_layout(pooled).outcome(x, K).source == "measured"
    (timed,) = (key for key in costs[:asked] if key.startswith("reduce_window_max@1 "))
    assert costs[asked:] == [timed.replace("@1", "@2")]


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
    monkeypatch.setattr("jaxlayout.convs.candidates.lowerings", lambda: {"xla": lowerings()["xla"]})
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
