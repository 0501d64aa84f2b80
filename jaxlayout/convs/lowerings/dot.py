"""`dot`: a 1x1 convolution as one `lax.dot_general`."""

import math
from collections.abc import Iterable

import jax
from jax import lax

from jaxlayout.convs.lowering import Lowering
from jaxlayout.convs.signature import ConvSignature
from jaxlayout.layout import ConvDimensionNumbers, ConvLayout, KernelLayout


class Dot(Lowering):
    """A kernel of one tap multiplies features at every position on its own: out[n, p, o] = sum_i lhs[n, s*p, i]
    rhs[i, o], a matrix product over (batch and positions) x features (the definition: XLA operation
    semantics, ConvWithGeneralPadding, with a window of one).

    Applies to ungrouped pointwise convolutions of any rank and stride; a stride is a slice of lhs.
    Native in channels last and channels first, lhs and out each free of the other, with the kernel in any order.
    Memory: none beyond the operands from channels last to channels last; otherwise see
    `contract`. Accuracy: that of XLA's own convolution, which is the same product; half precision
    accumulates in float32.
    """

    name = "dot"
    convolves = False
    any_kernel = True

    def dimension_numbers(self, conv: ConvSignature) -> Iterable[ConvDimensionNumbers]:
        if not (conv.is_pointwise and not conv.is_grouped):
            return
        last, first = ConvLayout.channels_last(conv.rank), ConvLayout.channels_first(conv.rank)
        for lhs, out in dict.fromkeys(((last, last), (first, first), (first, last), (last, first))):
            yield ConvDimensionNumbers(lhs, KernelLayout.io_last(conv.rank), out)

    def prepare(self, conv: ConvSignature, dims: ConvDimensionNumbers, rhs: jax.Array) -> jax.Array:
        return lax.squeeze(rhs, [dims.rhs.axes.index(a) for a in dims.rhs.spatial])

    def apply(self, conv: ConvSignature, dims: ConvDimensionNumbers, lhs: jax.Array, prepared: jax.Array) -> jax.Array:
        steps = dict(zip(dims.lhs.spatial, conv.strides, strict=True))
        lhs = lax.slice(lhs, [0] * lhs.ndim, lhs.shape, [steps.get(a, 1) for a in dims.lhs.axes])
        return contract(conv, dims, lhs, prepared, int(dims.rhs.axes.index("O") < dims.rhs.axes.index("I")))


def contract(conv: ConvSignature, dims: ConvDimensionNumbers, lhs: jax.Array, rhs: jax.Array, axis: int) -> jax.Array:
    """out, from lhs at the positions of out, laid out as `dims.lhs` with what is summed over as its C, and a matrix rhs
    that is summed over `axis`.

    An XLA dot puts its batch axes first and merges the free axes of each operand, which costs nothing only where they
    are adjacent. From channels last to channels last it is one plain product. With channels first on either
    side it is one product per image, which reads and writes either order, with a copy of rhs for each
    image; that pays where an image of out has no fewer positions than features (measured on CPU, against
    transposing the images: wins at 56x56 by 1.4 to 1.7, loses at 7x7 by 1.6).
    """
    images, positions, sums = conv.batch, math.prod(conv.out_spatial), rhs.shape[axis]
    from_last, to_last = dims.lhs.is_channels_last, dims.out.is_channels_last
    lhs = lax.reshape(lhs, (images, positions, sums) if from_last else (images, sums, positions))
    each = images > 1 and positions >= rhs.shape[1 - axis] and not (from_last and to_last)
    rhs_first = not to_last and (each or images == 1)
    if rhs_first and axis == 0:  # XLA wants a left operand summed over its last axis, and the kernel is the small one
        rhs, axis = lax.transpose(rhs, (1, 0)), 1
    lhs_sum, rhs_sum, batch = (2 if from_last else 1,), (axis,), ()
    if each:
        rhs, rhs_sum, batch = lax.broadcast(rhs, (images,)), (axis + 1,), (0,)
    options = {"preferred_element_type": conv.preferred_element_type}
    if rhs_first:
        swapped = conv.precision[::-1] if isinstance(conv.precision, tuple) else conv.precision
        out = lax.dot_general(rhs, lhs, ((rhs_sum, lhs_sum), (batch, batch)), precision=swapped, **options)
    else:
        out = lax.dot_general(lhs, rhs, ((lhs_sum, rhs_sum), (batch, batch)), precision=conv.precision, **options)
        out = out if to_last else lax.transpose(out, (0, 2, 1))
    return lax.reshape(out, conv.out_shape(dims.out))
