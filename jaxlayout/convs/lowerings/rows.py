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

MAX_SUMS = 2**21
"""Partial sums are kept for this many bytes at most, about what two cores have in caches of their own, if it can be."""
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
    convolves = False
    version = 2
    rereads = True
    batch_sequential = True

    def dimension_numbers(self, conv: ConvSignature) -> Iterable[ConvDimensionNumbers]:
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
        padding = [(0, 0, 0), *((lo, hi, 0) for lo, hi in conv.padding), (0, 0, 0)]
        groups, inputs = conv.batch_groups, conv.batch // conv.batch_groups
        outputs = conv.out_features // groups
        # A group of one feature is a plain vector: XLA's loops over unit axes are slow.
        ones = inputs == outputs == 1
        lhs = _groups_last(lax.pad(lhs, lax.full((), 0, lhs.dtype), padding), () if ones else (inputs, 1), groups)
        rhs = _groups_last(prepared, () if ones else (1, outputs), groups)
        lhs, rhs = lax.optimization_barrier((lhs, rhs))
        *lead, row = conv.kernel
        *positions, width = conv.out_spatial
        *strides, stride = conv.strides
        *steps, step = conv.rhs_dilation
        features = (groups,) if ones else (inputs, outputs, groups)
        chain = _chain(row, math.prod((*positions, width, *features)) * conv.accumulator.itemsize)

        def add_row(n: jax.Array, totals: list[jax.Array]) -> list[jax.Array]:
            at = _unravelled(n, (conv.in_features, *lead))
            reach = [(p - 1) * s + 1 for p, s in zip(positions, strides, strict=True)]
            whole = lhs.shape[len(at) :]
            start = [at[0], *(i * d for i, d in zip(at[1:], steps, strict=True)), *[0] * len(whole)]
            met = lax.dynamic_slice(lhs, start, (1, *reach, *whole))[0]
            met = met[tuple(slice(None, None, s) for s in strides)].astype(conv.accumulator)
            whole = rhs.shape[len(at) :]
            given = lax.dynamic_slice(rhs, [*at, *[0] * len(whole)], (1,) * len(at) + whole)
            given = lax.reshape(given, whole).astype(conv.accumulator)

            def added(tap: int, total: jax.Array) -> jax.Array:
                for q in range(chain):
                    first, every = tap * stride + q * step, chain * step
                    last = first + (row // chain - 1) * every + 1
                    view = lax.slice_in_dim(met, first, last, every, axis=len(positions))
                    total = lax.add(total, view * given[q::chain])
                return total

            return [added(tap, total) for tap, total in enumerate(totals)]

        zeros = [lax.full((*positions, row // chain, *features), 0, conv.accumulator)] * width
        totals = lax.fori_loop(0, conv.in_features * math.prod(lead), add_row, zeros)
        out = jnp.stack([total.sum(len(positions)) for total in totals], len(positions))
        out = out if ones else jnp.swapaxes(out, -1, -2)
        return lax.reshape(out, shape).astype(conv.out_dtype)


def _unravelled(n: jax.Array, sizes: tuple[int, ...]) -> list[jax.Array]:
    """Where number n is in an array of some sizes."""
    at: list[jax.Array] = []
    for size in reversed(sizes):
        at.insert(0, lax.rem(n, size))
        n = lax.div(n, size)
    return at


def _groups_last(array: jax.Array, features: tuple[int, ...], groups: int) -> jax.Array:
    """The last axis, groups of features, split in the features and the groups."""
    split = array.reshape(*array.shape[:-1], groups, *features)
    return jnp.moveaxis(split, array.ndim - 1, -1)


def _chain(row: int, nbytes: int) -> int:
    """How many products of a row to add up in one expression: as few as keep `nbytes` times (row / that) in bounds."""
    fitting = [c for c in range(1, min(row, MAX_CHAIN) + 1) if row % c == 0]
    return next((c for c in fitting if nbytes * row // c <= MAX_SUMS), fitting[-1])
