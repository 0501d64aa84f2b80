"""`materialised`: any lowering, of an lhs that is computed once before."""

from collections.abc import Iterable
from typing import Any

import jax

from jaxlayout.convs.lowering import Composite, Convolve, lowering_named
from jaxlayout.convs.materialise import materialise
from jaxlayout.convs.signature import ConvSignature
from jaxlayout.layout import ConvDimensionNumbers


def materialised(lowering: str) -> str:
    """The name of a lowering whose lhs is computed once before."""
    return f"{Materialised.name}/{lowering}"


def is_materialised(lowering: str) -> bool:
    """Whether a lowering is of that kind."""
    return lowering.startswith(materialised(""))


class Materialised(Composite):
    """The lowering inside, for where lhs is the result of something costly that XLA would fuse with it, and so compute
    anew for each tap. Never a candidate: by itself it computes what the one inside does, in the same time. The
    interpreter puts it where lhs is of that kind."""

    name = "materialised"

    def dimension_numbers(self, conv: ConvSignature) -> Iterable[ConvDimensionNumbers]:
        return ()

    def native(self, conv: ConvSignature, dims: ConvDimensionNumbers) -> bool:
        return lowering_named(self.inner).native(conv, dims)

    def prepare(self, conv: ConvSignature, dims: ConvDimensionNumbers, rhs: jax.Array) -> Any:
        return lowering_named(self.inner).prepare(conv, dims, rhs)

    def apply(self, conv: ConvSignature, dims: ConvDimensionNumbers, lhs: jax.Array, prepared: Any) -> jax.Array:
        return lowering_named(self.inner).apply(conv, dims, materialise(lhs, lhs), prepared)

    def compose(
        self, conv: ConvSignature, dims: ConvDimensionNumbers, lhs: jax.Array, rhs: jax.Array, convolve: Convolve
    ) -> jax.Array:
        return convolve(conv, dims, materialise(lhs, lhs), rhs)
