"""When the outputs of two programs agree, and what they are compared on."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import K, X, conv, normal
from toys import Turncoat, offer

from jaxlayout import auto_layout
from jaxlayout.convs.lowering import registered
from jaxlayout.measure.jobs import TOLERANCE
from jaxlayout.verify.accept import Comparison, compare, draws, liveliest
from jaxlayout.verify.accuracy import MAX_TOLERANCE, Accuracy, accuracies


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
    offer(monkeypatch, Turncoat())
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
    offer(monkeypatch, Turncoat())
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


def test_nothing_but_zeros_is_equal_to_zeros_alone():
    zeros, next_to = np.zeros(4, np.float32), np.full(4, 1e-9, np.float32)
    for found, agrees in ((zeros, True), (-zeros, True), (next_to, False)):
        seen = compare(lambda x: [zeros], [jnp.ones(4)], [zeros], [found], [Accuracy()])
        assert (seen.reason == "") == agrees, seen
