"""What programs are rewritten to, side by side: with all convolutions in the order `MIXED`, where the features of
images are last, `before` becomes `after`, equation by equation."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from helpers import FIRST, conv
from jax import lax
from rewriting import MIXED, plan_in, retraced, single, text, trace, whole_numbers

IMAGES, KERNEL, KERNEL_2 = whole_numbers((2, 4, 6, 5), (4, 4, 3, 3), (4, 4, 3, 3))
TO_LAST, TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)


def equations_of(jaxpr: Any) -> str:
    """All of a jaxpr, where a convolution that was chosen to be XLA's is like one that is written so."""
    written = text(jaxpr).replace("tuned_conv[", "conv_general_dilated[")
    return re.sub(r"\n *(derived=False|lowering=xla|selector=None)(?=\n)", "", written)


def becomes(before: Callable[..., Any], after: Callable[..., Any], *args: Any, dims: str = MIXED) -> None:
    jaxpr = trace(before, *args)
    plan = plan_in(jaxpr, dims)
    wanted = equations_of(trace(after, *args))
    assert equations_of(jaxpr) != wanted == equations_of(retraced(jaxpr, plan))
    np.testing.assert_array_equal(jax.jit(single(jaxpr, plan))(*args), jax.jit(before)(*args))


def test_what_is_elementwise_takes_the_order_of_its_neighbours():
    def before(x, k, b, k2):
        y = lax.max(conv(x, k, FIRST) + b, 0.0)
        return conv(y, k2, FIRST)

    def after(x, k, b, k2):
        x = lax.transpose(x, TO_LAST)
        y = lax.max(conv(x, k, MIXED) + lax.reshape(b, (1, 1, 1, 4)), 0.0)
        return lax.transpose(conv(y, k2, MIXED), TO_FIRST)

    becomes(before, after, IMAGES, KERNEL, np.ones((1, 4, 1, 1), np.float32), KERNEL_2)


def test_pooling_and_padding_take_their_windows_along():
    def before(x, k):
        y = lax.pad(conv(x, k, FIRST), 0.0, ((0, 0, 0), (0, 0, 0), (1, 0, 0), (0, 2, 0)))
        y = lax.reduce_window(y, 0.0, lax.add, (1, 1, 3, 2), (1, 1, 2, 1), "VALID")
        return conv(y, k, FIRST)

    def after(x, k):
        x = lax.transpose(x, TO_LAST)
        y = lax.pad(conv(x, k, MIXED), 0.0, ((0, 0, 0), (1, 0, 0), (0, 2, 0), (0, 0, 0)))
        y = lax.reduce_window(y, 0.0, lax.add, (1, 3, 2, 1), (1, 2, 1, 1), "VALID")
        return lax.transpose(conv(y, k, MIXED), TO_FIRST)

    becomes(before, after, IMAGES, KERNEL)


def test_a_residual_is_converted_once():
    def before(x, k, k2):
        y = conv(x, k, FIRST)
        return conv(lax.neg(y), k2, FIRST) + y

    def after(x, k, k2):
        y = conv(lax.transpose(x, TO_LAST), k, MIXED)
        return lax.transpose(conv(lax.neg(y), k2, MIXED) + y, TO_FIRST)

    becomes(before, after, IMAGES, KERNEL, KERNEL_2)


def test_features_are_joined_along_the_axis_where_they_are():
    def before(x, k, k2):
        return lax.reduce_sum(lax.concatenate([conv(x, k, FIRST), conv(x, k2, FIRST)], 1), (2, 3))

    def after(x, k, k2):
        x = lax.transpose(x, TO_LAST)
        return lax.reduce_sum(lax.concatenate([conv(x, k, MIXED), conv(x, k2, MIXED)], 3), (1, 2))

    becomes(before, after, IMAGES, KERNEL, KERNEL_2)


def test_transposes_that_the_user_wrote_are_absorbed():
    def before(x, k):
        y = conv(lax.transpose(x, TO_LAST), k, MIXED)
        y = conv(lax.transpose(lax.transpose(y, TO_FIRST), TO_LAST), k, MIXED)
        return lax.transpose(y, TO_FIRST)

    def after(x, k):
        return conv(conv(x, k, FIRST), k, FIRST)

    becomes(before, after, IMAGES, KERNEL, dims=FIRST)


def test_what_knows_no_order_has_what_was_written():
    def before(x, k, k2):
        return conv(lax.sort(conv(x, k, FIRST), dimension=3), k2, FIRST)

    def after(x, k, k2):
        y = lax.transpose(conv(lax.transpose(x, TO_LAST), k, MIXED), TO_FIRST)
        y = lax.transpose(lax.sort(y, dimension=3), TO_LAST)
        return lax.transpose(conv(y, k2, MIXED), TO_FIRST)

    becomes(before, after, IMAGES, KERNEL, KERNEL_2)


def test_a_loop_converts_what_it_carries_outside():
    def before(x, k):
        return lax.scan(lambda y, _: (lax.clamp(-4.0, conv(y, k, FIRST), 4.0), None), x, None, length=3)[0]

    def after(x, k):
        def step(y, _):
            return lax.clamp(-4.0, conv(y, k, MIXED), 4.0), None

        return lax.transpose(lax.scan(step, lax.transpose(x, TO_LAST), None, length=3)[0], TO_FIRST)

    becomes(before, after, IMAGES, KERNEL)


def test_a_product_contracts_the_axis_wherever_it_is():
    def before(x, k, w):
        return jnp.tensordot(conv(x, k, FIRST), w, ((1,), (0,)))

    def after(x, k, w):
        return jnp.tensordot(conv(lax.transpose(x, TO_LAST), k, MIXED), w, ((3,), (0,)))

    becomes(before, after, IMAGES, KERNEL, np.ones((4, 7), np.float32))
