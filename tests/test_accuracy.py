"""What is coarse, and what long sums, on the way to each output: there and nowhere else."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import conv
from jax import lax

from jaxlayout.verify.accept import compare
from jaxlayout.verify.accuracy import Accuracy, accuracies

FINE, COARSE = (float(jnp.finfo(dtype).eps) for dtype in (np.float32, jnp.bfloat16))
X, K = jnp.ones((2, 4, 8, 8)), jnp.ones((4, 4, 3, 3))
PRODUCTS = 4 * 3 * 3


def half(x):
    return x.astype(jnp.bfloat16)


def single(x):
    return x.astype(jnp.float32)


def mixed(x, k):
    """Beside each other: coarse ones, fine ones, and what is computed from both."""
    a, b = conv(half(x), half(k)), conv(x, k)
    return a, b, single(a), jnp.argmax(a), jnp.argmax(b), single(a) + b, conv(b, k)


MIXED = (
    *((COARSE, 1), (FINE, 1), (COARSE, 1)),
    *((COARSE, 1), (FINE, 1), (COARSE, 1), (FINE, 2)),
)


def expected(some):
    return [Accuracy(eps, float(PRODUCTS * convs)) for eps, convs in some]


@jax.custom_jvp
def with_a_rule(x, k):
    return mixed(x, k)


with_a_rule.defjvp(lambda primals, tangents: (mixed(*primals), mixed(*tangents)))


@pytest.mark.parametrize(
    "around",
    [
        mixed,
        jax.jit(mixed),
        jax.jit(mixed, in_shardings=jax.sharding.SingleDeviceSharding(jax.devices()[0])),
        jax.checkpoint(mixed),
        with_a_rule,
        lambda x, k: lax.cond(x.sum() > 0, mixed, mixed, x, k),
        lambda x, k: lax.cond(x.sum() > 0, mixed, lambda x, k: jax.tree.map(jnp.zeros_like, mixed(x, k)), x, k),
    ],
    ids=["plain", "jit", "jit with shardings", "checkpoint", "custom_jvp", "cond", "cond with zeros"],
)
def test_outputs_beside_each_other(around):
    assert accuracies(jax.make_jaxpr(around)(X, K)) == expected(MIXED)


def test_a_loop_is_as_coarse_as_it_gets():
    """A third trip has what the first has made coarse; what is carried beside it stays as it is."""

    def body(carry, x):
        p, q, r, s = carry
        return (half(x).astype(x.dtype), p * 1, q * 1, conv(s, K)), (x * 2, r)

    def loop(x):
        return lax.scan(body, (x, x, x, x), jnp.stack([x] * 5))

    products = 5.0 * PRODUCTS
    coarse, fine = Accuracy(COARSE, products), Accuracy(FINE, products)
    assert accuracies(jax.make_jaxpr(loop)(X)) == [coarse, coarse, coarse, fine, fine, coarse]

    def until(x):
        return lax.while_loop(lambda c: c[0].sum() < 9, lambda c: (single(half(c[0])), c[1] + 1), (x, x))

    assert [a.eps for a in accuracies(jax.make_jaxpr(until)(X))] == [COARSE, FINE]


def test_arguments_are_exact_however_coarse():
    found = accuracies(jax.make_jaxpr(lambda x, k: (x, conv(single(x), k), 3.0))(half(X), K))
    assert found == [Accuracy(), *expected([(FINE, 1)]), Accuracy()]


@pytest.mark.parametrize(
    ("f", "summed"),
    [
        (lambda x: x.sum(), 512),
        (lambda x: x.mean((0, 1)), 8),
        (lambda x: jnp.cumsum(x, 2), 8),
        (lambda x: lax.reduce_window(x, 0.0, lax.add, (1, 1, 3, 3), (1, 1, 1, 1), "SAME"), 9),
        (lambda x: x[0, 0] @ x[1, 1] @ x[1, 0], 16),
        (lambda x: jnp.max(x), 0),
        (lambda x: jnp.fft.fft(x).real, 0),
    ],
)
def test_sums(f, summed):
    assert accuracies(jax.make_jaxpr(f)(X)) == [Accuracy(FINE, float(summed))]


def test_numbers_rounded_to_fewer_digits_are_as_coarse_as_that():
    assert accuracies(jax.make_jaxpr(lambda x: lax.reduce_precision(x, 8, 7))(X)) == [Accuracy(COARSE)]
    double = jax.ShapeDtypeStruct((2,), np.complex64)
    assert accuracies(jax.make_jaxpr(jnp.sin)(double)) == [Accuracy(FINE)]


@pytest.mark.parametrize("arguments", [np.float32, jnp.bfloat16])
def test_a_coarse_output_does_not_excuse_the_one_beside_it(arguments):
    """Nor do coarse arguments, which are exact: to round them differently moves everything by a percent."""

    def f(x, k):
        return conv(half(x), half(k)), conv(single(x), single(k))

    rng = np.random.default_rng(0)
    args = [jnp.asarray(rng.standard_normal(a.shape), arguments) for a in (X, K)]
    coarse, fine = f(*args)
    accuracy = accuracies(jax.make_jaxpr(f)(*args))
    near = [single(coarse) * (1 + COARSE), fine * (1 + 2e-7)]
    seen = compare(f, args, [coarse, fine], [near[0].astype(coarse.dtype), near[1]], accuracy)
    assert seen.reason == "" and seen.noise == () and 1e-3 < seen.difference < 0.1
    for wrong in (1.07, 1.001, 1.0001):
        seen = compare(f, args, [coarse, fine], [coarse, fine * wrong], accuracy)
        assert seen.reason.startswith("output 1 differs by") and seen.difference > (wrong - 1)
