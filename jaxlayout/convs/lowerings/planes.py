"""`planes`: a convolution of three axes by way of convolutions of two."""

from collections.abc import Iterable
from dataclasses import replace
from functools import reduce

import jax
from jax import lax

from jaxlayout.convs.lowering import Composite, Convolve
from jaxlayout.convs.signature import ConvSignature
from jaxlayout.layout import ConvDimensionNumbers, ConvLayout, KernelLayout


class Planes(Composite):
    """Take the taps along the depth out of the sum: out = sum_t conv2d(lhs[t:], rhs[t]), the depth merged into the
    batch (the definition, XLA operation semantics, ConvWithGeneralPadding, with the sum over one axis outermost). Where
    out has fewer positions along the depth than the kernel has taps, as in a gradient to the kernel, the other way
    round: each position of out is one convolution of planes, the depth merged into the features that are summed over.

    Applies to three spatial axes, the depth undilated in lhs, at most `MAX_PARTS` taps or positions; any stride, kernel
    dilation and padding; the second way needs one feature group. Native where that merge is a reshape: channels last,
    and the order that autodiff writes a kernel gradient in. Memory: lhs padded, and out once more for each tap that is
    not summed yet. Accuracy: that of the convolutions inside; partial sums in float32 for half precision.
    """

    name = "planes"

    def orders(self, conv: ConvSignature) -> Iterable[ConvDimensionNumbers]:
        if conv.rank != 3 or conv.lhs_dilation[0] != 1 or min(conv.kernel[0], conv.out_spatial[0]) > MAX_PARTS:
            return
        if not _few_positions(conv):
            yield ConvDimensionNumbers.channels_last(3)
        elif conv.feature_groups == 1:
            yield ConvDimensionNumbers.kernel_gradient(3)

    def compose(
        self, conv: ConvSignature, dims: ConvDimensionNumbers, lhs: jax.Array, rhs: jax.Array, convolve: Convolve
    ) -> jax.Array:
        positions, taps, stride, step = conv.out_spatial[0], conv.kernel[0], conv.strides[0], conv.rhs_dilation[0]
        low, high = conv.padding[0]
        shape = conv.out_shape(dims.out)
        if 0 in shape:
            return lax.full(shape, 0, conv.out_dtype)
        depth = dims.lhs.axes.index("D")
        padding = [(low, high, 0) if a == "D" else (0, 0, 0) for a in dims.lhs.axes]
        lhs = lax.pad(lhs, lax.full((), 0, lhs.dtype), padding)
        flat = replace(
            conv,
            spatial=conv.spatial[1:],
            kernel=conv.kernel[1:],
            strides=conv.strides[1:],
            padding=conv.padding[1:],
            lhs_dilation=conv.lhs_dilation[1:],
            rhs_dilation=conv.rhs_dilation[1:],
        )
        plane = _without_depth(dims)

        def planes(start: int, count: int, step: int) -> jax.Array:
            """`count` planes of lhs, the depth merged into the axis before it."""
            part = lax.slice_in_dim(lhs, start, start + (count - 1) * step + 1, step, depth)
            return _merged(part, depth)

        if _few_positions(conv):
            flat = replace(flat, in_features=conv.in_features * taps)
            kernel = _merged(rhs, dims.rhs.axes.index("D"))
            outs = [convolve(flat, plane, planes(o * stride, taps, step), kernel) for o in range(positions)]
            at = dims.out.axes.index("D")
            return lax.concatenate([lax.expand_dims(out, (at,)) for out in outs], at)
        wide = conv.preferred_element_type if conv.accumulator == conv.out_dtype else conv.accumulator
        flat = replace(flat, batch=conv.batch * positions, preferred_element_type=wide)
        axis = dims.rhs.axes.index("D")
        outs = [
            convolve(flat, plane, planes(t * step, positions, stride), lax.index_in_dim(rhs, t, axis, keepdims=False))
            for t in range(taps)
        ]
        return lax.reshape(reduce(lax.add, outs).astype(conv.out_dtype), shape)


MAX_PARTS = 8


def _few_positions(conv: ConvSignature) -> bool:
    return conv.out_spatial[0] < conv.kernel[0]


def _without_depth(dims: ConvDimensionNumbers) -> ConvDimensionNumbers:
    lhs, rhs, out = (layout.axes.replace("D", "") for layout in (dims.lhs, dims.rhs, dims.out))
    return ConvDimensionNumbers(ConvLayout(lhs), KernelLayout(rhs), ConvLayout(out))


def _merged(array: jax.Array, axis: int) -> jax.Array:
    """An axis merged into the one before it."""
    shape = list(array.shape)
    shape[axis - 1 : axis + 1] = [shape[axis - 1] * shape[axis]]
    return lax.reshape(array, shape)
