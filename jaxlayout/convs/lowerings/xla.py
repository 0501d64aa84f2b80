"""`xla`: the convolution as `jax.lax.conv_general_dilated` in some dimension numbers."""

from collections.abc import Iterable

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
    that a plan can place itself.
    """

    name = "xla"

    def orders(self, conv: ConvSignature) -> Iterable[ConvDimensionNumbers]:
        last = ConvLayout.channels_last(conv.rank)
        if conv.is_kernel_gradient:
            yield ConvDimensionNumbers.kernel_gradient(conv.rank)
        yield ConvDimensionNumbers.channels_last(conv.rank)
        yield ConvDimensionNumbers(last, KernelLayout.oi_first(conv.rank), last)
        yield ConvDimensionNumbers.channels_first(conv.rank)

    def apply(self, conv: ConvSignature, dims: ConvDimensionNumbers, lhs: jax.Array, prepared: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(lhs, prepared, dimension_numbers=dims.to_lax(), **conv.params)
