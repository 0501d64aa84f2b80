"""The kinds of step that a drawn program is made of: each draws its parameters, around convolutions and in loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from builder import LARGEST, Builder, Input, apply_random_step, step
from hypothesis import strategies as st
from jax import lax

from jaxlayout.layout import ConvLayout, KernelLayout
from jaxlayout.runtime._compat import KNOWN_BAD

READS_PAST_LHS = "48713" in KNOWN_BAD.get(version("jaxlib"), "")
"""Plain JAX is wrong about convolutions that cross (`test_crossing`): programs are held against it."""


# Convolutions


@st.composite
def conv_params(draw: Any, shape: tuple[int, ...], exact: bool = True) -> tuple[tuple[int, ...], dict[str, Any]] | None:
    """The kernel shape and parameters of a convolution over an array of some shape in a random order; None where
    there is none."""
    ndim, spatial = len(shape), len(shape) - 2
    common = draw(st.booleans())
    if common:
        images = draw(st.sampled_from([ConvLayout.channels_first(spatial), ConvLayout.channels_last(spatial)]))
        kernels = draw(st.sampled_from([KernelLayout.io_last(spatial), KernelLayout.oi_first(spatial)]))
        lhs_spec, rhs_spec, out_spec = images.spec, kernels.spec, images.spec
    else:
        lhs_spec, rhs_spec, out_spec = (tuple(draw(st.permutations(range(ndim)))) for _ in range(3))
    batch, features, *sizes = (shape[i] for i in lhs_spec)
    groups = draw(st.sampled_from([g for g in range(1, features + 1) if features % g == 0]))
    batch_groups = 1
    if groups == 1 and draw(st.integers(0, 3)) == 3:
        batch_groups = draw(st.sampled_from([g for g in range(1, batch + 1) if batch % g == 0]))
    multiple = groups * batch_groups
    out_features = multiple * draw(st.integers(1, max(1, 6 // multiple)))
    kernel, strides, padding, lhs_dilation, rhs_dilation = [], [], [], [], []
    plain = draw(st.booleans())
    for size in sizes:
        k, s = draw(st.integers(1, 3)), draw(st.integers(1, 2))
        lo, hi, ld, rd = 0, 0, 1, 1
        if not plain:
            lo, hi = draw(st.integers(-1, 2)), draw(st.integers(-1, 2))
            ld, rd = draw(st.integers(1, 2)), draw(st.integers(1, 2))
        elif draw(st.booleans()):
            lo, hi = (k - 1) // 2, k // 2  # 'SAME'
        if (size - 1) * ld + 1 + lo + hi < (k - 1) * rd + 1:
            lo, hi, k, rd = max(lo, 0), max(hi, 0), 1, 1
        if (size - 1) * ld + lo + hi >= 10:
            ld, lo, hi = 1, 0, 0
            if size < (k - 1) * rd + 1:
                k, rd = 1, 1
        if READS_PAST_LHS and (lo < 0 < hi or lo > (k - 1) * rd):  # it would be wrong, or its input gradient
            lo, hi = min(max(lo, 0), (k - 1) * rd), max(hi, 0)
        if (lo, hi, ld, rd, s) == (0, 0, k, 1, k - 1):  # XLA may end the process (`ConvSignature.misread`)
            hi = 1
        kernel.append(k)
        strides.append(s)
        padding.append((lo, hi))
        lhs_dilation.append(ld)
        rhs_dilation.append(rd)
    sizes_of_kernel = (out_features, features // groups, *kernel)
    rhs_shape = tuple(size for _, size in sorted(zip(rhs_spec, sizes_of_kernel, strict=True)))
    if math.prod(rhs_shape) > LARGEST:
        return None
    return rhs_shape, {
        "window_strides": tuple(strides),
        "padding": tuple(padding),
        "lhs_dilation": tuple(lhs_dilation),
        "rhs_dilation": tuple(rhs_dilation),
        "feature_group_count": groups,
        "batch_group_count": batch_groups,
        "dimension_numbers": lax.ConvDimensionNumbers(tuple(lhs_spec), tuple(rhs_spec), tuple(out_spec)),
    }


@step(rank=2, weight=8)
def conv(b: Builder, x: str) -> str | None:
    found = b.draw(conv_params(b.shape(x))) if b.rank(x) <= 5 else None
    dtype = b.values[x].dtype
    growing = jnp.issubdtype(dtype, np.complexfloating) and b.convolutions >= 2
    if found is None or growing:
        return None
    rhs_shape, params = found
    options: dict[str, Any] = {}
    if dtype in (jnp.bfloat16, jnp.float16) and b.draw(st.booleans()):
        options["preferred_element_type"] = jnp.dtype("float32")
    if jnp.issubdtype(dtype, np.floating):
        options["precision"] = b.one(None, "highest", ("default", "high"))
    kernel = b.input(rhs_shape, dtype, high=1, low=-1)
    out_features = rhs_shape[params["dimension_numbers"].rhs_spec[0]]
    scale = (out_features / math.prod(rhs_shape)) ** 0.5

    def fun(x: Any, k: Any) -> Any:
        whole = b.exact or not jnp.issubdtype(dtype, jnp.inexact)
        return lax.conv_general_dilated(x, k if whole else scale * k, **params, **options)

    lhs, rhs, out = (
        layout.from_spec(spec).axes
        for layout, spec in zip((ConvLayout, KernelLayout, ConvLayout), params["dimension_numbers"], strict=True)
    )
    rest = {k: v for k, v in (params | options).items() if k != "dimension_numbers"}
    b.convolutions += 1
    return b.tame(b.do(f"conv[{lhs},{rhs}->{out} {rest}]", fun, x, kernel))


# Elementwise


def _vector(b: Builder, x: str, axis: int) -> tuple[str, Callable[[Any], Any]]:
    """An argument for one axis of x, and how it is broadcast over the others."""
    ndim, size = b.rank(x), b.shape(x)[axis]
    form = b.one("reshape", "expand", "broadcast", "newaxis")
    shape = b.shape(x)

    def spread(v: Any) -> Any:
        if form == "reshape":
            return jnp.reshape(v, [size if i == axis else 1 for i in range(ndim)])
        if form == "expand":
            return lax.expand_dims(v, [i for i in range(ndim) if i != axis])
        if form == "broadcast":
            return lax.broadcast_in_dim(v, shape, (axis,))
        return v[tuple(slice(None) if i == axis else None for i in range(ndim))]

    return b.input([size], b.values[x].dtype, high=1, low=-1), spread


@step(dtypes="real", when="kinked")
def bias_relu(b: Builder, x: str) -> str:
    axis = b.axis(x)
    bias, spread = _vector(b, x, axis)
    return b.tame(b.do(f"bias{axis}_relu", lambda x, v: jax.nn.relu(x + spread(v)), x, bias))


@step()
def bias(b: Builder, x: str) -> str:
    axis = b.axis(x)
    vector, spread = _vector(b, x, axis)
    return b.tame(b.do(f"bias{axis}", lambda x, v: x + spread(v), x, vector))


@step()
def batch_norm(b: Builder, x: str) -> str:
    axis = b.axis(x)
    scale, spread = _vector(b, x, axis)
    shift, spread2 = _vector(b, x, axis)
    return b.tame(b.do(f"norm{axis}", lambda x, s, t: (x - spread2(t)) * spread(s), x, scale, shift))


@step(dtypes="float", when="smooth")
def batch_norm_statistics(b: Builder, x: str) -> str:
    axes = b.axes(x)

    def fun(x: Any) -> Any:
        mean = jnp.mean(x, axes, keepdims=True)
        return (x - mean) * lax.rsqrt(jnp.var(x, axes, keepdims=True) + 0.5)

    return b.do(f"batch_norm{axes}", fun, x)


@step(dtypes="float", when="smooth")
def activation(b: Builder, x: str) -> str:
    name = b.one("silu", "gelu", "tanh", "sigmoid", "hard_swish" if b.kinks else "softplus", "soft_sign")
    return b.do(name, getattr(jax.nn, name), x)


@jax.custom_vjp
def round_through(x: Any) -> Any:
    """A straight-through estimator: rounds to even, and has the derivative 1."""
    return 2 * jnp.round(0.5 * x)


round_through.defvjp(lambda x: (round_through(x), None), lambda _, ct: (ct,))


@jax.custom_vjp
def gate(x: Any, w: Any) -> tuple[Any, Any]:
    """Two operands and two results, residuals of both ranks, and a derivative that is not its own."""
    return x * w, jnp.sum(x, 0)


def _gate_backward(saved: Any, cts: Any) -> tuple[Any, Any]:
    x, w, total = saved
    return 2 * cts[0] * w + cts[1][None] * (total >= 0), 3 * cts[0] * x


gate.defvjp(lambda x, w: (gate(x, w), (x, w, jnp.sum(x))), _gate_backward)


@jax.custom_jvp
def steep(x: Any) -> Any:
    """The identity, with the derivative 3 where x > 0 and 2 elsewhere."""
    return x + 0


@steep.defjvp
def _steep_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    (x,), (t,) = primals, tangents
    return steep(x), jnp.where(x > 0, 3, 2).astype(x.dtype) * t


@step(dtypes="float", when="exact")
def straight_through(b: Builder, x: str) -> str:
    b.forward = False
    return b.do("round_through", round_through, x)


@step(dtypes="float", when="exact")
def gated(b: Builder, x: str) -> str:
    b.forward = False
    product, total = b.do("gate", gate, x, b.input(b.shape(x), b.values[x].dtype, high=1, low=-1))
    b.tame(total)
    return b.tame(product)


@step(dtypes="float", when="kinked")
def own_jvp(b: Builder, x: str) -> str:
    return b.do("steep", steep, x)


@step()
def residual(b: Builder, x: str) -> str | None:
    """x and another value, transposed first if need be."""
    shape, dtype = b.shape(x), b.values[x].dtype
    if len(shape) > 5:
        return None
    same = [y for y, v in b.values.items() if sorted(v.shape) == sorted(shape) and v.dtype == dtype]
    y = b.draw(st.sampled_from(same))
    if b.shape(y) != shape:
        left = list(range(len(shape)))
        order = [left.pop(next(i for i, a in enumerate(left) if b.shape(y)[a] == size)) for size in shape]
        y = b.do(f"transpose{order}", lambda y: lax.transpose(y, order), y)
    if not b.exact:
        names = ("add", "subtract", "gated")
    elif np.issubdtype(dtype, complex):
        names = ("add", "subtract")
    else:
        names = ("add", "subtract", "multiply", "maximum")
    name = b.one(*names)
    if name == "gated":
        return b.do("mul_tanh", lambda x, y: x * jnp.tanh(y), x, y)
    return b.tame(b.do(name, getattr(jnp, name), x, y))


@step(dtypes="any")
def where(b: Builder, x: str) -> str:
    form = b.one("mask", "vector", "scalar")
    shape = b.shape(x)
    if form == "mask":
        mask = b.input(shape, "bool", 1, 0)
        return b.do("where_mask", lambda x, m: jnp.where(m, x, jnp.zeros_like(x)), x, mask)
    if form == "scalar":
        mask = b.input((), "bool", 1, 0)
        return b.do("select_scalar", lambda x, m: lax.select_n(m, x, jnp.zeros_like(x)), x, mask)
    axis = b.axis(x)
    mask = b.input([shape[axis]], "bool", 1, 0)
    wide = [shape[axis] if i == axis else 1 for i in range(len(shape))]
    return b.do(f"where{axis}", lambda x, m: jnp.where(m.reshape(wide), x, jnp.ones_like(x)), x, mask)


@step(dtypes="real")
def positions(b: Builder, x: str) -> str:
    axis, dtype = b.axis(x), b.values[x].dtype
    scale = 1 if b.exact else 0.1

    def fun(x: Any) -> Any:
        return x + (scale * lax.broadcasted_iota(jnp.int32, x.shape, axis) % 3).astype(dtype)

    return b.tame(b.do(f"iota{axis}", fun, x))


@step(dtypes="any", when="exact")
def cast(b: Builder, x: str) -> str:
    old = b.values[x].dtype
    dtype = b.one("float32", "bfloat16", "float16", "int32", *(["float64"] if b.x64 else []))
    if jnp.issubdtype(old, np.complexfloating):
        return b.do("real", jnp.real, x)
    return b.do(f"to_{dtype}", lambda x: x.astype(dtype), x)


@step(dtypes="real", when="exact")
def compare(b: Builder, x: str) -> str:
    return b.do("positive", lambda x: x > 0, x)


@step(dtypes="any")
def constant(b: Builder, x: str) -> str:
    """An array that the program closes over."""
    shape, dtype = b.shape(x), b.values[x].dtype
    array = np.asarray(np.arange(math.prod(shape)).reshape(shape) % 3 - 1, dtype)
    if dtype == np.bool_:
        return b.do("xor_constant", lambda x: x ^ jnp.asarray(array), x)
    return b.tame(b.do("add_constant", lambda x: x + jnp.asarray(array), x))


@step(dtypes="number")
def weak(b: Builder, x: str) -> str:
    """A weakly typed value beside, and Python scalars."""
    shape = b.shape(x)
    b.do("full", lambda: jnp.broadcast_to(jnp.asarray(2), shape) * 1)
    return b.tame(b.do("times_2", lambda x: 2 * x, x))


# Moving axes


@step(dtypes="any", rank=2)
def transpose(b: Builder, x: str) -> str:
    order = b.draw(st.permutations(range(b.rank(x))))
    return b.do(f"transpose{order}", lambda x: lax.transpose(x, order), x)


@step(dtypes="any", rank=2)
def merge(b: Builder, x: str) -> str:
    shape = b.shape(x)
    first = b.draw(st.integers(0, len(shape) - 2))
    last = b.draw(st.integers(first + 2, len(shape)))
    new = (*shape[:first], math.prod(shape[first:last]), *shape[last:])
    return b.do(f"reshape{new}", lambda x: jnp.reshape(x, new), x)


@step(dtypes="any")
def divide(b: Builder, x: str) -> str | None:
    shape = b.shape(x)
    cuts = [(i, d) for i, n in enumerate(shape) for d in range(2, n) if n % d == 0]
    if not cuts or len(shape) > 4:
        return None
    axis, by = b.draw(st.sampled_from(cuts))
    new = (*shape[:axis], by, shape[axis] // by, *shape[axis + 1 :])
    return b.do(f"reshape{new}", lambda x: jnp.reshape(x, new), x)


@step(dtypes="any", rank=2)
def regroup(b: Builder, x: str) -> str | None:
    """A reshape that neither merges nor splits whole axes."""
    shape = b.shape(x)
    new = (*shape[:-2], shape[-1], shape[-2])
    return b.do(f"reshape{new}", lambda x: jnp.reshape(x, new), x)


@step(dtypes="any", rank=0)
def add_unit(b: Builder, x: str) -> str | None:
    if b.rank(x) > 4:
        return None
    axis, shape = b.draw(st.integers(0, b.rank(x))), b.shape(x)
    if b.draw(st.booleans()):
        return b.do(f"expand{axis}", lambda x: jnp.expand_dims(x, axis), x)
    new = (*shape[:axis], 1, *shape[axis:])
    return b.do(f"reshape{new}", lambda x: lax.reshape(x, new), x)


@step(dtypes="any", weight=4)
def drop_unit(b: Builder, x: str) -> str | None:
    shape = b.shape(x)
    units = [i for i, n in enumerate(shape) if n == 1]
    if not units:
        return add_unit(b, x)
    axes = sorted(b.draw(st.sets(st.sampled_from(units), min_size=1)))
    new = tuple(n for i, n in enumerate(shape) if i not in axes)
    if b.draw(st.booleans()):
        return b.do(f"squeeze{axes}", lambda x: lax.squeeze(x, axes), x)
    return b.do(f"reshape{new}", lambda x: lax.reshape(x, new), x)


@step(dtypes="any", rank=2)
def group_norm_shape(b: Builder, x: str) -> str | None:
    """Split an axis, sum over a part and all that follows, and put it together again."""
    shape = b.shape(x)
    cuts = [(i, d) for i, n in enumerate(shape) for d in range(2, n) if n % d == 0]
    if not cuts or len(shape) > 4 or b.values[x].dtype == bool:
        return None
    axis, by = b.draw(st.sampled_from(cuts))
    new = (*shape[:axis], by, shape[axis] // by, *shape[axis + 1 :])
    axes = tuple(range(axis + 1, len(new)))
    weight = 1 if b.exact else 0.1

    def fun(x: Any) -> Any:
        y = jnp.reshape(x, new)
        return jnp.reshape(y - (weight * jnp.sum(y, axes, keepdims=True)).astype(y.dtype), shape)

    return b.tame(b.do(f"group_norm{new}", fun, x))


# Cutting and joining


@step(dtypes="number")
def pad(b: Builder, x: str) -> str | None:
    config = [(b.draw(st.integers(-1, 1)), b.draw(st.integers(0, 1)), b.draw(st.integers(0, 1))) for _ in b.shape(x)]
    config = [(max(lo, 1 - n), hi, mid) for (lo, hi, mid), n in zip(config, b.shape(x), strict=True)]
    if math.prod(lo + hi + n + (n - 1) * mid for (lo, hi, mid), n in zip(config, b.shape(x), strict=True)) > LARGEST:
        return None
    value = b.one(0, 1)
    return b.do(f"pad{config}", lambda x: lax.pad(x, x.dtype.type(value), config), x)


@step(dtypes="any")
def concatenate(b: Builder, x: str) -> str | None:
    axis, shape = b.axis(x), b.shape(x)
    same = [
        y
        for y, v in b.values.items()
        if v.dtype == b.values[x].dtype and len(v.shape) == len(shape)
        if all(m == n for i, (m, n) in enumerate(zip(v.shape, shape, strict=True)) if i != axis)
    ]
    y = b.draw(st.sampled_from(same))
    if math.prod(shape) + math.prod(b.shape(y)) > LARGEST or shape[axis] + b.shape(y)[axis] > 12:
        return None
    return b.do(f"concatenate{axis}", lambda x, y: lax.concatenate([x, y], axis), x, y)


@step(dtypes="any")
def slice_(b: Builder, x: str) -> str:
    cuts = []
    for n in b.shape(x):
        start = b.draw(st.integers(0, n - 1))
        cuts.append((start, b.draw(st.integers(start + 1, n)), b.draw(st.integers(1, 2))))
    starts, stops, strides = zip(*cuts, strict=True)
    return b.do(f"slice{cuts}", lambda x: lax.slice(x, starts, stops, strides if max(strides) > 1 else None), x)


@step(dtypes="any")
def dynamic_slice(b: Builder, x: str) -> str:
    shape = b.shape(x)
    sizes = [b.draw(st.integers(1, n)) for n in shape]
    starts = [b.input((), "int32", n - 1, -1) for n in shape]
    return b.do(f"dynamic_slice{sizes}", lambda x, *at: lax.dynamic_slice(x, at, sizes), x, *starts)


@step(dtypes="number")
def dynamic_update_slice(b: Builder, x: str) -> str:
    shape = b.shape(x)
    update = b.input([b.draw(st.integers(1, n)) for n in shape], b.values[x].dtype)
    starts = [b.input((), "int32", n - 1, 0) for n in shape]
    fun = lambda x, u, *at: lax.dynamic_update_slice(x, u, at)  # noqa: E731
    return b.do("dynamic_update_slice", fun, x, update, *starts)


@step(dtypes="any")
def split(b: Builder, x: str) -> str | None:
    axis = b.axis(x)
    size = b.shape(x)[axis]
    if size < 2:
        return None
    at = b.draw(st.integers(1, size - 1))
    parts = b.do(f"split{axis}@{at}", lambda x: tuple(lax.split(x, (at, size - at), axis)), x)
    return b.draw(st.sampled_from(parts))


@step(dtypes="any")
def rev(b: Builder, x: str) -> str:
    axes = b.axes(x)
    return b.do(f"rev{axes}", lambda x: lax.rev(x, axes), x)


@step(dtypes="any")
def roll(b: Builder, x: str) -> str:
    axis = b.axis(x)
    return b.do(f"roll{axis}", lambda x: jnp.roll(x, 1, axis), x)


# Reducing


@step(rank=2)
def reduce_sum(b: Builder, x: str) -> str:
    axes, keep = b.axes(x), b.draw(st.booleans())
    return b.tame(b.do(f"sum{axes}{'k' * keep}", lambda x: jnp.sum(x, axes, keepdims=keep, dtype=x.dtype), x))


@step(dtypes="float", when="smooth", rank=2)
def reduce_mean(b: Builder, x: str) -> str:
    axes, keep = b.axes(x), b.draw(st.booleans())
    return b.do(f"mean{axes}{'k' * keep}", lambda x: jnp.mean(x, axes, keepdims=keep), x)


@step(dtypes="float", when="smooth", rank=1)
def softmax(b: Builder, x: str) -> str:
    axes = b.axes(x)
    return b.do(f"softmax{axes}", lambda x: jax.nn.softmax(x, axes), x)


@step(dtypes="real", when="kinked", rank=2, weight=4)
def reduce_max(b: Builder, x: str) -> str:
    axes, name = b.axes(x), b.one("max", "min")
    return b.do(f"{name}{axes}", lambda x: getattr(jnp, name)(x, axes), x)


@step(dtypes="real", when="exact", rank=2, weight=4)
def argmax(b: Builder, x: str) -> str:
    """Beside the value: which element is largest."""
    axis, name = b.axis(x), b.one("argmax", "argmin")
    b.do(f"{name}{axis}", lambda x: getattr(jnp, name)(x, axis), x)
    return x


@step(dtypes="any", when="exact", rank=2)
def any_(b: Builder, x: str) -> str:
    axes, name = b.axes(x), b.one("any", "all")
    b.do(f"{name}{axes}", lambda x: getattr(jnp, name)(x, axes), x)
    return x


@step()
def cumulative_sum(b: Builder, x: str) -> str:
    axis, reverse = b.axis(x), b.draw(st.booleans())
    return b.tame(b.do(f"cumsum{axis}", lambda x: lax.cumsum(x, axis, reverse=reverse), x))


@step(dtypes="real", when="kinked")
def cumulative_max(b: Builder, x: str) -> str:
    axis = b.axis(x)
    return b.do(f"cummax{axis}", lambda x: lax.cummax(x, axis), x)


@step(dtypes="real", rank=2, weight=4)
def pool(b: Builder, x: str) -> str | None:
    shape = b.shape(x)
    window = [b.draw(st.integers(1, min(3, n))) for n in shape]
    strides = [b.draw(st.integers(1, 2)) for _ in shape]
    padding = [(b.draw(st.integers(0, k - 1)), b.draw(st.integers(0, k - 1))) for k in window]
    kinked = jnp.issubdtype(b.values[x].dtype, np.floating) and (b.exact or b.kinks)
    kind = b.one("max", "min", "sum") if kinked else "sum"
    if kind == "sum":
        fun = lambda x: lax.reduce_window(x, x.dtype.type(0), lax.add, window, strides, padding)  # noqa: E731
    else:
        infinity = math.inf if kind == "min" else -math.inf
        op = lax.min if kind == "min" else lax.max

        def fun(x: Any) -> Any:
            return lax.reduce_window(x, x.dtype.type(infinity), op, window, strides, padding)

    return b.tame(b.do(f"{kind}_pool{window}{strides}{padding}", fun, x))


# Contracting


@step(rank=2)
def dot(b: Builder, x: str) -> str | None:
    """Contract one axis of x with a matrix."""
    axis, n = b.axis(x), b.draw(st.integers(1, 5))
    size, first = b.shape(x)[axis], b.draw(st.booleans())
    if np.issubdtype(b.values[x].dtype, complex):
        return None
    matrix = b.input((n, size) if first else (size, n), b.values[x].dtype, high=1, low=-1)
    scale = 1 if b.exact else size**-0.5

    def fun(x: Any, m: Any) -> Any:
        if first:
            return lax.dot_general(m, x, (((1,), (axis,)), ((), ())))
        return (scale * lax.dot_general(x, m, (((axis,), (0,)), ((), ())))).astype(x.dtype)

    return b.tame(b.do(f"dot{axis}", fun, x, matrix))


@step(dtypes="float", rank=2)
def einsum(b: Builder, x: str) -> str | None:
    """With batch axes, of x with an argument whose axes stand in any order."""
    shape = b.shape(x)
    letters = "abcdefgh"[: len(shape)]
    contracted = b.draw(st.sampled_from(letters))
    batch = "".join(c for c in letters if c != contracted and b.draw(st.booleans()))
    second = "".join(b.draw(st.permutations(batch + contracted + "z")))
    free = "".join(c for c in letters if c not in batch + contracted)
    batch = "".join(b.draw(st.permutations(batch)))
    out = "".join(b.draw(st.permutations(batch + free + "z")))
    sizes = dict(zip(letters, shape, strict=True)) | {"z": b.draw(st.integers(1, 3))}
    if math.prod(sizes[c] for c in out) > LARGEST:
        return None
    y = b.input([sizes[c] for c in second], b.values[x].dtype, high=1, low=-1)
    if b.draw(st.booleans()):
        text = f"{letters},{second}->{out}"
        return b.tame(b.do(text, lambda x, y: jnp.einsum(text, x, y), x, y))
    numbers = (
        ((letters.index(contracted),), (second.index(contracted),)),
        (tuple(map(letters.index, batch)), tuple(map(second.index, batch))),
    )
    return b.tame(b.do(f"dot_general{numbers}", lambda x, y: lax.dot_general(x, y, numbers), x, y))


# Barriers, calls and names


@step(dtypes="real", when="kinked")
def sort(b: Builder, x: str) -> str:
    axis = b.axis(x)
    return b.do(f"sort{axis}", lambda x: lax.sort(x, axis), x)


@step(dtypes="any")
def gather(b: Builder, x: str) -> str:
    axis = b.axis(x)
    index = b.input([b.draw(st.integers(1, 4))], "int32", b.shape(x)[axis] - 1, 0)
    return b.do(f"take{axis}", lambda x, i: jnp.take(x, i, axis, mode="clip"), x, index)


def _inner(
    b: Builder,
    x: str,
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]],
    name: str,
    twice: bool,
    *more: str,
) -> Any:
    """Some steps as one function, called once, or on its own result too where that fits. `more`: operands that what is
    wrapped around it takes before its own."""
    if b.depth > 1:
        return None
    inner = Builder(b.draw, exact=b.exact, dtype=b.dtype, kinks=b.kinks, x64=b.x64)
    inner.depth, inner.convolutions = b.depth + 1, b.convolutions
    value = b.values[x]
    first = y = inner.add_input(Input(value.shape, value.dtype, 0, 0))
    for _ in range(b.draw(st.integers(1, 3))):
        y = apply_random_step(inner, y)
    b.forward &= inner.forward
    b.convolutions = inner.convolutions
    extras = [b.add_input(spec) for key, spec in inner.inputs.items() if key != first]
    names, steps, results = tuple(inner.inputs), tuple(inner.steps), inner.loose_ends(y)

    def body(*args: Any) -> Any:
        env = dict(zip(names, args, strict=True))
        for s in steps:
            out = s.fun(*(env[o] for o in s.operands))
            env.update(zip(s.results, out if isinstance(out, tuple | list) else (out,), strict=True))
        return tuple(env[name] for name in results)

    text = "; ".join(f"{','.join(s.results)}={s.text}({','.join(s.operands)})" for s in steps)
    function = wrap(body)
    out = b.do(f"{name}[{text} -> {results}]", function, x, *more, *extras)[0]
    if twice and b.values[out].shape == value.shape and b.values[out].dtype == value.dtype:
        out = b.do(f"the same {name}", function, out, *extras)[0]
    return b.tame(out)


@step(dtypes="any")
def inner_jit(b: Builder, x: str) -> str | None:
    return _inner(b, x, jax.jit, "jit", True)


@step(dtypes="any")
def scoped(b: Builder, x: str) -> str | None:
    return _inner(b, x, jax.named_scope("inner"), "scope", True)


@step(dtypes="number")
def checkpointed(b: Builder, x: str) -> str | None:
    policy = b.one(None, jax.checkpoint_policies.dots_saveable)
    return _inner(b, x, lambda body: jax.checkpoint(body, policy=policy), "checkpoint", False)


@step(dtypes="any")
def mapped(b: Builder, x: str) -> str | None:
    """A scan over the elements of an array of one axis more; the other operands stay as they are."""

    def wrap(body: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, *rest: lax.scan(lambda n, x: (n + 1, body(x, *rest)), 0, jnp.stack([x, x]))[1]

    return _inner(b, x, wrap, "map", False)


def _carried(body: Callable[..., Any], loop: Callable[..., Any]) -> Callable[..., Any]:
    """A loop that carries the first argument round; the body itself where its first result is something else."""

    def function(x: Any, *rest: Any) -> Any:
        first = jax.eval_shape(body, x, *rest)[0]
        same = first.shape == x.shape and first.dtype == x.dtype
        return loop(lambda x: body(x, *rest), x) if same else body(x, *rest)

    return function


@step(dtypes="any", weight=4)
def carried(b: Builder, x: str) -> str | None:
    def loop(body: Callable[..., Any], x: Any) -> Any:
        def again(carry: Any, _: Any) -> Any:
            return (body(carry[1])[0], carry[0]), carry[1]

        carry, olds = lax.scan(again, (x, x), None, length=3, reverse=True)
        return (*carry, olds)

    return _inner(b, x, lambda body: _carried(body, loop), "carry", False)


@step(dtypes="any")
def branched(b: Builder, x: str) -> str | None:
    which = b.input((), "int32", 1, 0)

    def wrap(body: Callable[..., Any]) -> Callable[..., Any]:
        def other(x: Any, *rest: Any) -> Any:
            return body(jnp.flip(x), *rest)

        return lambda x, i, *rest: lax.switch(i, [body, other], x, *rest)

    return _inner(b, x, wrap, "switch", False, which)
