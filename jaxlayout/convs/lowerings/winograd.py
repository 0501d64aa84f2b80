"""`winograd2`, `winograd4`: a 3x3 convolution in tiles, with fewer multiplications."""

import math
from collections.abc import Iterable, Sequence
from functools import reduce
from typing import ClassVar

import jax
from jax import lax
from jax import numpy as jnp

from jaxlayout.convs.lowering import Lowering
from jaxlayout.convs.signature import ConvSignature
from jaxlayout.layout import ConvDimensionNumbers

MIN_FEATURES = 8
"""On either side: with fewer, the transforms cost more than the products that they save."""

Matrix = Sequence[Sequence[float]]


class Winograd(Lowering):
    """A tile of m x m outputs reads (m + 2) x (m + 2) inputs, d, and is A^T [(G g G^T) * (B^T d B)] A, * elementwise
    and g the kernel: Winograd's minimal filtering F(m x m, 3 x 3) (Lavin and Gray 2015, "Fast Algorithms for
    Convolutional Neural Networks"). Summed over features before the transform by A, that is (m + 2)^2 matrix products
    of tiles x features, here one batched product: 16 multiplications for 36 with m = 2, 36 for 144 with m = 4. B, G and
    A are a few additions and constants.

    Applies to 3x3 convolutions of two axes in floating point, ungrouped, with stride one, without dilation, any
    padding, from `MIN_FEATURES` features to as many; sizes that m does not divide are padded to whole tiles, and out
    cropped. Native in channels last, the kernel in any order (it is transformed anyway). Memory: lhs and out
    transformed, each (m + 2)^2 / m^2 times as large, in float32 for half precision.

    Relaxed. The transforms add up elements of unequal size that cancel again: an error of a few eps for m = 2, some
    ten times that for m = 4, relative to the largest outputs around, not to each. Half precision is computed in
    float32 and rounded once. A NaN or Inf in lhs spreads to all outputs of the tiles that read it: each transform adds
    what out multiplies by zero, or subtracts again.
    """

    relaxed = True
    convolves = False
    any_kernel = True
    tile: ClassVar[int]
    b: ClassVar[Matrix]
    g: ClassVar[Matrix]
    a: ClassVar[Matrix]

    def dimension_numbers(self, conv: ConvSignature) -> Iterable[ConvDimensionNumbers]:
        plain = not conv.is_grouped and conv.kernel == (3, 3)
        if not plain or any(n != 1 for n in (*conv.strides, *conv.lhs_dilation, *conv.rhs_dilation)):
            return
        if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in (conv.lhs_dtype, conv.rhs_dtype, conv.out_dtype)):
            return
        if conv.lhs_dtype.itemsize > conv.accumulator.itemsize:  # would round before it sums
            return
        if min(conv.in_features, conv.out_features) < MIN_FEATURES or conv.is_kernel_gradient:
            return
        yield ConvDimensionNumbers.channels_last(2)

    def least_work(self, conv: ConvSignature, dims: ConvDimensionNumbers) -> tuple[int, int]:
        tiles = math.prod(-(-size // self.tile) for size in conv.out_spatial)
        return conv.batch * tiles * (self.tile + 2) ** 2 * conv.in_features * conv.out_features, conv.nbytes

    def prepare(self, conv: ConvSignature, dims: ConvDimensionNumbers, rhs: jax.Array) -> jax.Array:
        """G g G^T, for each place in a tile a matrix of in x out features."""
        rhs = lax.transpose(rhs, [dims.rhs.axes.index(a) for a in dims.rhs.spatial + "IO"]).astype(conv.accumulator)
        rows = jnp.stack(_times(self.g, list(rhs)))
        return jnp.stack(_times(self.g, [rows[:, i] for i in range(3)]), 1)

    def apply(self, conv: ConvSignature, dims: ConvDimensionNumbers, lhs: jax.Array, prepared: jax.Array) -> jax.Array:
        shape = conv.out_shape(dims.out)
        tiles = [-(-size // self.tile) for size in conv.out_spatial]
        whole = [self.tile * count + 2 for count in tiles]
        padding = [(lo, w - size - lo, 0) for w, size, (lo, _) in zip(whole, conv.spatial, conv.padding, strict=True)]
        lhs = lax.pad(lhs, lax.full((), 0, lhs.dtype), [(0, 0, 0), *padding, (0, 0, 0)]).astype(conv.accumulator)

        def places(array: jax.Array, axis: int, count: int) -> list[jax.Array]:
            """One place along an axis of all tiles, for each place."""
            reach = (count - 1) * self.tile + 1
            return [lax.slice_in_dim(array, i, i + reach, self.tile, axis=axis) for i in range(self.tile + 2)]

        # Barriers, or XLA computes the transform along one axis anew for every place along the other.
        rows = lax.optimization_barrier(jnp.stack(_times(self.b, places(lhs, 1, tiles[0]))))
        met = jnp.stack(_times(self.b, places(rows, 3, tiles[1])), 1)
        summed = ((met.ndim - 1,), (2,)), ((0, 1), (0, 1))
        dots = lax.dot_general(met, prepared, summed, conv.precision, conv.accumulator)
        rows = lax.optimization_barrier(_times(self.a, list(dots)))
        out = jnp.stack([jnp.stack(_times(self.a, list(row)), 3) for row in rows], 2)  # image, (tile, place) twice, O
        images, *_, features = shape
        out = lax.reshape(out, (images, *(self.tile * count for count in tiles), features))
        return lax.slice(out, [0] * 4, shape).astype(conv.out_dtype)


class Winograd2(Winograd):
    """F(2x2, 3x3)."""

    name = "winograd2"
    tile = 2
    b = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
    g = ((1, 0, 0), (1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (0, 0, 1))
    a = ((1, 1, 1, 0), (0, 1, -1, -1))


class Winograd4(Winograd):
    """F(4x4, 3x3)."""

    name = "winograd4"
    tile = 4
    b = (
        (4, 0, -5, 0, 1, 0),
        (0, -4, -4, 1, 1, 0),
        (0, 4, -4, -1, 1, 0),
        (0, -2, -1, 2, 1, 0),
        (0, 2, -1, -2, 1, 0),
        (0, 4, 0, -5, 0, 1),
    )
    g = (
        (1 / 4, 0, 0),
        (-1 / 6, -1 / 6, -1 / 6),
        (-1 / 6, 1 / 6, -1 / 6),
        (1 / 24, 1 / 12, 1 / 6),
        (1 / 24, -1 / 12, 1 / 6),
        (0, 0, 1),
    )
    a = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))


def _times(matrix: Matrix, parts: Sequence[jax.Array]) -> list[jax.Array]:
    """A small matrix times a column of arrays."""

    def scaled(factor: float, part: jax.Array) -> jax.Array:
        return part if factor == 1 else part * factor

    return [reduce(lax.add, [scaled(c, part) for c, part in zip(row, parts, strict=True) if c != 0]) for row in matrix]
