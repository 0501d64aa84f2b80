"""`views`, `stacked_views`: what each tap of a convolution meets of lhs."""

import itertools
from collections.abc import Iterator

import jax
from jax import lax

from jaxlayout.convs.signature import ConvSignature
from jaxlayout.layout import ConvDimensionNumbers


def views(conv: ConvSignature, dims: ConvDimensionNumbers, lhs: jax.Array, *, by_position: bool) -> Iterator[jax.Array]:
    """lhs, padded, as each tap meets it at all positions of out, tap by tap; `by_position`: as each position of out
    meets it at all taps. Without lhs dilation, and where out has positions."""
    axes = [dims.lhs.axes.index(a) for a in dims.lhs.spatial]
    padding = [(0, 0, 0)] * lhs.ndim
    for axis, (lo, hi) in zip(axes, conv.padding, strict=True):
        padding[axis] = (lo, hi, 0)
    lhs = lax.pad(lhs, lax.full((), 0, lhs.dtype), padding)
    for spans in itertools.product(*_spans(conv, by_position)):
        low, high, strides = [0] * lhs.ndim, list(lhs.shape), [1] * lhs.ndim
        for axis, span in zip(axes, spans, strict=True):
            low[axis], high[axis], strides[axis] = span
        yield lax.slice(lhs, low, high, strides)


def stacked_views(conv: ConvSignature, dims: ConvDimensionNumbers, lhs: jax.Array, *, by_position: bool) -> jax.Array:
    """The same in one array, the taps (or positions) as axes of their own, before the last axis of lhs that is not
    spatial, or after it where spatial ones follow. One axis after the other, the last first: a slice for each tap of an
    axis is far less to compile, and no slower, than one for each tap of the kernel."""
    follow = dims.lhs.axes[-1] in dims.lhs.spatial
    to = 2 if follow else lhs.ndim - 1
    every = list(zip(dims.lhs.spatial, conv.padding, _spans(conv, by_position), strict=True))
    for done, (name, (lo, hi), spans) in enumerate(reversed(every)):
        axis = dims.lhs.axes.index(name) + done * follow
        padding = [(lo, hi, 0) if at == axis else (0, 0, 0) for at in range(lhs.ndim)]
        lhs = lax.pad(lhs, lax.full((), 0, lhs.dtype), padding)
        met = [lax.slice_in_dim(lhs, *span, axis=axis) for span in spans]
        lhs = lax.concatenate([lax.expand_dims(view, (to,)) for view in met], to)
    return lhs


def _spans(conv: ConvSignature, by_position: bool) -> list[list[tuple[int, int, int]]]:
    """Along each axis, where what each tap meets starts and stops, and in what steps."""
    starts, starting, steps, sizes = conv.kernel, conv.rhs_dilation, conv.strides, conv.out_spatial
    if by_position:
        starts, starting, steps, sizes = conv.out_spatial, conv.strides, conv.rhs_dilation, conv.kernel
    return [
        [(i * start, i * start + (size - 1) * step + 1, step) for i in range(count)]
        for count, start, step, size in zip(starts, starting, steps, sizes, strict=True)
    ]
