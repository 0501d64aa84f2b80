"""`rows`: the kernel gradient of a depthwise or grouped convolution, row by row."""

import math
from collections.abc import Iterable

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxlayout.convs.lowering import Lowering
from jaxlayout.convs.signature import ConvSignature
from jaxlayout.layout import ConvDimensionNumbers

MAX_SUMS = 2**20
"""Partial sums are kept for this many bytes at most, about what a core's own cache holds, if that can be."""
MAX_CHAIN = 64
"""Products added up in one expression."""
MAX_POSITIONS = 256
MAX_PAIRS = 256
"""Inputs times outputs of a group."""


class Rows(Lowering):
    """As autodiff writes it, the gradient to a grouped kernel is a convolution over runs of the batch, one for each
    group (batch_group_count), whose kernel is the cotangent: every tap's weights are the sum, over images and
    positions, of the input that the tap met times the cotangent (the definition: XLA operation semantics,
    ConvWithGeneralPadding). Here one row of one image is taken at a time, which stays in the nearest cache for all
    taps; its products are added to one partial sum for each tap and position along the row (or for several of them,
    where sums for all would not fit), vectors over the groups, and these are summed up at the end.

    Applies to batch groups, few inputs and outputs each, without lhs dilation. Native in the order that autodiff
    writes. Memory: lhs padded, lhs and rhs transposed where a group has more than one feature, and the sums. Accuracy:
    better than one running sum; half precision is summed in float32.
    """

    name = "rows"

    def orders(self, conv: ConvSignature) -> Iterable[ConvDimensionNumbers]:
        fits = conv.batch_groups > 1 and conv.rank > 0 and all(d == 1 for d in conv.lhs_dilation)
        if not (fits and conv.is_kernel_gradient and jnp.issubdtype(conv.lhs_dtype, np.number)):
            return
        if (
            math.prod(conv.out_spatial) <= MAX_POSITIONS
            and conv.batch * conv.out_features <= 256 * conv.batch_groups**2
        ):
            yield ConvDimensionNumbers.kernel_gradient(conv.rank)

    def apply(self, conv: ConvSignature, dims: ConvDimensionNumbers, lhs: jax.Array, prepared: jax.Array) -> jax.Array:
        shape = conv.out_shape(dims.out)
        if 0 in (*shape, *lhs.shape, *prepared.shape):
            return lax.full(shape, 0, conv.out_dtype)
        padding = [(0, 0, 0), *((lo, hi, 0) for lo, hi in conv.padding), (0, 0, 0)]
        lhs = _groups_last(lax.pad(lhs, lax.full((), 0, lhs.dtype), padding), conv.batch_groups)
        rhs = _groups_last(prepared, conv.batch_groups)
        lhs, rhs = lax.optimization_barrier((lhs, rhs))
        # The axes of both: images, spatial, features of a group, groups.
        *lead, row = conv.kernel
        *positions, width = conv.out_spatial
        *strides, stride = conv.strides
        *steps, step = conv.rhs_dilation
        sums = (*positions, 1, lhs.shape[-2], rhs.shape[-2], conv.batch_groups)
        chain = _chain(row, math.prod(sums) * width * conv.accumulator.itemsize)
        sums = (*positions, row // chain, *sums[-3:])

        def add_row(n: jax.Array, totals: list[jax.Array]) -> list[jax.Array]:
            at = jnp.unravel_index(n, (conv.in_features, *lead))
            reach = [(p - 1) * s + 1 for p, s in zip(positions, strides, strict=True)]
            start = [at[0], *(i * d for i, d in zip(at[1:], steps, strict=True)), 0, 0, 0]
            met = lax.dynamic_slice(lhs, start, (1, *reach, *lhs.shape[-3:]))[0]
            met = met[tuple(slice(None, None, s) for s in strides)].astype(conv.accumulator)
            given = lax.dynamic_slice(rhs, [*at, 0, 0, 0], (1,) * len(at) + rhs.shape[-3:])
            given = lax.squeeze(given, range(len(at))).astype(conv.accumulator)

            def added(tap: int, total: jax.Array) -> jax.Array:
                for q in range(chain):
                    first, every = tap * stride + q * step, chain * step
                    last = first + (row // chain - 1) * every + 1
                    view = lax.slice_in_dim(met, first, last, every, axis=met.ndim - 3)
                    total = total + view[..., :, None, :] * given[q::chain, None, :, :]
                return total

            return [added(tap, total) for tap, total in enumerate(totals)]

        zeros = [lax.full(sums, 0, conv.accumulator)] * width
        totals = lax.fori_loop(0, conv.in_features * math.prod(lead), add_row, zeros)
        out = jnp.stack([total.sum(len(positions)) for total in totals], len(positions))
        return lax.reshape(jnp.swapaxes(out, -1, -2), shape).astype(conv.out_dtype)


def _groups_last(array: jax.Array, groups: int) -> jax.Array:
    """The last axis, groups of features, split in features and groups."""
    return jnp.swapaxes(array.reshape(*array.shape[:-1], groups, -1), -1, -2)


def _chain(row: int, nbytes: int) -> int:
    """How many products of a row to add up in one expression: as few as keep `nbytes` times (row / that) in bounds."""
    fitting = [c for c in range(1, min(row, MAX_CHAIN) + 1) if row % c == 0]
    return next((c for c in fitting if nbytes * row // c <= MAX_SUMS), fitting[-1])
