"""`merged`: narrow groups as fewer, wider ones."""

from collections.abc import Iterable
from dataclasses import replace

import jax
from jax import lax

from jaxlayout.convs.lowering import Composite, Convolve, usual_dimension_numbers
from jaxlayout.convs.signature import ConvSignature
from jaxlayout.layout import ConvDimensionNumbers

MIN_FEATURES = 16
"""Groups of fewer in features are merged until they have as many: those of one vector register (measured on XLA:CPU,
groups of 8 gain a quarter as groups of 16 or 32, and lose half as groups of 64)."""


class Merged(Composite):
    """Neighbouring groups are one group with a kernel that is zero where an out feature meets an in feature of another
    group (the definition: XLA operation semantics, ConvWithGeneralPadding, feature_group_count, as a block-diagonal
    matrix). That makes more multiplications, of matrices wide enough to be fast.

    Applies to feature groups of 2 to `MIN_FEATURES` - 1 in features each, whose number has a divisor large enough to
    merge them by. Native in channels last and channels first. Memory: the kernel as often as groups are merged.
    Accuracy: that of the convolution inside.

    Relaxed: the zeros are multiplied, so a NaN or Inf in lhs spreads to the out features of the groups merged with its.
    """

    name = "merged"
    relaxed = True

    def dimension_numbers(self, conv: ConvSignature) -> Iterable[ConvDimensionNumbers]:
        if conv.batch_groups == 1 and _merged(conv) > 1:
            yield from usual_dimension_numbers(conv)

    def compose(
        self, conv: ConvSignature, dims: ConvDimensionNumbers, lhs: jax.Array, rhs: jax.Array, convolve: Convolve
    ) -> jax.Array:
        count, i, o = _merged(conv), dims.rhs.axes.index("I"), dims.rhs.axes.index("O")
        rhs = lax.concatenate([rhs] * count, i)
        group_in = lax.div(lax.broadcasted_iota(int, rhs.shape, i), conv.kernel_features)
        group_out = lax.div(lax.broadcasted_iota(int, rhs.shape, o), conv.out_features // conv.feature_groups)
        group_out = lax.rem(group_out, count)
        rhs = lax.select(group_in == group_out, rhs, lax.full_like(rhs, 0))
        return convolve(replace(conv, feature_groups=conv.feature_groups // count), dims, lhs, rhs)


def _merged(conv: ConvSignature) -> int:
    """How many groups to make one of; 1 for none."""
    groups, features = conv.feature_groups, conv.kernel_features
    enough = (n for n in range(2, groups + 1) if groups % n == 0 and n * features >= MIN_FEATURES)
    return next(enough, 1) if 1 < features < MIN_FEATURES else 1
