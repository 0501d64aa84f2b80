"""`space_to_depth`: a strided convolution of few features as one without stride, of blocks."""

from collections.abc import Iterable
from dataclasses import replace

import jax
from jax import lax

from jaxlayout.convs.lowering import Composite, Convolve
from jaxlayout.convs.signature import ConvSignature
from jaxlayout.layout import ConvDimensionNumbers

MAX_FEATURES = 4
"""Beyond an image's few, what multiplies features has enough of them."""


class SpaceToDepth(Composite):
    """With a stride of s along every axis, fold the padded lhs in blocks of s x s positions, whose positions and
    features are the features of one, and the kernel, padded with zeros to a multiple of s, the same way: out is their
    convolution without stride (the conv0 space-to-depth transform of MLPerf's ResNet-50: Ying et al. 2018, "Image
    Classification at Supercomputer Scale"). It sums over s^2 times the features at fewer positions and taps: a 7x7 stem
    of 3 features is 4x4 of 12, a patch embedding a product over blocks.

    Applies to ungrouped convolutions of at most `MAX_FEATURES` features, equal strides of two or more, without
    dilation, any padding, kernels no smaller than the stride. Native in channels last and channels first. Memory: lhs
    padded and folded. Accuracy: that of the convolution inside.

    Relaxed: the zeros that the kernel is padded with are multiplied, so a NaN or Inf in lhs spreads to outputs that
    do not read it, less than a block away.
    """

    name = "space_to_depth"
    relaxed = True

    def dimension_numbers(self, conv: ConvSignature) -> Iterable[ConvDimensionNumbers]:
        plain = not conv.is_grouped and conv.in_features <= MAX_FEATURES
        if not (plain and 1 <= conv.rank <= 3 and all(d == 1 for d in (*conv.lhs_dilation, *conv.rhs_dilation))):
            return
        step = conv.strides[0]
        if step == 1 or any(s != step for s in conv.strides) or min(conv.kernel) < step:
            return
        yield ConvDimensionNumbers.channels_last(conv.rank)
        yield ConvDimensionNumbers.channels_first(conv.rank)

    def compose(
        self, conv: ConvSignature, dims: ConvDimensionNumbers, lhs: jax.Array, rhs: jax.Array, convolve: Convolve
    ) -> jax.Array:
        step = conv.strides[0]
        taps = [-(-size // step) for size in conv.kernel]
        blocks = [size + count - 1 for size, count in zip(conv.out_spatial, taps, strict=True)]
        edges = zip(blocks, conv.spatial, conv.padding, strict=True)
        lhs_padding = [(lo, count * step - size - lo, 0) for count, size, (lo, _) in edges]
        rhs_padding = [(0, count * step - size, 0) for count, size in zip(taps, conv.kernel, strict=True)]
        part = replace(
            conv,
            in_features=conv.in_features * step**conv.rank,
            spatial=tuple(blocks),
            kernel=tuple(taps),
            strides=(1,) * conv.rank,
            padding=((0, 0),) * conv.rank,
        )
        lhs = _folded(lhs, dims.lhs.axes, "C", lhs_padding, step)
        return convolve(part, dims, lhs, _folded(rhs, dims.rhs.axes, "I", rhs_padding, step))


def _folded(array: jax.Array, axes: str, features: str, padding: list[tuple[int, int, int]], step: int) -> jax.Array:
    """The array padded, its spatial axes in blocks of `step`, positions within a block merged into the features."""
    spatial = sorted(set(axes) - set("NCOI"))
    edges = dict(zip(spatial, padding, strict=True))
    array = lax.pad(array, lax.full((), 0, array.dtype), [edges.get(a, (0, 0, 0)) for a in axes])
    split, shape = [], []  # the axes by name, positions within a block in lower case
    for axis, size in zip(axes, array.shape, strict=True):
        split += [axis, axis.lower()] if axis in edges else [axis]
        shape += [size // step, step] if axis in edges else [size]
    merged = [*(a.lower() for a in spatial), features]
    order = [split.index(a) for axis in axes for a in (merged if axis == features else [axis])]
    array = lax.transpose(lax.reshape(array, shape), order)
    sizes = dict(zip(split, shape, strict=True))
    whole = {features: sizes[features] * step ** len(spatial)}
    return lax.reshape(array, [whole.get(a, sizes[a]) for a in axes])
