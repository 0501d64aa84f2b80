"""`tap_dots`: a convolution as one matrix product for each tap, or for each position of out."""

import itertools
import math
from collections.abc import Iterable
from functools import reduce

import jax
from jax import lax

from jaxlayout.convs.lowering import Lowering
from jaxlayout.convs.signature import ConvSignature
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

    def orders(self, conv: ConvSignature) -> Iterable[ConvDimensionNumbers]:
        plain = conv.feature_groups == conv.batch_groups == 1 and all(d == 1 for d in conv.lhs_dilation)
        if not plain or min(math.prod(conv.kernel), math.prod(conv.out_spatial)) > MAX_DOTS or conv.is_pointwise:
            return
        if conv.is_kernel_gradient:
            yield ConvDimensionNumbers.kernel_gradient(conv.rank)
        else:
            yield ConvDimensionNumbers.channels_last(conv.rank)

    def apply(self, conv: ConvSignature, dims: ConvDimensionNumbers, lhs: jax.Array, prepared: jax.Array) -> jax.Array:
        shape = conv.out_shape(dims.out)
        if 0 in shape:
            return lax.full(shape, 0, conv.out_dtype)
        padding = [(0, 0, 0), *((lo, hi, 0) for lo, hi in conv.padding), (0, 0, 0)]
        lhs = lax.pad(lhs, lax.full((), 0, lhs.dtype), padding)
        precision, wide = conv.precision, conv.preferred_element_type
        spatial = tuple(range(1, conv.rank + 1))

        def view(start: list[int], sizes: tuple[int, ...], steps: tuple[int, ...]) -> jax.Array:
            stop = [at + (size - 1) * step + 1 for at, size, step in zip(start, sizes, steps, strict=True)]
            limits = (lhs.shape[0], *stop, lhs.shape[-1])
            return lax.slice(lhs, (0, *start, 0), limits, (1, *steps, 1))

        outs = []
        if conv.is_kernel_gradient:
            summed = (0, *spatial)
            for at in itertools.product(*map(range, conv.out_spatial)):
                start = [o * s for o, s in zip(at, conv.strides, strict=True)]
                met = view(start, conv.kernel, conv.rhs_dilation)
                dot = lax.dot_general(met, prepared, ((summed, summed), ((), ())), precision, wide)
                outs.append(lax.expand_dims(dot, (0,)))
            return lax.reshape(lax.concatenate(outs, 0), shape)
        wide = wide if conv.accumulator == conv.out_dtype else conv.accumulator
        for tap in itertools.product(*map(range, conv.kernel)):
            start = [t * d for t, d in zip(tap, conv.rhs_dilation, strict=True)]
            met = view(start, conv.out_spatial, conv.strides)
            outs.append(lax.dot_general(met, prepared[tap], (((lhs.ndim - 1,), (0,)), ((), ())), precision, wide))
        return lax.reshape(reduce(lax.add, outs), shape).astype(conv.out_dtype)
