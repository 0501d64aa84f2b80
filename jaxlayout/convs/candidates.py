"""`Candidate`: one way to compute a convolution, dimension numbers x lowering; and their enumeration."""

from __future__ import annotations

from dataclasses import dataclass

from jaxlayout.convs.lowering import is_relaxed, lowerings, xla_for
from jaxlayout.convs.signature import ConvSignature
from jaxlayout.layout import ConvDimensionNumbers, ConvLayout, KernelLayout


@dataclass(frozen=True, slots=True)
class Candidate:
    """A lowering in the layouts it gets its operands and gives its result in."""

    lowering: str
    dims: ConvDimensionNumbers

    def __str__(self) -> str:
        return f"{self.lowering}:{self.dims}"

    @classmethod
    def parse(cls, text: str) -> Candidate:
        """The inverse of `str`. ValueError for dimension numbers that are none."""
        lowering, _, dims = text.rpartition(":")
        return cls(lowering, ConvDimensionNumbers.parse(dims))


def candidates(
    conv: ConvSignature,
    written: Candidate,
    *,
    relaxed: bool = False,
    preferred: ConvDimensionNumbers | None = None,
) -> tuple[Candidate, ...]:
    """All that is worth timing for a convolution that stands in the program as `written`, which comes first.

    The orders are those that each lowering calls native. That prunes the full product (24 x 24 x 24 for two
    spatial axes) to a handful: any other order costs a native one plus transposes, and the plan places those
    itself, where they are shared or vanish. Of several kernel orders beside the same lhs and out, only the one
    written and the first are kept; a lowering that takes the kernel in any order gets it as written. XLA's own
    convolution is offered in the layouts that the device prefers, too.
    """
    found = {written: None}
    for lowering in lowerings().values():
        kernels: dict[tuple[ConvLayout, ConvLayout], list[KernelLayout]] = {}
        for dims in lowering.dimension_numbers(conv):
            kernels.setdefault((dims.lhs, dims.out), []).append(dims.rhs)
        for (lhs, out), offered in kernels.items():
            asked = written.dims.rhs
            for rhs in [asked] if lowering.any_kernel else [r for r in offered if r in (offered[0], asked)]:
                dims = ConvDimensionNumbers(lhs, rhs, out)
                names = [n for n in lowering.names(conv, dims) if relaxed or not is_relaxed(n)]
                found |= dict.fromkeys(Candidate(name, dims) for name in names)
    if preferred is not None and "xla" in lowerings():
        found |= {Candidate(xla_for(conv), preferred): None}
    return tuple(found)
