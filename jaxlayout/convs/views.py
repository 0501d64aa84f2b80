"""`views`: what each tap of a convolution meets of lhs."""

import itertools
from collections.abc import Iterator

import jax
from jax import lax

from jaxlayout.convs.signature import ConvSignature
from jaxlayout.layout import ConvDimensionNumbers


def views(conv: ConvSignature, dims: ConvDimensionNumbers, lhs: jax.Array, *, by_position: bool) -> Iterator[jax.Array]:
    """lhs, padded, as each tap meets it at all positions of out, tap by tap; `by_position`: as each position of out
    meets it at all taps. Without lhs dilation, and where out has positions."""
    starts, starting, steps, sizes = conv.kernel, conv.rhs_dilation, conv.strides, conv.out_spatial
    if by_position:
        starts, starting, steps, sizes = conv.out_spatial, conv.strides, conv.rhs_dilation, conv.kernel
    axes = [dims.lhs.axes.index(a) for a in dims.lhs.spatial]
    padding = [(0, 0, 0)] * lhs.ndim
    for axis, (lo, hi) in zip(axes, conv.padding, strict=True):
        padding[axis] = (lo, hi, 0)
    lhs = lax.pad(lhs, lax.full((), 0, lhs.dtype), padding)
    for at in itertools.product(*map(range, starts)):
        low, high, strides = [0] * lhs.ndim, list(lhs.shape), [1] * lhs.ndim
        for axis, i, start, step, size in zip(axes, at, starting, steps, sizes, strict=True):
            low[axis], strides[axis] = i * start, step
            high[axis] = i * start + (size - 1) * step + 1
        yield lax.slice(lhs, low, high, strides)
