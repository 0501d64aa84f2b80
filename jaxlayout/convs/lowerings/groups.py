"""`groups`: a grouped convolution as one convolution for each group."""

from collections.abc import Iterable
from dataclasses import replace

import jax
from jax import lax

from jaxlayout.convs.lowering import Composite, Convolve, usual_dimension_numbers
from jaxlayout.convs.signature import ConvSignature
from jaxlayout.layout import ConvDimensionNumbers

MAX_GROUPS = 64
"""Each is a convolution of its own: beyond this it compiles slowly, and each has little to do."""


class Groups(Composite):
    """Groups have nothing to do with each other: out is theirs side by side (the definition: XLA operation
    semantics, ConvWithGeneralPadding, feature_group_count and batch_group_count). In a gradient to the kernel of a
    grouped convolution, as autodiff writes it, the groups are runs of the batch.

    Applies to at most `MAX_GROUPS` feature or batch groups of more than one feature or image each. Native in channels
    last, channels first and the order that autodiff writes a kernel gradient in. Memory: the operands and out once
    more. Accuracy: that of the convolutions inside.
    """

    name = "groups"

    def dimension_numbers(self, conv: ConvSignature) -> Iterable[ConvDimensionNumbers]:
        groups, depthwise = conv.feature_groups * conv.batch_groups, conv.in_features == conv.feature_groups
        single = conv.batch == conv.batch_groups if conv.batch_groups > 1 else depthwise
        if single or not 1 < groups <= MAX_GROUPS:
            return
        yield from usual_dimension_numbers(conv)

    def compose(
        self, conv: ConvSignature, dims: ConvDimensionNumbers, lhs: jax.Array, rhs: jax.Array, convolve: Convolve
    ) -> jax.Array:
        groups = conv.feature_groups * conv.batch_groups  # one of them is 1
        batch, features = conv.batch // conv.batch_groups, conv.in_features // conv.feature_groups
        part = replace(
            conv,
            batch=batch,
            in_features=features,
            out_features=conv.out_features // groups,
            feature_groups=1,
            batch_groups=1,
        )
        split = dims.lhs.axes.index("C" if conv.feature_groups > 1 else "N")
        images = _runs(lhs, split, groups)
        kernels = _runs(rhs, dims.rhs.axes.index("O"), groups)
        outs = [convolve(part, dims, x, k) for x, k in zip(images, kernels, strict=True)]
        return lax.concatenate(outs, dims.out.axes.index("C"))


def _runs(array: jax.Array, axis: int, count: int) -> list[jax.Array]:
    size = array.shape[axis] // count
    return [lax.slice_in_dim(array, i * size, (i + 1) * size, axis=axis) for i in range(count)]
