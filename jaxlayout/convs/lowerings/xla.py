"""`xla`: the convolution as `jax.lax.conv_general_dilated` in some dimension numbers; `cropped`: without what padding
cuts off."""

from collections.abc import Iterable
from dataclasses import replace

import jax
from jax import lax

from jaxlayout.convs.lowering import Lowering
from jaxlayout.convs.signature import ConvSignature
from jaxlayout.layout import ConvDimensionNumbers, ConvLayout, KernelLayout


class Xla(Lowering):
    """Applies to everything, in every order.

    Offered: channels last (XLA:CPU's canonical form, and what its GPU backend turns float convolutions into)
    with either common kernel order, and channels first with the kernel's features first; for a kernel gradient what
    autodiff writes in a channels-last network. Other mixtures are not: XLA reaches them by the same transposes
    that a plan can place itself. Nor is a convolution whose padding crosses, but as it is written: see `Cropped`. Where
    XLA would misread an axis, out gets an element more, which is cut off again.
    """

    name = "xla"

    def dimension_numbers(self, conv: ConvSignature) -> Iterable[ConvDimensionNumbers]:
        return () if conv.crosses else _dimension_numbers(conv)

    def apply(self, conv: ConvSignature, dims: ConvDimensionNumbers, lhs: jax.Array, prepared: jax.Array) -> jax.Array:
        if any(conv.misread):
            axes = zip(conv.padding, conv.strides, conv.misread, strict=True)
            longer = replace(conv, padding=tuple((lo, hi + stride * misread) for (lo, hi), stride, misread in axes))
            return lax.slice(self.apply(longer, dims, lhs, prepared), [0] * lhs.ndim, conv.out_shape(dims.out))
        return lax.conv_general_dilated(lhs, prepared, dimension_numbers=dims.to_lax(), **conv.params)


class Cropped(Xla):
    """XLA's own convolution of what is left of lhs where padding cuts on one side of an axis and adds on the other:
    what every lowering but `xla` gets (`evaluate`). Some versions of XLA:CPU compute the convolution with both in it
    wrongly (`_compat.KNOWN_BAD`). Memory: what is left of lhs once more.
    """

    name = "cropped"

    def dimension_numbers(self, conv: ConvSignature) -> Iterable[ConvDimensionNumbers]:
        return _dimension_numbers(conv) if conv.crosses else ()


def _dimension_numbers(conv: ConvSignature) -> Iterable[ConvDimensionNumbers]:
    last = ConvLayout.channels_last(conv.rank)
    if conv.is_kernel_gradient:
        yield ConvDimensionNumbers.kernel_gradient(conv.rank)
    yield ConvDimensionNumbers.channels_last(conv.rank)
    yield ConvDimensionNumbers(last, KernelLayout.oi_first(conv.rank), last)
    yield ConvDimensionNumbers.channels_first(conv.rank)
