"""`wide_planes`: a convolution of three axes as one of two, with the taps along the depth among its features."""

from collections.abc import Iterable
from dataclasses import replace
from functools import reduce

import jax
from jax import lax

from jaxlayout.convs.lowering import Composite, Convolve
from jaxlayout.convs.lowerings.planes import MAX_PLANES, flattened, merged, without_depth
from jaxlayout.convs.signature import ConvSignature
from jaxlayout.layout import ConvDimensionNumbers


class WidePlanes(Composite):
    """All planes of lhs with all taps along the depth at once, as so many times the features of out; out[d] is then
    the sum over taps t of plane d + t, features t (kn2row of Vasudevan, Anderson, Gregg 2017, "Parallel Multi Channel
    Convolution using General Matrix Multiplication", along one axis). Against `planes`, the sum over taps is one pass
    over memory, and a convolution of few out features becomes one of enough to keep a matrix unit busy.

    Applies to ungrouped convolutions of three spatial axes with 2 to `MAX_PLANES` taps along the depth, there with
    stride 1 and without lhs dilation; any stride in the plane, any kernel dilation and padding. Native in channels
    last. Memory: out once for each tap. Accuracy: that of the convolution inside; partial sums in float32 for half
    precision.
    """

    name = "wide_planes"

    def dimension_numbers(self, conv: ConvSignature) -> Iterable[ConvDimensionNumbers]:
        plain = conv.rank == 3 and not conv.is_grouped and not conv.is_kernel_gradient
        if plain and conv.strides[0] == conv.lhs_dilation[0] == 1 and 2 <= conv.kernel[0] <= MAX_PLANES:
            yield ConvDimensionNumbers.channels_last(3)

    def compose(
        self, conv: ConvSignature, dims: ConvDimensionNumbers, lhs: jax.Array, rhs: jax.Array, convolve: Convolve
    ) -> jax.Array:
        taps, size, positions = conv.kernel[0], conv.spatial[0], conv.out_spatial[0]
        kernel = merged(lax.transpose(rhs, (1, 2, 3, 0, 4)), 4)
        part = replace(
            flattened(conv),
            batch=conv.batch * size,
            out_features=taps * conv.out_features,
            preferred_element_type=conv.partial_type,
        )
        every = convolve(part, without_depth(dims), merged(lhs, 1), kernel)
        # A barrier, or the convolution is computed anew for each tap where XLA can fuse it.
        every = lax.optimization_barrier(lax.reshape(every, (conv.batch, size, *every.shape[1:])))

        def of_tap(tap: int) -> jax.Array:
            first = tap * conv.out_features
            shift = conv.padding[0][0] - tap * conv.rhs_dilation[0]
            one = lax.slice_in_dim(every, first, first + conv.out_features, axis=4)
            edges = [(shift, positions - size - shift, 0) if axis == 1 else (0, 0, 0) for axis in range(5)]
            return lax.pad(one, lax.full((), 0, one.dtype), edges)

        return reduce(lax.add, map(of_tap, range(taps))).astype(conv.out_dtype)
