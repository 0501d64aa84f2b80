"""Decorated functions in all manner of one another, cold, with nothing replaced: run by test_nesting, with a deadline.

Each composition prints its name when its values have been held against those of the plain functions.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxlayout.flax.linen
from jaxlayout import auto_layout
from jaxlayout.convs.lowering import registered
from jaxlayout.convs.lowerings.shifted import Shifted

COMPOSITIONS: dict[str, Callable[[], Any]] = {}
_plain_convolution = lax.conv_general_dilated


def composition(make: Callable[[], Any]) -> Callable[[], Any]:
    COMPOSITIONS[make.__name__] = make
    return make


def depthwise(x: Any, k: Any) -> Any:
    dims = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=dims, feature_group_count=x.shape[-1])


def loss(k: Any, x: Any) -> Any:
    return (jax.nn.relu(depthwise(x, k)) ** 2).mean()


def arrays(size: int) -> tuple[jax.Array, jax.Array]:
    """A kernel and images, of other shapes in each composition: none finds another's plan."""
    rng = np.random.default_rng(size)
    return tuple(jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((3, 3, 1, 8), (2, size, size, 8)))


def same(found: Any, wanted: Any) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@composition
def gradient_of_decorated() -> None:
    args = arrays(20)
    same(auto_layout(jax.grad(auto_layout(loss)))(*args), jax.grad(loss)(*args))


quick = functools.partial(auto_layout, verdict=False)
"""Judged by numbers alone: one race is enough, and they are long."""


@composition
def three_deep_in_a_batch() -> None:
    k, x = arrays(21)
    xs = jnp.stack([x, 2 * x])
    inner = quick(lambda k, x: quick(loss)(k, x) + 1)
    wanted = jax.vmap(jax.grad(loss), (None, 0))(k, xs)
    same(quick(jax.vmap(jax.grad(inner), (None, 0)))(k, xs), wanted)


@composition
def a_module_in_a_step() -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Conv(8, (3, 3), feature_group_count=8)(x)

    _, x = arrays(22)
    bare, tuned = Net(), jaxlayout.flax.linen.auto_layout(Net(), verdict=False)
    variables = bare.init(jax.random.key(0), x)

    def step(model: Any) -> Callable[..., Any]:
        return jax.grad(lambda variables, x: (model.apply(variables, x) ** 2).mean())

    same(quick(step(tuned))(variables, x), step(bare)(variables, x))


@composition
def convolution_of_jax_replaced() -> None:
    k, x = arrays(23)
    wanted = jax.grad(loss)(k, x)
    try:
        lax.conv_general_dilated = quick(  # as a library does that wants all convolutions tuned
            _plain_convolution,
            static_argnames=("window_strides", "padding", "dimension_numbers", "feature_group_count"),
            static_argnums=(2, 3),
        )
        same(quick(jax.grad(loss))(k, x), wanted)
        same(jax.grad(loss)(k, x), wanted)
        same(jax.jit(jax.grad(loss))(k, 2 * x), 4 * wanted)
    finally:
        lax.conv_general_dilated = _plain_convolution


@composition
def called_back() -> None:
    k, x = arrays(24)
    inner = quick(lambda x: depthwise(x, k))

    def f(k: Any, x: Any) -> Any:
        y = jax.pure_callback(lambda x: np.asarray(inner(jnp.asarray(x))), jax.ShapeDtypeStruct(x.shape, x.dtype), x)
        return depthwise(y, k)

    same(quick(f)(k, x), depthwise(depthwise(x, k), k))


class Threaded(Shifted):
    """Calls something decorated from a thread of its own."""

    name = "threaded"

    def __init__(self, call: Callable[[], Any]):
        self.call = call

    def apply(self, conv: Any, dims: Any, lhs: Any, prepared: Any) -> Any:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(self.call).result()
        return super().apply(conv, dims, lhs, prepared)


@composition
def from_a_lowering_in_a_thread_of_its_own() -> None:
    args, x, k = arrays(25), jnp.ones((2, 12, 12, 4)), jnp.ones((3, 3, 4, 4))
    dense = quick(lambda x, k: lax.conv_general_dilated(x, k, (1, 1), "SAME"))
    with registered(Threaded(lambda: dense(x.transpose(0, 3, 1, 2), k.transpose(3, 2, 0, 1)))):
        same(quick(jax.grad(loss))(*args), jax.grad(loss)(*args))


@composition
def from_a_lowering_itself() -> None:
    """It waits for as long as it may, and goes on. (With the same shapes `jax.jit` waits for itself, too.)"""
    args = arrays(30)
    tuned = quick(loss, lock_timeout=0.2)
    with registered(Threaded(lambda: tuned(*arrays(31)))):
        same(tuned(*args), loss(*args))


@composition
def frozen_in_decorated() -> None:
    k, x = arrays(26)
    inner = quick(lambda k, x: depthwise(x, k)).freeze(k)
    same(quick(lambda x: inner(inner(x)))(x), depthwise(depthwise(x, k), k))
    same(quick(jax.grad(lambda x: (inner(x) ** 2).mean()))(x), jax.grad(lambda x: loss_of(k, x))(x))


def loss_of(k: Any, x: Any) -> Any:
    return (depthwise(x, k) ** 2).mean()


@composition
def other_policies_inside() -> None:
    args = arrays(27)
    pinned = quick(loss, plan=quick(loss).plan(*args))
    for inner in (pinned, quick(loss, policy="channels_last"), quick(loss, policy="off")):
        same(quick(jax.grad(inner))(*args), jax.grad(loss)(*args))


@composition
def threads_at_once() -> None:
    wrong: list[BaseException] = []

    def work(size: int) -> None:
        try:
            args = arrays(size)
            same(quick(jax.grad(shared))(*args), jax.grad(loss)(*args))
            same(shared(*args), loss(*args))
        except BaseException as error:
            wrong.append(error)

    shared = quick(loss)
    threads = [threading.Thread(target=work, args=(size,)) for size in (28, 29, 28)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong


if __name__ == "__main__":
    for name in sys.argv[1:] or COMPOSITIONS:
        COMPOSITIONS[name]()
        print(name, flush=True)
