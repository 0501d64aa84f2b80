"""Convolutions whose padding cuts on one side of an axis and adds on the other, which some versions of XLA compute
wrongly: no form of ours is one, all forms are right, and what is wrong as written is told.

Everything is held against the float64 reference, never against XLA.
"""

from __future__ import annotations

import ctypes
import itertools
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawing import examples
from helpers import conv
from hypothesis import assume, given
from hypothesis import strategies as st
from jax import lax
from jax.extend.core.primitives import conv_general_dilated_p
from made_up import measurement
from signatures import convs, last, native, operands, signature, through
from steps import READS_PAST_LHS

from jaxlayout import LayoutPolicy, auto_layout
from jaxlayout.cli import checks
from jaxlayout.convs.candidates import Candidate, candidates
from jaxlayout.convs.lowering import evaluate, lowerings
from jaxlayout.graph.program import equations
from jaxlayout.measure.jobs import conv_job
from jaxlayout.measure.reference import reference
from jaxlayout.measure.trials import measure
from jaxlayout.runtime.malloc import amid, soiled_memory
from jaxlayout.tuning import pipeline
from jaxlayout.tuning.forced import channels_last, force
from jaxlayout.verify.accept import compare
from jaxlayout.verify.accuracy import Accuracy


@st.composite
def crossing(draw, **how):
    """A convolution, one axis of which is padded crosswise."""
    c = draw(convs(**how))
    assume(c.rank)
    edges = draw(st.permutations([draw(st.integers(-4, -1)), draw(st.integers(1, 4))]))
    axis = draw(st.integers(0, c.rank - 1))
    c = replace(c, padding=tuple(tuple(edges) if i == axis else p for i, p in enumerate(c.padding)))
    reach = zip(c.spatial, c.lhs_dilation, c.padding, strict=True)
    assume(all((s - 1) * d + 1 + sum(p) >= 0 for s, d, p in reach))
    return c


@examples(100)
@given(crossing(dtypes=("float64",)))
def test_what_is_cut_first_is_the_same_convolution(c):
    lhs, rhs = operands(c)
    part = c.cropped
    expected = reference(c, lhs, rhs)
    if part.is_empty:
        assert not expected.any()
        return
    assert not part.crosses and part.cropped is part
    assert part.out_spatial == c.out_spatial and part.products == c.products
    kept = lhs[(slice(None), *(slice(*span) for span in c.kept))]
    np.testing.assert_array_equal(reference(part, kept, rhs), expected)


def every_form(c, written):
    """All candidates but the one written, relaxed ones and composites too."""
    return candidates(c, written, relaxed=True)[1:]


@examples(60)
@given(crossing(dtypes=("float32",)))
def test_no_form_of_ours_crosses(c):
    written = Candidate("xla", last(c.rank))
    for way in every_form(c, written):
        shapes = [
            jax.ShapeDtypeStruct(shape, np.float32) for shape in (c.lhs_shape(way.dims.lhs), c.rhs_shape(way.dims.rhs))
        ]
        jaxpr = jax.make_jaxpr(lambda lhs, rhs, way=way: evaluate(way.lowering, c, way.dims, lhs, rhs))(*shapes)
        for eqn in equations(jaxpr):
            if eqn.primitive is conv_general_dilated_p:
                assert all(min(edges) >= 0 or max(edges) <= 0 for edges in eqn.params["padding"]), way


def test_phases_of_a_plain_transposed_convolution_do_not_cross():
    """It has no negative padding itself; the phase that begins at the second element has."""
    c = signature((2, 7, 7, 8), (3, 3, 8, 5), lhs_dilation=(2, 2), padding=((0, 3), (0, 3)))
    assert not c.crosses
    dims = last(2)
    jaxpr = jax.make_jaxpr(lambda lhs, rhs: evaluate("phases", c, dims, lhs, rhs))(*operands(c))
    parts = [eqn.params["padding"] for eqn in equations(jaxpr) if eqn.primitive is conv_general_dilated_p]
    assert len(parts) == 4 and all(edge >= 0 for padding in parts for edges in padding for edge in edges)
    np.testing.assert_array_equal(jax.jit(lambda *a: evaluate("phases", c, dims, *a))(*operands(c)), exact(c))


def exact(c):
    return reference(c, *operands(c)).astype(c.out_dtype)


CASES = [
    signature((2, 9, 8), (3, 8, 8), padding=((-1, 1),)),
    signature((2, 9, 8), (3, 8, 8), padding=((-2, 3),), strides=(2,)),
    signature((2, 9, 8, 8), (3, 3, 8, 8), padding=((-1, 1), (0, 0))),
    signature((2, 9, 8, 3), (3, 3, 3, 4), padding=((1, 0), (-2, 1)), strides=(2, 1)),
    signature((2, 9, 8, 8), (3, 3, 8, 8), padding=((2, -1), (-1, 2)), rhs_dilation=(2, 1)),
    signature((2, 9, 8, 8), (1, 1, 8, 8), padding=((-1, 1), (0, 0))),
    signature((2, 9, 8, 8), (3, 3, 1, 8), padding=((-1, 1), (-1, 0)), groups=8),
    signature((2, 9, 8, 8), (3, 3, 4, 6), padding=((-1, 1), (0, 0)), groups=2),
    signature((2, 7, 6, 8), (3, 3, 8, 5), padding=((-2, 3), (1, 1)), lhs_dilation=(2, 2)),
    signature((2, 7, 6, 8), (3, 3, 8, 5), padding=((-3, 4), (0, 2)), lhs_dilation=(3, 1), strides=(2, 1)),
    signature((4, 9, 8, 3), (8, 7, 3, 6), padding=((-1, 1), (0, 0)), batch_groups=2),
    signature((2, 4, 6, 7, 4), (3, 2, 3, 4, 5), padding=((0, 0), (-1, 1), (-1, 2))),
    signature((2, 9, 8, 8), (3, 3, 8, 8), padding=((-1, 1), (0, 0)), dtype="bfloat16"),
    signature((2, 3, 8, 4), (3, 3, 4, 4), padding=((-5, 5), (0, 0))),  # nothing is left of lhs
]


@pytest.mark.parametrize("c", CASES, ids=lambda c: c.key)
def test_every_form_is_right(c):
    ways = dict.fromkeys(native(c))
    assert ways and "xla" not in {name for name, _ in ways}

    @jax.jit
    def run(lhs, rhs):
        return {f"{name} {dims}": through(name, c, dims, lhs, rhs) for name, dims in ways}

    for name, out in run(*map(amid, operands(c))).items():
        np.testing.assert_array_equal(out, exact(c), err_msg=name)


def test_offered_as_written_and_cropped():
    c = CASES[2]
    for dims in itertools.islice(lowerings()["cropped"].dimension_numbers(c), 3):
        found = candidates(c, Candidate("xla", dims), preferred=last(2))
        assert found[0] == Candidate("xla", dims) and {w.dims for w in found if w.lowering == "xla"} == {dims}
        cropped = {way.dims for way in found if way.lowering == "cropped"}
        assert dims in cropped and {"NHWC", "NCHW"} == {str(dims.lhs) for dims in cropped}
    plain = replace(c, padding=((1, 1), (0, -1)))
    assert "cropped" not in {way.lowering for way in candidates(plain, Candidate("xla", last(2)))}


def test_the_policy_channels_last_crops():
    def f(x, k):
        return lax.conv_general_dilated(x, k, (1, 1), ((-1, 1), (0, 0)))

    jaxpr = jax.make_jaxpr(f)(*(jnp.zeros(shape) for shape in ((2, 8, 9, 8), (8, 8, 3, 3))))
    policy = LayoutPolicy.for_device()
    (mode,) = [mode for mode in force(jaxpr, policy, "entry").plan.choices.values() if mode.candidate]
    assert mode.candidate.lowering == "cropped" and mode.candidate.dims in channels_last(CASES[2], policy)


def test_an_input_gradient_is_right():
    """As differentiation writes it, that of a causal convolution crosses."""
    tuned = auto_layout(lambda x, k: lax.conv_general_dilated(x, k, (1,), [(3, 0)], dimension_numbers=WIDTH))
    rng = np.random.default_rng(0)
    x, k, w = (jnp.asarray(rng.integers(-3, 4, s), np.float32) for s in ((2, 9, 8), (3, 8, 8), (2, 10, 8)))
    found = jax.jit(jax.grad(lambda x: (tuned(x, k) * w).sum()))(x)

    def plain(x):
        padded = jnp.pad(x, ((0, 0), (3, 0), (0, 0)))
        return sum(padded[:, t : t + 10] @ k[t] for t in range(3))

    np.testing.assert_array_equal(found, jax.grad(lambda x: (plain(x) * w).sum())(x))


WIDTH = ("NWC", "WIO", "NWC")


# Measuring


def records(job, **how):
    [(_, found)] = measure([job], device=jax.local_devices()[0], **how)
    return list(found.values())


def planted(**functions):
    """A job of a convolution whose alternatives are functions of what XLA gives; the first is as written."""
    c = signature((2, 6, 6, 4), (3, 3, 4, 4))
    job = conv_job(c, [Candidate("xla", last(2))])
    (name,) = job.alternatives
    plain = job.alternatives[name]
    ways = {n: (lambda *args, how=how: how(plain(*args))) for n, how in functions.items()}
    alike = lambda _: name  # noqa: E731

    def inputs():
        arrays, error = job.inputs()
        return lambda n: arrays(alike(n)), lambda n, out: error(alike(n), out)

    return replace(job, alternatives=ways, inputs=inputs, dims=None, form=lambda _: None, make=None)


def test_what_is_wrong_in_its_second_run_is_wrong():
    runs = itertools.count()

    def later(out):
        return out * jax.pure_callback(lambda: np.float32(next(runs) == 0), jax.ShapeDtypeStruct((), "float32"))

    written, fickle = records(planted(written=lambda out: out + 0, fickle=later))
    assert written.status == "ok" and fickle.status == "wrong" and fickle.error > 1


def test_what_is_wrong_in_its_second_run_is_wrong_though_it_is_long(monkeypatch):
    monkeypatch.setattr("jaxlayout.measure.trials.WARM_NS", 0)
    monkeypatch.setattr("jaxlayout.measure.trials.SLOW", 1e9)
    runs = itertools.count()

    def later(out):
        return out * jax.pure_callback(lambda: np.float32(next(runs) == 0), jax.ShapeDtypeStruct((), "float32"))

    written, fickle = records(planted(written=lambda out: out + 0, fickle=later))
    assert written.status == "ok" and fickle.status == "wrong"


def test_a_wrong_written_form_allows_nothing_to_others(caplog):
    written, other, right = records(planted(written=lambda x: 1.5 * x, other=lambda x: 1.3 * x, right=lambda x: x + 0))
    assert (written.status, other.status, right.status) == ("wrong", "wrong", "ok")
    assert "XLA is wrong here" in caplog.text and "as written" in caplog.text


def test_rounding_of_the_written_form_allows_twice_as_much():
    bound = conv_job(signature((2, 6, 6, 4), (3, 3, 4, 4)), [Candidate("xla", last(2))]).bound
    allowed = bound(0.0)
    assert bound(3 * allowed) == 6 * allowed and bound(1e6) == bound(np.inf) == allowed


def test_arguments_lie_amid_nans():
    array = np.arange(30, dtype=np.float32).reshape(5, 6)
    assert amid(array[:0]).shape == (0, 6)
    for one in (array, array.T, array.astype(jnp.bfloat16), np.asarray(3.0)):
        copy = amid(one)
        np.testing.assert_array_equal(copy, one)
        start, end = copy.ctypes.data, copy.ctypes.data + copy.nbytes
        assert {*ctypes.string_at(start - 2**16, 2**16), *ctypes.string_at(end, 2**16)} == {0xFF}
    copy = amid(array)
    device = jax.local_devices()[0]
    if device.platform == "cpu":  # and are read there
        assert jax.device_put(copy, device).unsafe_buffer_pointer() == copy.ctypes.data


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="needs glibc")
def test_memory_is_soiled():
    for size in (2**13, 2**20, 2**27):  # of the heap, and mapped
        with soiled_memory():
            assert np.empty(size, np.uint8).min() > 0
    assert not np.empty(2**27, np.uint8)[2**20 :: 2**20].any()


# Judging


def test_an_original_that_differs_between_equal_runs_allows_nothing():
    rng = np.random.default_rng(0)
    x, accuracy = jnp.ones(8), [Accuracy(2e-7)]

    def wild(x):
        return [x * rng.standard_normal(8)]

    found = compare(wild, [x], [x], [1.5 * x], accuracy)
    assert found.difference == 0.5 and "output 0 of the original itself is another in a second run" in found.reason

    def argmax(x):
        return [jnp.argmax(jnp.asarray(rng.permutation(8)))]

    assert "original itself" in compare(argmax, [x], [jnp.asarray(9)], [jnp.asarray(8)], accuracy).reason
    assert compare(wild, [x], [x], [x * (1 + 1e-7)], accuracy).reason == ""  # they agree: nobody asks


# Telling


def test_doctor_finds_by_running_what_is_known():
    finding = checks.padding()
    assert (finding.grade, "is wrong" in finding.found) == (("warning", True) if READS_PAST_LHS else ("ok", False))


def test_explain_tells_what_is_wrong_as_written(costs, monkeypatch):
    def seen(jobs, **_):
        for job in jobs:
            found = {name: measurement(1e6) for name in job.alternatives}
            if len(found) > 1:
                wrong = {"status": "wrong", "median_ns": None, "spread_ns": None, "runs": 0, "error": 1e6}
                found[next(iter(found))] = replace(measurement(1e6), **wrong, detail="error 1e+06, allowed 1e-06")
            yield job, found

    monkeypatch.setattr(pipeline, "measure", seen)

    told = auto_layout(conv).explain(jnp.ones((2, 3, 6, 5)), jnp.ones((4, 3, 3, 3)))
    assert told.sites[0].wrong == "error 1e+06, allowed 1e-06"
    for text in (str(told), told._repr_html_()):
        assert "XLA is wrong here" in text and "error 1e+06, allowed" in " ".join(text.split())
    assert json.loads(json.dumps(told.to_json()))["convolutions"][0]["candidates"][-1]["status"] == "wrong"
