"""What is wrong never runs for the user: lowerings that lie, alone or in the program, and those that need much memory.

Lowerings that lie are registered for the length of a test. Nothing here waits for a verdict by timing, which is
made to come out in the rewritten function's favour where it matters.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import K, X, conv, lowerings_used, normal
from jax import lax
from jax.extend.core import Primitive
from made_up import made_up, measurement
from tables import as_another_process
from toys import Toy, Turncoat, grow, offer, records, table, tempt

from jaxlayout import Plan, auto_layout
from jaxlayout.convs.candidates import Candidate
from jaxlayout.convs.lowering import registered
from jaxlayout.convs.primitive import tuned_conv_p
from jaxlayout.graph.build import Mode
from jaxlayout.graph.program import equations
from jaxlayout.layout import ConvDimensionNumbers, ConvLayout, KernelLayout, LayoutPolicy
from jaxlayout.runtime.progress import Silent
from jaxlayout.tuning import model, pipeline
from jaxlayout.tuning.options import Options
from jaxlayout.verify.accept import Verdict


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
    tempt(monkeypatch)
    offer(monkeypatch, lowering(), "xla")
    used = lowerings_used(monkeypatch)
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
    tempt(monkeypatch)
    offer(monkeypatch, Hungry(), "xla")
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
    found = {"hungry": measurement(1e3, temp_bytes=2**27), "modest": measurement(2e3, temp_bytes=10)}
    measure = made_up(lambda name, _: found.get(name.partition("@")[0], 1.0), measurement(1e9, temp_bytes=10))
    toys = {name: type(name, (Toy,), {"name": name})() for name in ("hungry", "modest")}
    offer(monkeypatch, *toys.values())

    monkeypatch.setattr(pipeline, "measure", measure)
    with registered(toys["hungry"]), registered(toys["modest"]):
        plan = pipeline.choose(jax.make_jaxpr(conv)(X, K), Options(memory_limit=limit), Silent(), threading.Event())
    assert [mode.candidate.lowering for mode in plan.choices.values() if mode.candidate] == [way]


def test_compiler_options_hold_for_measuring_and_judging(monkeypatch):
    tempt(monkeypatch)
    offer(monkeypatch, "xla")
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

    tempt(monkeypatch)
    offer(monkeypatch, Inexact())
    with registered(Inexact()):
        strict, relaxed = (auto_layout(conv, verdict=False, numerics=n) for n in ("strict", "relaxed"))
        assert not strict.outcome(X, K).kept
        assert relaxed.outcome(X, K).kept
        np.testing.assert_allclose(relaxed(X, K), conv(X, K) * (1 + 1e-5), rtol=1e-6)
        assert not strict.outcome(X, K).kept


def test_a_good_toy_is_chosen(monkeypatch):
    """The tests above would see it if a bad one were."""
    tempt(monkeypatch)
    with registered(Toy()):
        f = auto_layout(conv, verdict=False, memory_limit=1000.0)
        f(X, K)
        assert records()["toy@1:NCHW,OIHW->NCHW"]["program"] == records()["xla@1:NCHW,OIHW->NCHW"]["program"]

    class Halves(Toy):  # another program, the same numbers
        def apply(self, conv, dims, lhs, prepared):
            params = {"dimension_numbers": dims.to_lax(), **conv.params}
            return jnp.concatenate([lax.conv_general_dilated(lhs, k, **params) for k in jnp.split(prepared, 2)], 1)

    offer(monkeypatch, Halves())
    with registered(Halves()):
        f = auto_layout(lambda x, k: conv(x, k) + 1, verdict=False, memory_limit=1000.0, table=":memory:")
        f(X, K)
        (mode,) = f.plan(X, K).choices.values()
        assert mode.candidate.lowering == "toy"
        np.testing.assert_allclose(f(X, K), conv(X, K) + 1, rtol=1e-5, atol=1e-5)


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
    offer(monkeypatch, Turncoat())
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

    monkeypatch.setattr(pipeline, "measure", measure)
    monkeypatch.setattr(pipeline.Pipeline, "judge", judge)
    tempt(monkeypatch)
    offer(monkeypatch, Spy())
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
    as_another_process(monkeypatch)  # as another process finds the table
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
    offer(monkeypatch, Turncoat())
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
    temp = {"hungry": 1000, "twin": 1000, "modest": 10}
    found = {name: measurement(1e3 * (i + 1), temp_bytes=nbytes) for i, (name, nbytes) in enumerate(temp.items())}
    measure = made_up(lambda name, _: found[name.partition("@")[0]], measurement(1e9, temp_bytes=2000))
    toys = {name: type(name, (Toy,), {"name": name})() for name in ("hungry", "twin", "modest")}
    offer(monkeypatch, *toys.values())
    tried = []

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
    offer(monkeypatch, Turncoat())
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
        def dimension_numbers(self, conv):
            last = ConvLayout.channels_last(conv.rank)
            yield ConvDimensionNumbers(last, KernelLayout.oi_first(conv.rank), last)

    k = normal(6, 8, 8, 3, 3)
    with registered(Native()):
        tuned = auto_layout(f)
        np.testing.assert_allclose(tuned(images, k), f(images, k), rtol=1e-4, atol=1e-4)
        chosen = {mode.candidate.lowering for mode in tuned.plan(images, k).choices.values() if mode.candidate}
        assert "turncoat" not in chosen
