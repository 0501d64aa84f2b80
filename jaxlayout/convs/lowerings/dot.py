"""`dot`: a 1x1 convolution as one `lax.dot_general`."""

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
    Native in channels last and channels first, lhs and out each free of the other, with the kernel's features
    last or first. Memory: none beyond the operands from channels last to channels last; otherwise see
    `contract`. Accuracy: that of XLA's own convolution, which is the same product; half precision
    accumulates in float32.
    """

    name = "dot"

    def orders(self, conv: ConvSignature) -> Iterable[ConvDimensionNumbers]:
        if not (conv.is_pointwise and conv.feature_groups == conv.batch_groups == 1):
            return
        last, first = ConvLayout.channels_last(conv.rank), ConvLayout.channels_first(conv.rank)
        kernels = KernelLayout.io_last(conv.rank), KernelLayout.oi_first(conv.rank)
        images = dict.fromkeys(((last, last), (first, first), (first, last), (last, first)))
        yield from (ConvDimensionNumbers(lhs, rhs, out) for lhs, out in images for rhs in kernels)

    def prepare(self, conv: ConvSignature, dims: ConvDimensionNumbers, rhs: jax.Array) -> jax.Array:
        return lax.squeeze(rhs, [dims.rhs.axes.index(a) for a in dims.rhs.spatial])

    def apply(self, conv: ConvSignature, dims: ConvDimensionNumbers, lhs: jax.Array, prepared: jax.Array) -> jax.Array:
        steps = dict(zip(dims.lhs.spatial, conv.strides, strict=True))
        lhs = lax.slice(lhs, [0] * lhs.ndim, lhs.shape, [steps.get(a, 1) for a in dims.lhs.axes])
        return contract(conv, dims, lhs, prepared, int(dims.rhs.axes.index("O") < dims.rhs.axes.index("I")))


def contract(conv: ConvSignature, dims: ConvDimensionNumbers, lhs: jax.Array, rhs: jax.Array, axis: int) -> jax.Array:
    """out, from lhs laid out as `dims.lhs` (its batch first; C is what is summed over) and a matrix rhs (which
    sums over `axis`).

    An XLA dot has its batch axes first and merges the free axes of each operand, which must be adjacent for that to
    cost nothing. So from channels last to channels last it is one plain matrix product. Where channels come
    first on either side, it is one product for each image, which reads and writes either order, for a
    copy of rhs per image; that pays while an image is larger than the copy (measured on CPU: wins at
    56x56 by 1.4-1.7, loses at 7x7 by 1.6). Below that XLA transposes the images.
    """
    c, images = dims.lhs.axes.index("C"), lhs.shape[0]
    first = not dims.out.is_channels_last
    positions = lhs.size // max(1, images * lhs.shape[c])
    each = images > 1 and positions >= rhs.shape[1 - axis] and (first or not dims.lhs.is_channels_last)
    if each:
        rhs, axis = lax.broadcast(rhs, (images,)), axis + 1
    batch = ((0,), (0,)) if each else ((), ())
    options = {"preferred_element_type": conv.preferred_element_type}
    if first and (each or images == 1):
        swapped = conv.precision[::-1] if isinstance(conv.precision, tuple) else conv.precision
        out = lax.dot_general(rhs, lhs, (((axis,), (c,)), batch), precision=swapped, **options)
        return out if each else lax.reshape(out, conv.out_shape(dims.out))  # O, 1, positions
    out = lax.dot_general(lhs, rhs, (((c,), (axis,)), batch), precision=conv.precision, **options)
    last = out.ndim - 1
    return lax.transpose(out, (0, last, *range(1, last))) if first and last > 1 else out
