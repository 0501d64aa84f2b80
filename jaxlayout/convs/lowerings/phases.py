"""`phases`: a convolution over dilated input as one plain convolution for each phase of its output."""

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import jax
from jax import lax

from jaxlayout.convs.lowering import Composite, Convolve, usual_dimension_numbers
from jaxlayout.convs.signature import ConvSignature
from jaxlayout.layout import ConvDimensionNumbers

MAX_PHASES = 64


@dataclass(frozen=True, slots=True)
class _Phase:
    """Along one axis, the outputs first, first + period, ... and the taps first_tap, first_tap + tap_step, ... that
    they read; what remains is an undilated convolution."""

    outputs: int
    first_tap: int
    taps: int
    tap_step: int
    stride: int
    rhs_dilation: int
    low: int
    """Padding below."""


class Phases(Composite):
    """Along an axis dilated by d, out[p] = sum_t lhs[(p s + t r - lo) / d] rhs[t] over the taps t for which that is
    whole (s the stride, r the kernel's dilation). Which taps these are depends on p modulo d / gcd(s, d) alone:
    outputs of one phase are a convolution of lhs itself with every d / gcd(r, d)-th tap, and the phases interleaved are
    out (Dumoulin and Visin 2016, "A guide to convolution arithmetic for deep learning"; sub-pixel convolution: Shi et
    al. 2016). No zero that stands between elements is multiplied.

    Applies to transposed convolutions, gradients to the input of strided ones, and gradients to the kernel of
    transposed ones. Native in channels last and channels first, and in the order that autodiff writes a kernel
    gradient in. Memory: out once more. Accuracy: that of the convolutions inside; a NaN in lhs does not reach outputs
    that XLA's dilated convolution would multiply by zero.
    """

    name = "phases"
    version = 2

    def dimension_numbers(self, conv: ConvSignature) -> Iterable[ConvDimensionNumbers]:
        if all(d == 1 for d in conv.lhs_dilation) or math.prod(map(len, _phases(conv))) > MAX_PHASES:
            return
        yield from usual_dimension_numbers(conv)

    def compose(
        self, conv: ConvSignature, dims: ConvDimensionNumbers, lhs: jax.Array, rhs: jax.Array, convolve: Convolve
    ) -> jax.Array:
        spatial = dims.out.spatial
        phases = _phases(conv)
        whole = [-(-size // len(axis)) for size, axis in zip(conv.out_spatial, phases, strict=True)]

        def one(chosen: tuple[_Phase, ...]) -> jax.Array:
            sizes = dict(zip(dims.out.axes, conv.out_shape(dims.out), strict=True))
            sizes |= {a: p.outputs for a, p in zip(spatial, chosen, strict=True)}
            if any(p.outputs == 0 or p.taps == 0 for p in chosen):
                out = lax.full([sizes[a] for a in dims.out.axes], 0, conv.out_dtype)
            else:
                part = _part(conv, chosen)
                taps = {a: slice(p.first_tap, None, p.tap_step) for a, p in zip(spatial, chosen, strict=True)}
                out = convolve(part, dims, lhs, rhs[tuple(taps.get(a, slice(None)) for a in dims.rhs.axes)])
            short = {a: w - p.outputs for a, w, p in zip(spatial, whole, chosen, strict=True)}
            return lax.pad(out, lax.full((), 0, out.dtype), [(0, short.get(a, 0), 0) for a in dims.out.axes])

        outs = iter([one(chosen) for chosen in itertools.product(*phases)])
        out = _interleaved(outs, [(dims.out.axes.index(a), len(axis)) for a, axis in zip(spatial, phases, strict=True)])
        return lax.slice(out, [0] * out.ndim, conv.out_shape(dims.out))


def _interleaved(outs: Iterator[jax.Array], axes: list[tuple[int, int]]) -> jax.Array:
    """The phases, the last axis turning fastest, woven into one array."""
    if not axes:
        return next(outs)
    (axis, count), *rest = axes
    woven = [_interleaved(outs, rest) for _ in range(count)]
    if count == 1:
        return woven[0]
    shape = list(woven[0].shape)
    shape[axis] *= count
    return lax.reshape(lax.concatenate([lax.expand_dims(x, (axis + 1,)) for x in woven], axis + 1), shape)


def _phases(conv: ConvSignature) -> list[list[_Phase]]:
    """For each axis, its phases in order."""
    periods = [d // math.gcd(s, d) for s, d in zip(conv.strides, conv.lhs_dilation, strict=True)]
    return [[_phase(conv, axis, first) for first in range(period)] for axis, period in enumerate(periods)]


def _phase(conv: ConvSignature, axis: int, first: int) -> _Phase:
    size, kernel, stride = conv.out_spatial[axis], conv.kernel[axis], conv.strides[axis]
    dilation, step = conv.lhs_dilation[axis], conv.rhs_dilation[axis]
    period, tap_step = dilation // math.gcd(stride, dilation), dilation // math.gcd(step, dilation)
    at = first * stride - conv.padding[axis][0]
    fitting = [t for t in range(min(tap_step, kernel)) if (at + t * step) % dilation == 0]
    tap = fitting[0] if fitting else kernel
    return _Phase(
        outputs=len(range(first, size, period)),
        first_tap=tap,
        taps=len(range(tap, kernel, tap_step)),
        tap_step=tap_step,
        stride=period * stride // dilation,
        rhs_dilation=tap_step * step // dilation,
        low=-((at + tap * step) // dilation),
    )


def _part(conv: ConvSignature, phases: tuple[_Phase, ...]) -> ConvSignature:
    """The convolution that gives the outputs of one phase along each axis."""
    padding = []
    for size, p in zip(conv.spatial, phases, strict=True):
        reach = (p.outputs - 1) * p.stride + (p.taps - 1) * p.rhs_dilation + 1
        padding.append((p.low, reach - size - p.low))
    return replace(
        conv,
        kernel=tuple(p.taps for p in phases),
        strides=tuple(p.stride for p in phases),
        rhs_dilation=tuple(p.rhs_dilation for p in phases),
        lhs_dilation=(1,) * conv.rank,
        padding=tuple(padding),
    )
