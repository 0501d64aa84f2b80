"""`tap_dots`: a convolution as one matrix product for each tap, or for each position of out."""

import itertools
import math
from collections.abc import Iterable
from functools import reduce

import jax
from jax import lax

from jaxlayout.convs.lowering import Lowering
from jaxlayout.convs.signature import ConvSignature
from jaxlayout.convs.views import views
from jaxlayout.layout import ConvDimensionNumbers

MAX_DOTS = 64


class TapDots(Lowering):
    """out = sum_t view_t(lhs) rhs[t], view_t the positions of lhs that tap t meets: a matrix product over the features
    for each tap (kn2row: Vasudevan, Anderson, Gregg 2017, "Parallel Multi Channel Convolution using General
    Matrix Multiplication"). Where out has fewer positions than the kernel has taps, as in a gradient to the kernel, the
    other way round: a position of out is one product over taps and features.

    Applies to ungrouped convolutions without lhs dilation, at most `MAX_DOTS` products; any stride, kernel
    dilation and padding. Native in channels last, the second way in the order that autodiff writes a kernel gradient
    in. Memory: lhs padded, a view of it, and the product of one tap. Accuracy: that of XLA's own convolution;
    half precision is summed in float32.
    """

    name = "tap_dots"
    convolves = False
    rereads = True

    def dimension_numbers(self, conv: ConvSignature) -> Iterable[ConvDimensionNumbers]:
        plain = not conv.is_grouped and all(d == 1 for d in conv.lhs_dilation)
        if not plain or min(math.prod(conv.kernel), math.prod(conv.out_spatial)) > MAX_DOTS or conv.is_pointwise:
            return
        if conv.is_kernel_gradient:
            yield ConvDimensionNumbers.kernel_gradient(conv.rank)
        else:
            yield ConvDimensionNumbers.channels_last(conv.rank)

    def apply(self, conv: ConvSignature, dims: ConvDimensionNumbers, lhs: jax.Array, prepared: jax.Array) -> jax.Array:
        shape = conv.out_shape(dims.out)
        precision = conv.precision
        if conv.is_kernel_gradient:
            summed = tuple(range(lhs.ndim - 1))
            over = (summed, summed), ((), ())
            met = views(conv, dims, lhs, by_position=True)
            dots = [lax.dot_general(view, prepared, over, precision, conv.preferred_element_type) for view in met]
            return lax.reshape(lax.concatenate([lax.expand_dims(dot, (0,)) for dot in dots], 0), shape)
        taps = itertools.product(*map(range, conv.kernel))
        over = ((lhs.ndim - 1,), (0,)), ((), ())
        dots = [
            lax.dot_general(met, prepared[tap], over, precision, conv.partial_type)
            for tap, met in zip(taps, views(conv, dims, lhs, by_position=False), strict=True)
        ]
        return lax.reshape(reduce(lax.add, dots), shape).astype(conv.out_dtype)
