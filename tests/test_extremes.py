"""Extreme inputs to a whole network whose convolutions go through lowerings other than XLA's own, and to its gradient,
planned as one piece: what comes out is what plain JAX gives, NaN and Inf in the same places."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from plans import at_random

from jaxlayout import auto_layout
from jaxlayout.tuning import pipeline

pytestmark = pytest.mark.usefixtures("forced")

Params = dict[str, Any]


@pytest.fixture(autouse=True)
def no_convolution_of_xla(forced, monkeypatch):
    """Wherever there is anything else."""
    monkeypatch.setattr(pipeline, "measure", at_random(3, dear=("xla@",)))


KERNELS = {"NCHW": "OIHW", "NHWC": "HWIO"}
UP = ((1, 2), (1, 2))


def conv(x: Any, k: Any, order: str, **keywords: Any) -> Any:
    return helpers.conv(x, k, f"{order},{KERNELS[order]}->{order}", **keywords)


def net(p: Params, x: Any, order: str = "NCHW", normal: bool = True) -> tuple[Any, Any]:
    """The features of a network with a strided, a depthwise, a grouped, a pointwise and a transposed convolution, and
    what a dense layer makes of their mean; `normal`: with normalisation and activations, or with neither."""
    channel = order.index("C")
    vector = [-1 if a == channel else 1 for a in range(4)]

    def activated(y: Any, activation: Callable[[Any], Any]) -> Any:
        if not normal:
            return y
        y = y - y.mean(channel, keepdims=True)
        y = y * lax.rsqrt(jnp.square(y).mean(channel, keepdims=True) + 1e-6)
        return activation(y * p["scale"].reshape(vector) + p["shift"].reshape(vector))

    y = activated(conv(x, p["stem"], order, strides=2), jax.nn.silu)
    features = y.shape[channel]
    y = y + conv(y, p["depthwise"], order, feature_group_count=features)
    y = activated(conv(y, p["grouped"], order, feature_group_count=min(2, features)), jax.nn.relu)
    window = [1 if a in (0, channel) else min(2, size) for a, size in enumerate(y.shape)]
    if normal:
        infinity = y.dtype.type(-np.inf)
        y = lax.reduce_window(y, infinity, lax.max, window, (1,) * 4, "SAME")
    else:
        y = lax.reduce_window(y, y.dtype.type(0), lax.add, window, (1,) * 4, "SAME")
    y = y + conv(y, p["pointwise"], order)
    y = conv(y, p["up"], order, padding=UP, lhs_dilation=(2, 2))
    spatial = tuple(a for a in range(1, 4) if a != channel)
    total = y.sum(spatial, dtype=y.dtype)
    return y, total @ p["dense"]


def arguments(
    batch: int = 2, features: int = 6, size: int = 12, order: str = "NCHW", dtype: Any = np.float32
) -> tuple[Params, Any]:
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> Any:
        if not jnp.issubdtype(dtype, jnp.inexact):
            return jnp.asarray(rng.integers(-3, 4, shape), dtype)
        out = rng.standard_normal(shape) / max(1, np.prod(shape[1:])) ** 0.5
        return jnp.asarray(out + 1j * rng.standard_normal(shape) if np.issubdtype(dtype, complex) else out, dtype)

    def kernel(o: int, i: int, k: int = 3) -> Any:
        drawn = draw(o, i, k, k)
        return drawn if order == "NCHW" else drawn.transpose(2, 3, 1, 0)

    f, groups = features, min(2, features)
    params = {
        "stem": kernel(f, 3),
        "depthwise": kernel(f, 1),
        "grouped": kernel(f, f // groups),
        "pointwise": kernel(f, f, 1),
        "up": kernel(f, f),
        "dense": draw(f, 5),
        "scale": draw(f),
        "shift": draw(f),
    }
    shape = (batch, 3, size, size) if order == "NCHW" else (batch, size, size, 3)
    return params, draw(*shape)


def with_gradient(f: Callable[..., Any]) -> Callable[..., Any]:
    """What it gives and its gradient to both arguments, as one program."""

    def both(p: Params, x: Any) -> Any:
        out, back = jax.vjp(f, p, x)
        return out, back(jax.tree.map(jnp.ones_like, out))

    return both


def pair(f: Callable[..., Any], *args: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The tuned function and the plain one; some of the former's convolutions are no longer XLA's."""
    tuned = auto_layout(f)
    used = {mode.candidate.lowering for mode in tuned.plan(*args).choices.values() if mode.candidate}
    assert len(used - {"xla"}) > 3
    return tuned, jax.jit(f)


def wide(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.complex128 if jnp.issubdtype(x.dtype, jnp.complexfloating) else np.float64)


def assert_close(found: Any, wanted: Any, least: float = 0.0) -> None:
    """Equal dtypes and integers; elsewhere what is not finite in the same places, and the same numbers within 16 last
    places of the largest, or within `least`."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if not jnp.issubdtype(a.dtype, jnp.inexact):
            np.testing.assert_array_equal(a, b)
            continue
        eps, (a, b) = float(jnp.finfo(a.dtype).eps), map(wide, (a, b))
        finite = np.isfinite(b)
        np.testing.assert_array_equal(np.isfinite(a), finite)
        scale = np.abs(b[finite]).max(initial=0.0)
        np.testing.assert_allclose(a[finite], b[finite], rtol=0, atol=max(least, 16 * eps * scale))


def assert_alike(found: Any, wanted: Any, least: float = 0.0) -> None:
    """`assert_close`, and NaN and each Inf in the same places in what the network gives. In a kernel's gradient an
    infinite cotangent may meet padding, and whether that makes it a NaN depends on how XLA compiles its convolution."""
    assert_close(found, wanted, least)
    for a, b in zip(found[0], wanted[0], strict=True):
        np.testing.assert_array_equal(np.where(np.isfinite(a), 0, a), np.where(np.isfinite(b), 0, b))


def test_values_that_are_no_ordinary_numbers():
    params, x = arguments()
    tuned, plain = pair(with_gradient(net), params, x)

    def check(params: Params, x: Any) -> Any:
        found, wanted = tuned(params, x), plain(params, x)
        assert_alike(found, wanted)
        return found

    check(params, x)
    for bad in (np.nan, np.inf, -np.inf):
        (y, out), (_, dx) = check(params, x.at[0, 0, 0, 0].set(bad))
        for each in (y, out, dx):
            assert np.isfinite(each[1]).all() and not np.isfinite(each[0]).all()
        for each in (y, dx):
            assert np.isfinite(each[0]).any()  # where no kernel reaches
        check(params | {"depthwise": params["depthwise"].at[1, 0, 1, 1].set(bad)}, x)
        check(params | {"dense": params["dense"].at[0, 0].set(bad)}, x)
    for zero in (0.0, -0.0):
        check(params, jnp.full_like(x, zero))


def test_the_ends_of_the_range():
    """Without normalisation, which would bring everything back to ordinary size."""
    params, x = arguments(order="NHWC")
    tuned, plain = pair(with_gradient(partial(net, order="NHWC", normal=False)), params, x)
    tiny = float(jnp.finfo(np.float32).tiny)

    def check(params: Params, x: Any, least: float = 0.0) -> Any:
        found = tuned(params, x)
        assert_alike(found, plain(params, x), least)
        return found

    for factor in (1e-37, 1e-38, 1e-40, 1e30, 1e36):  # what is denormal may be zero, or what is less than 1 of
        check(params, factor * x, least=200 * tiny)
    small = jax.tree.map(lambda k: 1e-20 * k, params)  # of which no product is normal
    check(small, 1e-20 * x, least=200 * tiny)
    # Where every product is too large, sums are infinite, or NaN where both signs meet, in any order.
    large, signs = (jax.tree.map(jnp.sign, each) for each in (params, x))
    large = jax.tree.map(lambda k: 1e30 * k, large)
    assert not np.isfinite(check(large, 1e30 * signs)[0][0]).any()
    assert np.isposinf(check(jax.tree.map(jnp.abs, large), 1e30 * jnp.abs(signs))[0][0]).all()


def test_cancellation():
    """Of large terms next to nothing is left: the error (rms, against float64) is at most twice XLA's. Kernel gradients
    keep what is large where images are: there it may be what strict numerics allow, too."""
    params, x = arguments(features=8, size=16)
    kernels = {name: params[name] for name in ("depthwise", "grouped", "pointwise", "up")}
    for name, k in kernels.items():
        for axes in [(2, 3)] if k.shape[2] > 1 else [0, 1]:
            kernels[name] = kernels[name] - kernels[name].mean(axes, keepdims=True)
    images = conv(x, params["stem"], "NCHW")
    images = images - images.mean((0, 2, 3), keepdims=True)

    def f(p: Params, xs: Params) -> Params:
        valid = partial(conv, order="NCHW", padding=((0, 0), (0, 0)))
        return {
            "depthwise": valid(xs["depthwise"], p["depthwise"], feature_group_count=8),
            "grouped": valid(xs["grouped"], p["grouped"], feature_group_count=2),
            "pointwise": valid(xs["pointwise"], p["pointwise"]),
            "up": valid(xs["up"], p["up"], lhs_dilation=(2, 2)),
        }

    def with_pull_back(p: Params, xs: Params, cotangents: Params) -> Any:
        out, back = jax.vjp(f, p, xs)
        return out, back(cotangents)

    def rms(tree: Any) -> dict[str, float]:
        leaves = jax.tree.leaves_with_path(tree)
        return {jax.tree_util.keystr(path): float(np.sqrt(np.mean(np.asarray(x) ** 2))) for path, x in leaves}

    def errors(found: Any, exact: Any) -> dict[str, float]:
        return rms(jax.tree.map(lambda a, b: np.asarray(a) - b, found, exact))

    xs = dict.fromkeys(kernels, images)
    noise = {
        name: np.random.default_rng(1).standard_normal(out.shape, np.float32)
        for name, out in jax.eval_shape(f, kernels, xs).items()
    }
    tuned, plain = pair(with_pull_back, kernels, xs, noise)

    def raised(each: Any) -> Any:
        return jax.tree.map(lambda a: 1e4 + a, each)

    positions = 2 * 16 * 16  # are summed in a kernel gradient, at most
    for args in ((kernels, raised(xs), noise), (kernels, xs, raised(noise))):
        with jax.enable_x64(True):
            wide_args = jax.tree.map(partial(jnp.asarray, dtype=np.float64), args)
            exact = jax.tree.map(np.asarray, jax.jit(with_pull_back)(*wide_args))
        ours, theirs = errors(tuned(*args), exact), errors(plain(*args), exact)
        assert len(ours) == 12 and min(theirs.values()) > 0
        large = {name: size for name, size in rms(exact).items() if name.startswith("[1][0]") and size > 1e4}
        assert len(large) == (4 if args[2] is noise else 0)
        for name, error in ours.items():
            strict = 3 * np.finfo(np.float32).eps * positions**0.5 * large.get(name, 0.0)
            assert error <= max(2 * theirs[name], strict), name


@pytest.mark.parametrize(
    "sizes",
    [{"batch": 0}, {"size": 1}, {"features": 1}, {"batch": 1, "size": 1, "features": 1}],
    ids=str,
)
def test_empty_and_unit_axes(sizes):
    args = arguments(**sizes)
    tuned, plain = pair(with_gradient(net), *args)
    assert_close(tuned(*args), plain(*args))


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16", "complex64", "int32", "int8"])
def test_dtypes(dtype):
    with jax.enable_x64(dtype == "float64"):
        args = arguments(dtype=np.dtype(jnp.dtype(dtype)))
        f = partial(net, normal=dtype in ("float64", "bfloat16", "float16"))
        tuned, plain = pair(with_gradient(f) if dtype in ("float64", "bfloat16") else f, *args)
        assert_close(tuned(*args), plain(*args))


def test_mixed_dtypes():
    """Half precision summed and kept in single, eight bits in 32, and casts in between."""
    params, x = arguments(dtype=np.float32)

    def mixed(p: Params, x: Any) -> Any:
        half = jax.tree.map(lambda k: k.astype(jnp.bfloat16), p)
        y = conv(x.astype(jnp.bfloat16), half["stem"], "NCHW", strides=2, preferred_element_type=jnp.float32)
        y = jax.nn.silu(y).astype(jnp.float16)
        y = y + conv(y, p["depthwise"].astype(jnp.float16), "NCHW", feature_group_count=6)
        y = conv(y.astype(jnp.float32), p["grouped"], "NCHW", feature_group_count=2)
        return conv(y.astype(jnp.bfloat16), half["pointwise"], "NCHW"), y

    def quantised(p: Params, x: Any) -> Any:
        small = jax.tree.map(lambda k: jnp.clip(jnp.round(64 * k), -127, 127).astype(jnp.int8), p)
        y = jnp.clip(jnp.round(64 * x), -127, 127).astype(jnp.int8)
        wide = []
        for name, strides, groups in (("stem", 2, 1), ("depthwise", 1, 6), ("grouped", 1, 2), ("pointwise", 1, 1)):
            total = conv(
                y, small[name], "NCHW", strides=strides, feature_group_count=groups, preferred_element_type=jnp.int32
            )
            wide.append(total)
            y = jnp.clip(total // 64, -127, 127).astype(jnp.int8)
        return wide, y.astype(jnp.float32) / 64

    tuned, plain = pair(mixed, params, x)
    assert_close(tuned(params, x), plain(params, x), least=0.05)
    tuned, plain = pair(quantised, params, x)
    jax.tree.map(np.testing.assert_array_equal, tuned(params, x), plain(params, x))
