"""`Lowering`: a way to express a convolution; and the open registry of them.

A lowering is a small pure function in two pieces, so that what depends on the kernel alone can be done
once: `out = apply(conv, dims, lhs, prepare(conv, dims, rhs))`, `lhs`, `rhs` and `out` in the layouts `dims`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import jax

from jaxlayout.convs.signature import ConvSignature
from jaxlayout.layout import ConvDimensionNumbers


class Lowering(ABC):
    """Subclass, give it a name and a version (raised with every change of what it computes), register it."""

    name: ClassVar[str]
    version: ClassVar[int] = 1
    any_kernel: ClassVar[bool] = False
    """Whether `prepare` takes the kernel in any order, at no cost that matters: then it stays as it is written."""

    @abstractmethod
    def orders(self, conv: ConvSignature) -> Iterable[ConvDimensionNumbers]:
        """The layouts it is native in, the likely best first; nothing where it does not apply."""

    def native(self, conv: ConvSignature, dims: ConvDimensionNumbers) -> bool:
        """Whether it computes a convolution in these layouts."""
        fits = (
            (d.lhs, d.out) == (dims.lhs, dims.out) and (self.any_kernel or d.rhs == dims.rhs) for d in self.orders(conv)
        )
        return any(fits)

    def prepare(self, conv: ConvSignature, dims: ConvDimensionNumbers, rhs: jax.Array) -> Any:
        """What depends on the kernel alone. Default: the kernel itself."""
        return rhs

    @abstractmethod
    def apply(self, conv: ConvSignature, dims: ConvDimensionNumbers, lhs: jax.Array, prepared: Any) -> jax.Array:
        """out, in the layout `dims.out` and of dtype `conv.out_dtype`."""


_registry: dict[str, Lowering] = {}


def register_lowering(lowering: Lowering) -> Lowering:
    """Offer a lowering to every later tuning. A name is taken once."""
    if lowering.name in _registry:
        raise ValueError(f"a lowering named {lowering.name!r} is registered already")
    _registry[lowering.name] = lowering
    return lowering


@contextmanager
def registered(lowering: Lowering) -> Iterator[Lowering]:
    """Register for the length of a `with` block."""
    register_lowering(lowering)
    try:
        yield lowering
    finally:
        del _registry[lowering.name]


def lowerings() -> dict[str, Lowering]:
    """All registered lowerings by name."""
    return dict(_registry)


def evaluate(name: str, conv: ConvSignature, dims: ConvDimensionNumbers, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """The convolution through one lowering."""
    lowering = _registry[name]
    return lowering.apply(conv, dims, lhs, lowering.prepare(conv, dims, rhs))
