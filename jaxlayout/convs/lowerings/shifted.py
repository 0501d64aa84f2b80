"""`shifted`: a depthwise convolution as a sum of shifted multiply-adds."""

import itertools
import math
from collections.abc import Iterable
from functools import reduce
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxlayout.convs.lowering import Lowering
from jaxlayout.convs.materialise import materialise
from jaxlayout.convs.signature import ConvSignature
from jaxlayout.layout import ConvDimensionNumbers, ConvLayout, KernelLayout
from jaxlayout.runtime._compat import BARRIERS_STAY

MAX_TAPS = 128
"""Every tap is a term of one expression: beyond this it compiles slowly and gains little."""


class Shifted(Lowering):
    """Where a group has one input feature nothing is summed over features, so out is the sum, over the taps of the
    kernel, of a shifted (strided, dilated) view of lhs times the tap's weights, one per feature: the definition
    (XLA operation semantics, ConvWithGeneralPadding) with the taps outermost, one fused pass over out.

    Applies to groups of one input feature with any multiplier (out feature = group * multiplier + m), stride,
    padding and both dilations, up to `MAX_TAPS` taps. Native in channels last and in channels first, out as lhs,
    with the kernel in any order. Memory: lhs padded and dilated, or nothing (`_few_edges`).
    Accuracy: products and sums in the dtype of out, half precision in float32 and rounded once, as in XLA. A
    NaN in lhs reaches only the outputs that read it, a NaN weight only outputs of its feature.

    Fast on CPU takes three things: a barrier behind the padding, without which XLA reads lhs and its padded copy
    side by side; a partial sum for each row of the kernel, as one chain of multiply-adds is bound by its latency;
    and no copy at all where few taps reach over the edge.
    """

    name = "shifted"
    convolves = False
    version = 5
    any_kernel = True
    rereads = True

    def dimension_numbers(self, conv: ConvSignature) -> Iterable[ConvDimensionNumbers]:
        numeric = jnp.issubdtype(conv.lhs_dtype, np.number)
        depthwise = conv.kernel_features == conv.batch_groups == 1
        if not (numeric and depthwise and math.prod(conv.kernel) <= MAX_TAPS):
            return
        last, first = ConvLayout.channels_last(conv.rank), ConvLayout.channels_first(conv.rank)
        yield ConvDimensionNumbers(last, KernelLayout.io_last(conv.rank), last)
        yield ConvDimensionNumbers(first, KernelLayout.oi_first(conv.rank), first)

    def prepare(self, conv: ConvSignature, dims: ConvDimensionNumbers, rhs: jax.Array) -> jax.Array:
        """The weights of each tap, one vector of all out features after the other: a tap's are a slice."""
        taps, spatial = math.prod(conv.kernel), dims.rhs.spatial
        if BARRIERS_STAY or dims.rhs.axes.startswith(spatial):
            rhs = lax.transpose(rhs, [dims.rhs.axes.index(a) for a in spatial + "IO"])
            return lax.optimization_barrier(lax.reshape(rhs, (rhs.size,)).astype(conv.accumulator))
        rhs = lax.transpose(rhs, [dims.rhs.axes.index(a) for a in "IO" + spatial])
        rhs = lax.reshape(rhs, (conv.out_features, taps)).astype(conv.accumulator)

        def add_tap(tap: jax.Array, rows: jax.Array) -> jax.Array:
            return lax.dynamic_update_index_in_dim(rows, lax.dynamic_index_in_dim(rhs, tap, 1, keepdims=False), tap, 0)

        # Only a loop is sure to be done by itself: elsewhere each tap's weights would be gathered at every position.
        return lax.reshape(lax.fori_loop(0, taps, add_tap, lax.full(rhs.shape[::-1], 0, rhs.dtype)), (rhs.size,))

    def apply(self, conv: ConvSignature, dims: ConvDimensionNumbers, lhs: jax.Array, prepared: jax.Array) -> jax.Array:
        if not dims.lhs.is_channels_last:  # or LLVM does not vectorise the conversion of bfloat16
            lhs = lhs.astype(prepared.dtype)
        sizes, low = conv.spatial, [lo for lo, _ in conv.padding]
        if not _few_edges(conv, dims):
            padding = [(lo, hi, d - 1) for (lo, hi), d in zip(conv.padding, conv.lhs_dilation, strict=True)]
            lhs = lax.pad(lhs, lax.full((), 0, lhs.dtype), _frame(dims, padding, *[(0, 0, 0)] * 2))
            sizes, low = lhs.shape[1:-1] if dims.lhs.is_channels_last else lhs.shape[2:], [0] * conv.rank
        groups, outs, at_features = conv.feature_groups, conv.out_features, dims.lhs.axes.index("C")
        features = (groups,) if groups == outs else (groups, outs // groups)  # the multiplier
        zero, rows = lax.full((), 0, prepared.dtype), {}
        for i, tap in enumerate(itertools.product(*map(range, conv.kernel))):
            at = [t * d - lo for t, d, lo in zip(tap, conv.rhs_dilation, low, strict=True)]
            spans = [_span(*axis) for axis in zip(at, sizes, conv.strides, conv.out_spatial, strict=True)]
            if any(a >= b for a, b in spans):
                continue
            start = [a * s + p for (a, _), s, p in zip(spans, conv.strides, at, strict=True)]
            stop = [(b - 1) * s + p + 1 for (_, b), s, p in zip(spans, conv.strides, at, strict=True)]
            limits = _frame(dims, stop, conv.batch, conv.in_features)
            view = lax.slice(lhs, _frame(dims, start, 0, 0), limits, _frame(dims, conv.strides, 1, 1))
            view = lax.expand_dims(view, range(at_features + 1, at_features + len(features)))
            weights = lax.reshape(lax.slice(prepared, [i * outs], [i * outs + outs]), features)
            met = _frame(dims, [b - a for a, b in spans], conv.batch, *features)
            over = range(at_features, at_features + len(features))
            term = view.astype(prepared.dtype) * lax.broadcast_in_dim(weights, met, over)
            edges = [(a, o - b, 0) for (a, b), o in zip(spans, conv.out_spatial, strict=True)]
            if any(lo or hi for lo, hi, _ in edges):
                term = lax.pad(term, zero, _frame(dims, edges, *[(0, 0, 0)] * (len(features) + 1)))
            row = (*tap[:-1], tap[-1] // 8) if tap else ()
            rows[row] = lax.add(rows[row], term) if row in rows else term
        shape = conv.out_shape(dims.out)
        if not rows:
            return lax.full(shape, 0, conv.out_dtype)
        out = lax.reshape(reduce(lax.add, rows.values()), shape).astype(conv.out_dtype)
        return materialise(out, prepared)  # or the taps would go into the fusion of each consumer


def _span(at: int, size: int, stride: int, outputs: int) -> tuple[int, int]:
    """The outputs, from and to, of which a tap reads an element: number o reads element o * stride + at."""
    return max(0, -(at // stride)), min(outputs, (size - 1 - at) // stride + 1)


def _frame(dims: ConvDimensionNumbers, spatial: Iterable[Any], batch: Any, *features: Any) -> tuple[Any, ...]:
    """Values for each axis of an image, its features split in groups and multiplier."""
    return (batch, *spatial, *features) if dims.lhs.is_channels_last else (batch, *features, *spatial)


def _few_edges(conv: ConvSignature, dims: ConvDimensionNumbers) -> bool:
    """Whether to add up views of lhs itself, each product padded where its tap reads over the edge, and write no copy.

    LLVM has to move the conditions of all taps out of its innermost loop. Measured on XLA:CPU, it does so with
    channels innermost and up to three taps along each of at most two axes, and that wins 1.3 to 2 times; otherwise
    it loses up to 6.
    """
    small = conv.rank <= 2 and max(conv.kernel, default=1) <= 3
    return small and dims.lhs.is_channels_last and all(d == 1 for d in conv.lhs_dilation)
