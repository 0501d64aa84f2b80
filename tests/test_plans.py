"""Plans are saved, loaded, pinned and exported; one that does not fit a program is refused, and named."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import K, X, conv, normal, python
from jax import lax
from made_up import not_asked
from toys import Turncoat, offer

from jaxlayout import Plan, auto_layout
from jaxlayout.convs.candidates import Candidate
from jaxlayout.convs.lowering import registered
from jaxlayout.graph.build import Mode
from jaxlayout.graph.validate import check_plan
from jaxlayout.layout import ConvDimensionNumbers, ConvLayout, KernelLayout
from jaxlayout.tuning import model, pipeline, stores


def test_a_plan_is_saved_loaded_and_pinned(forced, monkeypatch, tmp_path):
    f = auto_layout(conv)
    f(X, K)
    f.plan(X, K).save(tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    assert plan == f.plan(X, K) and not plan.trivial
    monkeypatch.setattr(pipeline, "measure", not_asked)
    monkeypatch.setattr(pipeline.Pipeline, "judge", not_asked)
    pinned = auto_layout(conv, plan=plan)
    with monkeypatch.context() as no_table:
        for stage in (pipeline, model, stores):
            no_table.setattr(stage, "open_table", not_asked)
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
    offer(monkeypatch, Turncoat())
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
    assert python("-c", script, tmp_path).stdout == "right\n"
