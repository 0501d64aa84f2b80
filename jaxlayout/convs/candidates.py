"""`Candidate`: one way to compute a convolution, dimension numbers x lowering; and their enumeration."""

from __future__ import annotations

from dataclasses import dataclass

from jaxlayout.convs.lowering import lowerings
from jaxlayout.convs.signature import ConvSignature
from jaxlayout.layout import ConvDimensionNumbers


@dataclass(frozen=True, slots=True)
class Candidate:
    """A lowering in the layouts it gets its operands and gives its result in."""

    lowering: str
    dims: ConvDimensionNumbers

    def __str__(self) -> str:
        return f"{self.lowering}:{self.dims}"

    @classmethod
    def parse(cls, text: str) -> Candidate:
        """The inverse of `str`."""
        lowering, _, dims = text.rpartition(":")
        return cls(lowering, ConvDimensionNumbers.parse(dims))


def candidates(conv: ConvSignature, written: Candidate) -> tuple[Candidate, ...]:
    """All that is worth timing for a convolution that stands in the program as `written`, which comes first.

    The orders are those that each lowering calls native. That prunes the full product (24 x 24 x 24 for two
    spatial axes) to a handful: any other order costs a native one plus transposes, and the plan places those
    itself, where they are shared or vanish.
    """
    found = {written: None}
    for lowering in lowerings().values():
        for dims in lowering.orders(conv):
            found[Candidate(lowering.name, dims)] = None
    return tuple(found)
