"""`fft`: a convolution with a very large kernel as products of spectra."""

import math
from collections.abc import Iterable

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxlayout.convs.lowering import Lowering
from jaxlayout.convs.signature import ConvSignature
from jaxlayout.layout import ConvDimensionNumbers, ConvLayout, KernelLayout

MIN_TAPS = 121
"""The multiplications that direct sums make per element, below which they are taken to be cheaper."""
MAX_BYTES = 256 * 2**20
"""The largest spectrum of a kernel."""


class Fft(Lowering):
    """Along its axes a convolution is a product of spectra: with lhs and rhs padded to sizes L no smaller than lhs with
    its padding, out[n, p, o] = sum_i irfft(rfft(lhs[n, :, i]) conj(rfft(rhs[:, i, o])))[p], conj because taps are met
    in the order of positions; the outputs asked for never wrap around (the convolution theorem; for networks:
    Mathieu, Henaff, LeCun 2013, "Fast Training of Convolutional Networks through FFTs"). Over features it is one
    matrix product for each frequency and group, or an elementwise product where there is one feature to a group.
    L is 5-smooth, as FFTs like it.

    Applies to one to three axes in float32 and float64, any groups, padding, stride (the dense result is sliced)
    and kernel dilation, without lhs dilation, where direct sums make `MIN_TAPS` multiplications or more per
    element: very large kernels, and the gradients to them. Native in channels first, as each transform wants its axes
    innermost, and in the order that autodiff writes a kernel gradient in there; the kernel in any order. Memory: lhs,
    rhs and out as complex spectra of half the size L, for rhs at most `MAX_BYTES`.

    Relaxed. The error is of the order of eps log L relative to the largest outputs of an image, not to each: small
    outputs beside large ones are less accurate. A NaN or Inf in lhs spreads over its whole image (of its group), one in
    rhs over everything that is out of its feature.
    """

    name = "fft"
    convolves = False
    relaxed = True
    any_kernel = True

    def dimension_numbers(self, conv: ConvSignature) -> Iterable[ConvDimensionNumbers]:
        known = all(isinstance(size, int) for size in (*conv.spatial, *conv.kernel))  # and not symbolic
        real = conv.lhs_dtype == conv.rhs_dtype == conv.out_dtype and conv.lhs_dtype in (np.float32, np.float64)
        if not (known and real and 1 <= conv.rank <= 3 and conv.in_features) or any(d != 1 for d in conv.lhs_dilation):
            return
        per_element = min(math.prod(conv.kernel) / math.prod(conv.strides), math.prod(conv.out_spatial))
        frequencies = math.prod(_sizes(conv)) // 2 * conv.kernel_features * conv.out_features
        if per_element < MIN_TAPS or 2 * frequencies * conv.lhs_dtype.itemsize > MAX_BYTES:
            return
        first = ConvLayout.channels_first(conv.rank)
        if conv.is_kernel_gradient:
            swapped = ConvLayout(f"CN{first.spatial}")
            yield ConvDimensionNumbers(swapped, KernelLayout(f"IO{first.spatial}"), swapped)
        yield ConvDimensionNumbers.channels_first(conv.rank)

    def least_work(self, conv: ConvSignature, dims: ConvDimensionNumbers) -> tuple[int, int]:
        return 0, conv.nbytes  # a product for each frequency, and the transforms

    def prepare(self, conv: ConvSignature, dims: ConvDimensionNumbers, rhs: jax.Array) -> jax.Array:
        """The conjugate spectrum: group, out features of the group, in features, frequencies."""
        groups, axes = conv.feature_groups * conv.batch_groups, range(2, conv.rank + 2)
        rhs = lax.transpose(rhs, KernelLayout.oi_first(conv.rank).permutation_from(dims.rhs))
        steps = zip(_sizes(conv), conv.kernel, conv.rhs_dilation, strict=True)
        padding = [(0, size - (k - 1) * d - 1, d - 1) for size, k, d in steps]
        rhs = lax.pad(rhs, lax.full((), 0, rhs.dtype), [(0, 0, 0), (0, 0, 0), *padding])
        spectrum = jnp.conj(jnp.fft.rfftn(rhs, axes=axes))
        return lax.reshape(spectrum, (groups, conv.out_features // groups, conv.kernel_features, _count(spectrum)))

    def apply(self, conv: ConvSignature, dims: ConvDimensionNumbers, lhs: jax.Array, prepared: jax.Array) -> jax.Array:
        home, groups, axes = ConvLayout.channels_first(conv.rank), prepared.shape[0], range(2, conv.rank + 2)
        sizes = _sizes(conv)
        lhs = lax.transpose(lhs, home.permutation_from(dims.lhs))
        edges = zip(sizes, conv.spatial, conv.padding, strict=True)
        padding = [(lo, whole - size - lo, 0) for whole, size, (lo, _) in edges]
        lhs = lax.pad(lhs, lax.full((), 0, lhs.dtype), [(0, 0, 0), (0, 0, 0), *padding])
        spectrum = jnp.fft.rfftn(lhs, axes=axes)
        frequencies, count = spectrum.shape[2:], _count(spectrum)
        batch = conv.batch // conv.batch_groups
        if conv.batch_groups > 1:  # the groups are runs of the batch, else of the features
            group, shape = 0, (groups, batch, conv.in_features, count)
        else:
            group, shape = 1, (batch, groups, conv.kernel_features, count)
        spectrum = lax.reshape(spectrum, shape)
        if group == 1 and conv.kernel_features == 1:
            spectrum = spectrum * lax.squeeze(prepared, [2])
        else:
            summed = ((2,), (2,)), ((group, 3), (0, 3))
            spectrum = lax.dot_general(spectrum, prepared, summed, conv.precision)
            spectrum = lax.transpose(spectrum, (2, 0, 3, 1))
        spectrum = lax.reshape(spectrum, (batch, conv.out_features, *frequencies))
        out = jnp.fft.irfftn(spectrum, sizes, axes)
        stop = [(size - 1) * s + 1 for size, s in zip(conv.out_spatial, conv.strides, strict=True)]
        out = lax.slice(out, [0] * out.ndim, [*out.shape[:2], *stop], [1, 1, *conv.strides])
        return lax.transpose(out, dims.out.permutation_from(home))


def _sizes(conv: ConvSignature) -> tuple[int, ...]:
    """L along each axis: the least 5-smooth size that holds lhs with its padding."""
    return tuple(_smooth(size + lo + hi) for size, (lo, hi) in zip(conv.spatial, conv.padding, strict=True))


def _smooth(size: int) -> int:
    while True:
        left = size
        for prime in (2, 3, 5):
            while left > 1 and left % prime == 0:
                left //= prime
        if left <= 1:
            return max(size, 1)
        size += 1


def _count(spectrum: jax.Array) -> int:
    return math.prod(spectrum.shape[2:])
