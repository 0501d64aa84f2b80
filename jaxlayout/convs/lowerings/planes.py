"""`planes`: a convolution of three axes by way of convolutions of two."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import jax
from jax import lax

from jaxlayout.convs.lowering import Composite, Convolve
from jaxlayout.convs.signature import ConvSignature
from jaxlayout.layout import ConvDimensionNumbers, ConvLayout, KernelLayout

MAX_PLANES = 8
"""Taps, or positions, along the depth: each is a convolution of its own."""


class Planes(Composite):
    """Take the taps along the depth out of the sum: out = sum_t conv2d(lhs[t:], rhs[t]), the depth merged into the
    batch (the definition, XLA operation semantics, ConvWithGeneralPadding, with the sum over one axis outermost). Where
    out has fewer positions along the depth than the kernel has taps, as in a gradient to the kernel, the other way
    round: each position of out is one convolution of planes, the depth merged into the features that are summed over.

    Applies to three spatial axes, the depth undilated in lhs, at most `MAX_PLANES` taps or positions; any stride,
    kernel dilation and padding; the first way needs one batch group (groups of several images, which merging makes, XLA
    computes by masks, and those spread a NaN), the second one feature group. Native where that merge is a reshape:
    channels last, and the order that autodiff writes a kernel gradient in. Memory: out once more (and lhs, where
    strided); the second way, the planes of both operands that meet. Accuracy: that of the convolutions inside; partial
    sums in float32 for half precision.
    """

    name = "planes"

    def dimension_numbers(self, conv: ConvSignature) -> Iterable[ConvDimensionNumbers]:
        if conv.rank != 3 or conv.lhs_dilation[0] != 1 or min(conv.kernel[0], conv.out_spatial[0]) > MAX_PLANES:
            return
        if not _few_positions(conv):
            if conv.batch_groups == 1:
                yield ConvDimensionNumbers.channels_last(3)
        elif conv.feature_groups == 1:
            yield ConvDimensionNumbers.kernel_gradient(3)

    def compose(
        self, conv: ConvSignature, dims: ConvDimensionNumbers, lhs: jax.Array, rhs: jax.Array, convolve: Convolve
    ) -> jax.Array:
        by = _by_position if _few_positions(conv) else _by_tap
        order = without_depth(dims)
        return by(conv, flattened(conv), dims, lhs, rhs, lambda part, lhs, rhs: convolve(part, order, lhs, rhs))


def flattened(conv: ConvSignature) -> ConvSignature:
    """The same convolution of planes."""
    every = ("spatial", "kernel", "strides", "padding", "lhs_dilation", "rhs_dilation")
    return replace(conv, **{name: getattr(conv, name)[1:] for name in every})


def _by_tap(conv: ConvSignature, flat: ConvSignature, dims: Any, lhs: Any, rhs: Any, convolve: Any) -> jax.Array:
    """Position o reads plane o * stride + t * step - low at tap t."""
    size, positions, stride = conv.spatial[0], conv.out_spatial[0], conv.strides[0]
    shape = conv.out_shape(dims.out)
    out = lax.full(shape, 0, conv.accumulator)
    for tap in range(conv.kernel[0]):
        shift = conv.padding[0][0] - tap * conv.rhs_dilation[0]
        first, last = max(0, -(-shift // stride)), min(positions - 1, (size - 1 + shift) // stride)
        if first > last:
            continue
        planes = lhs
        if stride == 1:  # all planes, some in vain: no copy of lhs
            first, last = shift, shift + size - 1
        else:
            planes = lax.slice_in_dim(lhs, first * stride - shift, last * stride - shift + 1, stride, axis=1)
        part = replace(flat, batch=conv.batch * planes.shape[1], preferred_element_type=conv.partial_type)
        kernel = lax.index_in_dim(rhs, tap, dims.rhs.axes.index("D"), keepdims=False)
        summand = convolve(part, merged(planes, 1), kernel)
        summand = lax.reshape(summand, (shape[0], planes.shape[1], *shape[2:]))
        edges = [(first, positions - 1 - last, 0) if axis == 1 else (0, 0, 0) for axis in range(summand.ndim)]
        # A barrier, or all summands are kept until the last is there.
        out = lax.optimization_barrier(lax.add(out, lax.pad(summand, lax.full((), 0, summand.dtype), edges)))
    return out.astype(conv.out_dtype)


def _by_position(conv: ConvSignature, flat: ConvSignature, dims: Any, lhs: Any, rhs: Any, convolve: Any) -> jax.Array:
    """The same planes, position by position: those of lhs and of the kernel that meet."""
    size, taps, step = conv.spatial[0], conv.kernel[0], conv.rhs_dilation[0]
    at, lhs_depth, rhs_depth = (layout.axes.index("D") for layout in (dims.out, dims.lhs, dims.rhs))
    outs = []
    for position in range(conv.out_spatial[0]):
        shift = conv.padding[0][0] - position * conv.strides[0]
        first, last = max(0, -(-shift // step)), min(taps - 1, (size - 1 + shift) // step)
        count = max(0, last - first + 1)
        part = replace(flat, in_features=conv.in_features * count)
        if count:
            planes = lax.slice_in_dim(lhs, first * step - shift, last * step - shift + 1, step, axis=lhs_depth)
            kernel = lax.slice_in_dim(rhs, first, last + 1, axis=rhs_depth)
            out = convolve(part, merged(planes, lhs_depth), merged(kernel, rhs_depth))
        else:
            out = lax.full(part.out_shape(without_depth(dims).out), 0, conv.out_dtype)
        outs.append(lax.expand_dims(out, (at,)))
    return lax.concatenate(outs, at)


def _few_positions(conv: ConvSignature) -> bool:
    return conv.out_spatial[0] < conv.kernel[0]


def without_depth(dims: ConvDimensionNumbers) -> ConvDimensionNumbers:
    lhs, rhs, out = (layout.axes.replace("D", "") for layout in (dims.lhs, dims.rhs, dims.out))
    return ConvDimensionNumbers(ConvLayout(lhs), KernelLayout(rhs), ConvLayout(out))


def merged(array: jax.Array, axis: int) -> jax.Array:
    """An axis merged into the one before it."""
    shape = list(array.shape)
    shape[axis - 1 : axis + 1] = [shape[axis - 1] * shape[axis]]
    return lax.reshape(array, shape)
