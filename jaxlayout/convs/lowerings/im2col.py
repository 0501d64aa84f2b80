"""`im2col`: a convolution as one matrix product over gathered patches."""

import math
from collections.abc import Iterable
from dataclasses import replace

import jax
from jax import lax

from jaxlayout.convs.lowering import Lowering
from jaxlayout.convs.lowerings.dot import contract
from jaxlayout.convs.signature import ConvSignature
from jaxlayout.convs.views import stacked_views
from jaxlayout.layout import ConvDimensionNumbers, ConvLayout, KernelLayout

MAX_BYTES = 16 * 2**20
"""The largest patches offered, in bytes: about half of a last-level cache."""
MAX_COLUMNS = 128
"""The most taps, or positions of out."""


class Im2col(Lowering):
    """Lay the window that an output position reads out as one row of length taps x features; the convolution is then
    the matrix product of those rows with the kernel as a matrix (Chellapilla, Puri, Simard 2006, "High Performance
    Convolutional Neural Networks for Document Processing"). A tap's column of all rows is one strided slice of lhs.

    In a gradient to the kernel, out has fewer positions than the kernel has taps: there a row is what one tap meets at
    all positions of out.

    Applies to ungrouped convolutions of more than one tap without lhs dilation; any stride, rhs
    dilation and padding. Native in channels last, where a patch is taps then features, as in a kernel whose
    features come last, and in channels first (out first or last), where it is features then taps, as in a kernel
    whose features come first: the kernel matrix is a reshape; and in the order that autodiff writes a kernel gradient
    in. Memory: taps x (positions of out) x features, and lhs padded. Accuracy: that of XLA's own convolution;
    half precision accumulates in float32.
    """

    name = "im2col"
    convolves = False
    version = 2
    rereads = True

    def dimension_numbers(self, conv: ConvSignature) -> Iterable[ConvDimensionNumbers]:
        grouped = conv.feature_groups != 1 or conv.batch_groups != 1
        if grouped or math.prod(conv.kernel) <= 1 or any(d != 1 for d in conv.lhs_dilation):
            return
        if conv.batch * math.prod(conv.out_spatial) * conv.contraction * conv.lhs_dtype.itemsize > MAX_BYTES:
            return
        if min(math.prod(conv.kernel), math.prod(conv.out_spatial)) > MAX_COLUMNS:
            return
        if conv.is_kernel_gradient:
            yield ConvDimensionNumbers.kernel_gradient(conv.rank)
            return
        last, first = ConvLayout.channels_last(conv.rank), ConvLayout.channels_first(conv.rank)
        yield ConvDimensionNumbers(last, KernelLayout.io_last(conv.rank), last)
        yield ConvDimensionNumbers(first, KernelLayout.oi_first(conv.rank), first)
        yield ConvDimensionNumbers(first, KernelLayout.oi_first(conv.rank), last)

    def prepare(self, conv: ConvSignature, dims: ConvDimensionNumbers, rhs: jax.Array) -> jax.Array:
        o, k = conv.out_features, conv.contraction
        if conv.is_kernel_gradient:
            return rhs
        return lax.reshape(rhs, (k, o) if dims.lhs.is_channels_last else (o, k))

    def apply(self, conv: ConvSignature, dims: ConvDimensionNumbers, lhs: jax.Array, prepared: jax.Array) -> jax.Array:
        if conv.is_kernel_gradient:
            rows, summed = stacked_views(conv, dims, lhs, by_position=True), tuple(range(lhs.ndim - 1))
            over = (summed, summed), ((), ())
            return lax.dot_general(rows, prepared, over, conv.precision, conv.preferred_element_type)
        return contract(conv, dims, patches(conv, dims, lhs), prepared, int(not dims.lhs.is_channels_last))


def patches(conv: ConvSignature, dims: ConvDimensionNumbers, lhs: jax.Array) -> jax.Array:
    """What each position of out reads, as the features of an image batch laid out as lhs, channels last or first: taps
    then features in the one (the rows of an HWIO kernel), features then taps in the other (those of an OIHW one). The
    convolution is ungrouped and without lhs dilation."""
    shape = replace(conv, out_features=conv.contraction).out_shape(dims.lhs)
    if 0 in conv.out_spatial:  # a slice needs somewhere to stop
        return lax.full(shape, 0, lhs.dtype)
    return lax.reshape(stacked_views(conv, dims, lhs, by_position=False), shape)
