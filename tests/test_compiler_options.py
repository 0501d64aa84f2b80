"""Compiler options for a whole program: chosen with the plan, used at the top level and nowhere else."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp

import jaxlayout
from jaxlayout import auto_layout
from jaxlayout.api.wrapped import jit_settings
from jaxlayout.runtime.timing import Paired
from jaxlayout.tuning import pipeline
from jaxlayout.verify.accept import Verdict

EXTRA = {"xla_cpu_experimental_ynn_fusion_type": ""}
X, K = np.ones((1, 4, 6, 6), np.float32), np.ones((4, 4, 3, 3), np.float32)


def f(x, k):
    return jax.nn.relu(lax.conv_general_dilated(x, k, (1, 1), "SAME"))


@pytest.fixture
def gains(costs, monkeypatch):
    """The ratios that the judge finds, without and with the options, by the size of the batch."""
    found = {1: (1.5, 2.0), 2: (1.5, 1.2)}

    def judge(pipeline, plan):
        batch = pipeline.jaxpr.in_avals[0].shape[0]
        without, under = found[batch]
        ratio, rival = (under, max(1.0, without)) if plan.compiler_options else (without, 1.0)
        pipeline.verifier.original  # noqa: B018 - it must compile
        return Verdict(kept=ratio > rival, reason="made up", ratio=ratio)

    monkeypatch.setattr(pipeline, "COMPILER_OPTION_SETS", {"cpu": (EXTRA,)})
    monkeypatch.setattr(pipeline.Pipeline, "judge", judge)
    monkeypatch.setenv("JAXLAYOUT_VERDICT", "1")
    return found


def used(g):
    return jit_settings(g._entry).get("compiler_options", {})


def test_they_are_used_where_they_gain(gains):
    g = auto_layout(f)
    np.testing.assert_allclose(g(X, K), f(X, K), rtol=1e-6)
    assert used(g) == EXTRA == g.plan(X, K).compiler_options
    assert g.outcome(X, K).verdict.ratio == 2.0
    again = auto_layout(f)
    assert again.lower(X, K).compile()(X, K).shape == g(X, K).shape  # from the stored plan
    assert used(again) == EXTRA and again.outcome(X, K).source == "stored"


def test_and_not_where_they_do_not(gains):
    gains[1] = (1.5, 1.4)
    g = auto_layout(f)
    g(X, K)
    assert used(g) == {} == g.plan(X, K).compiler_options and g.outcome(X, K).verdict.ratio == 1.5


def test_even_where_nothing_else_is_gained(gains):
    gains[1] = (0.9, 1.1)
    g = auto_layout(f)
    g(X, K)
    assert used(g) == EXTRA and g.outcome(X, K).kept


def test_the_users_own_stay(gains):
    told = {"xla_cpu_enable_fast_min_max": False}
    g = auto_layout(jax.jit(f, compiler_options=told))
    g(X, K)
    assert used(g) == told | EXTRA


def test_a_program_that_would_rather_do_without_decides_for_all(gains):
    g = auto_layout(f)
    g(X, K)
    assert used(g) == EXTRA
    two = np.concatenate([X, X])
    np.testing.assert_allclose(g(two, K), f(two, K), rtol=1e-6)
    assert used(g) == {}
    g(X, K)
    assert used(g) == {} == g.plan(X, K).compiler_options


def test_they_never_get_inside_another_transformation(gains):
    g = auto_layout(f)
    g(X, K)
    assert used(g) == EXTRA
    loss = lambda g: lambda x: g(x, K).sum()  # noqa: E731
    expected = jax.grad(loss(f))(X)
    linear = jax.linearize(loss(g), X)[1]
    for run in (jax.jit(loss(g)), jax.jit(linear), jax.grad(loss(g)), lambda x: jax.jit(jax.vmap(loss(g)))(x[None])):
        run(jnp.asarray(X))
    np.testing.assert_allclose(jax.jit(jax.grad(loss(g)))(X), expected, rtol=1e-6)
    jaxpr = jax.make_jaxpr(loss(g))(X)
    assert jax.jit(lambda x: jax.core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, x))(X)[0] == loss(f)(X)


def test_a_plan_takes_them_along(gains, tmp_path):
    auto_layout(f).plan(X, K).save(tmp_path / "plan.json")
    deployed = auto_layout(f, plan=jaxlayout.Plan.load(tmp_path / "plan.json"))
    assert used(deployed) == EXTRA
    np.testing.assert_allclose(deployed(X, K), f(X, K), rtol=1e-6)
    assert used(deployed) == EXTRA
    jax.jit(deployed)(X, K)


def test_frozen(gains):
    frozen = auto_layout(lambda k, x: f(x, k)).freeze(K)
    gains[4] = gains[1]  # the first argument is the kernel here
    np.testing.assert_allclose(frozen(X), f(X, K), rtol=1e-6)
    assert frozen.plan(X).compiler_options == EXTRA
    jax.jit(frozen)(X)


def test_an_option_that_this_compiler_does_not_know(costs, monkeypatch):
    monkeypatch.setattr(pipeline, "COMPILER_OPTION_SETS", {"cpu": ({"xla_no_such_option": "1"},)})
    monkeypatch.setenv("JAXLAYOUT_VERDICT", "1")
    g = auto_layout(f)
    np.testing.assert_allclose(g(X, K), f(X, K), rtol=1e-6)
    assert used(g) == {} == g.plan(X, K).compiler_options


@pytest.mark.parametrize("faster", [True, False])
def test_they_are_raced_against_what_was_kept_without_them(costs, monkeypatch, faster):
    races = [(True, Paired.of([(2e6, 1e6)] * 3)), *[(faster, Paired.of([(1e6, 0.8e6)] * 3))] * 2]
    monkeypatch.setattr(pipeline, "COMPILER_OPTION_SETS", {"cpu": (EXTRA,)})
    monkeypatch.setattr("jaxlayout.verify.accept.race", lambda *_: races.pop(0))
    monkeypatch.setenv("JAXLAYOUT_VERDICT", "1")
    outcome = auto_layout(f).outcome(X, K)
    assert outcome.plan.compiler_options == (EXTRA if faster else {}) and not (races and faster)
    assert outcome.verdict.ratio == (2.5 if faster else 2.0)
    assert outcome.verdict.original_ns == pytest.approx(2e6)
