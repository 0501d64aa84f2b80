"""`Lowering`: a way to express a convolution; `Composite`, one built on smaller convolutions; and their registry.

A lowering is a small pure function in two pieces, so that what depends on the kernel alone can be done
once: `out = apply(conv, dims, lhs, prepare(conv, dims, rhs))`, `lhs`, `rhs` and `out` in the layouts `dims`.
None but `xla`, which is as written, gets a convolution whose padding crosses: what padding cuts off is cut before.
A composite goes by its own name and that of the lowering of its smaller convolutions: `phases/dot`.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from functools import cache, lru_cache
from operator import attrgetter
from typing import Any, ClassVar

import jax
from jax import lax

from jaxlayout.convs.signature import ConvSignature
from jaxlayout.layout import ConvDimensionNumbers
from jaxlayout.runtime.nesting import within
from jaxlayout.runtime.settings import of_ours

Convolve = Callable[[ConvSignature, ConvDimensionNumbers, jax.Array, jax.Array], jax.Array]
"""Computes one of the smaller convolutions of a composite."""

MAX_DEPTH = 3
"""The longest chain of lowerings in one another: volumes by phases by planes by dots."""

MAX_PARTS = 16
"""A composite of more parts has them as XLA's own convolutions only: anything else compiles slowly so many times."""


class Lowering(ABC):
    """Subclass, give it a name and a version (raised with every change of what it computes), register it. It is traced
    under `settings.TRACED`, whatever the user has set."""

    name: ClassVar[str]
    version: ClassVar[int] = 1
    any_kernel: ClassVar[bool] = False
    """Whether `prepare` takes the kernel in any order, at no cost that matters: then it stays as it is written."""
    rereads: ClassVar[bool] = False
    """Whether it reads lhs several times in what XLA may fuse with what computes lhs."""
    batch_sequential: ClassVar[bool] = False
    """Whether it takes images one after the other, so that each device would need those of all others."""
    convolves: ClassVar[bool] = True
    """Whether there are convolutions of XLA's own in it."""
    relaxed: ClassVar[bool] = False
    """Whether it may be less accurate than XLA's own convolution, or spread a NaN farther: offered only under
    `numerics='relaxed'`."""
    may_crash: ClassVar[bool] = False
    """Whether it runs what may take the process down, hang it or read past its buffers (a library's kernel, one's own).
    Each form of it is run in a process of its own first, which has to be able to import its class by name."""

    @abstractmethod
    def dimension_numbers(self, conv: ConvSignature) -> Iterable[ConvDimensionNumbers]:
        """The layouts it is native in, the likely best first; nothing where it does not apply."""

    def native(self, conv: ConvSignature, dims: ConvDimensionNumbers) -> bool:
        """Whether it computes a convolution in these layouts."""
        fits = (
            (d.lhs, d.out) == (dims.lhs, dims.out) and (self.any_kernel or d.rhs == dims.rhs)
            for d in self.dimension_numbers(conv)
        )
        return any(fits)

    def prepare(self, conv: ConvSignature, dims: ConvDimensionNumbers, rhs: jax.Array) -> Any:
        """What depends on the kernel alone. Default: the kernel itself."""
        return rhs

    @abstractmethod
    def apply(self, conv: ConvSignature, dims: ConvDimensionNumbers, lhs: jax.Array, prepared: Any) -> jax.Array:
        """out, in the layout `dims.out` and of dtype `conv.out_dtype`. No array has an axis of size 0."""

    def least_work(self, conv: ConvSignature, dims: ConvDimensionNumbers) -> tuple[int, int]:
        """The least that it does: multiply-adds, and bytes read or written. Default: the plain sum without the zeros of
        padding and dilation, each operand and out once."""
        return conv.products, conv.nbytes

    def divisible(self, conv: ConvSignature, dims: ConvDimensionNumbers) -> bool:
        """Whether XLA computes it rightly where it divides arrays among devices. Its partitioner goes wrong on some
        convolutions whose out is laid out otherwise than lhs: in jaxlib 0.10 to 0.12, with wrong numbers or an error of
        the compiler, where feature groups or positions of a dilated lhs are divided (`bench.partitioner`). With the
        features divided of a grouped one that is a product of matrices, it gives wrong numbers, or corrupts memory and
        ends the process: such a convolution stays as it is written."""
        return not self.convolves or (dims.lhs == dims.out and not (conv.is_grouped and conv.is_product))

    def names(self, conv: ConvSignature, dims: ConvDimensionNumbers, depth: int = MAX_DEPTH) -> tuple[str, ...]:
        """The lowerings that it makes of itself in these layouts: one, or none where it is not native."""
        return (self.name,) if depth and self.native(conv, dims) else ()


def usual_dimension_numbers(conv: ConvSignature) -> Iterator[ConvDimensionNumbers]:
    """What a lowering that is at home in any order offers: what autodiff writes in a channels-last network, if it is
    a kernel gradient, channels last, and channels first."""
    if conv.is_kernel_gradient:
        yield ConvDimensionNumbers.kernel_gradient(conv.rank)
    yield ConvDimensionNumbers.channels_last(conv.rank)
    yield ConvDimensionNumbers.channels_first(conv.rank)


class Composite(Lowering):
    """A convolution as several smaller ones, or as one in fewer axes.

    Each of them goes through the lowering named `inner` where that is native, through XLA's own elsewhere. Every inner
    lowering that is native for one of them makes a candidate of its own.
    """

    inner = "xla"

    @abstractmethod
    def compose(
        self, conv: ConvSignature, dims: ConvDimensionNumbers, lhs: jax.Array, rhs: jax.Array, convolve: Convolve
    ) -> jax.Array:
        """out, by calling `convolve(part, dims, lhs, rhs)` for each part, its signature made by `replace`."""

    def apply(self, conv: ConvSignature, dims: ConvDimensionNumbers, lhs: jax.Array, prepared: Any) -> jax.Array:
        def convolve(part: ConvSignature, dims: ConvDimensionNumbers, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
            return evaluate(self._inside(part, dims), part, dims, lhs, rhs)

        return self.compose(conv, dims, lhs, prepared, convolve)

    def least_work(self, conv: ConvSignature, dims: ConvDimensionNumbers) -> tuple[int, int]:
        parts = _parts(self.name, conv, dims)
        return sum(lowering_named(self._inside(*part)).least_work(*part)[0] for part in parts), conv.nbytes

    def divisible(self, conv: ConvSignature, dims: ConvDimensionNumbers) -> bool:
        parts = _parts(self.name, conv, dims)
        return all(lowering_named(self._inside(*part)).divisible(*part) for part in parts)

    def _inside(self, part: ConvSignature, dims: ConvDimensionNumbers) -> str:
        own = self.inner == "xla" or not lowering_named(self.inner).native(part.cropped, dims)
        return xla_for(part) if own else self.inner

    def native(self, conv: ConvSignature, dims: ConvDimensionNumbers) -> bool:
        plain = self.inner == "xla" and not conv.masks
        return super().native(conv, dims) and (plain or self.inner in self.inners(conv, dims))

    def inners(self, conv: ConvSignature, dims: ConvDimensionNumbers, depth: int = MAX_DEPTH) -> tuple[str, ...]:
        """The lowerings worth having inside."""
        names, parts = {"xla": None}, dict.fromkeys(_parts(self.name, conv, dims))
        for part, order in parts if len(parts) <= MAX_PARTS else ():
            for lowering in _registry.values():
                names |= dict.fromkeys(lowering.names(part, order, depth - 1))
        masked = [pair for pair in parts if pair[0].masks]  # not to be left to XLA
        return tuple(
            name
            for name in names
            if all(name != "xla" and lowering_named(name).native(part, order) for part, order in masked)
        )

    def names(self, conv: ConvSignature, dims: ConvDimensionNumbers, depth: int = MAX_DEPTH) -> tuple[str, ...]:
        if depth == 0 or not Lowering.native(self, conv, dims):
            return ()
        return tuple(f"{self.name}/{inner}" for inner in self.inners(conv, dims, depth))


@lru_cache(maxsize=4096)
def _parts(
    name: str, conv: ConvSignature, dims: ConvDimensionNumbers
) -> tuple[tuple[ConvSignature, ConvDimensionNumbers], ...]:
    """The convolutions that a composite calls for, one by one."""
    conv = conv.cropped
    if conv.is_empty:
        return ()
    composite = _registry[name]
    assert isinstance(composite, Composite)
    parts: list[tuple[ConvSignature, ConvDimensionNumbers]] = []

    def convolve(part: ConvSignature, dims: ConvDimensionNumbers, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        if not part.cropped.is_empty:
            parts.append((part.cropped, dims))
        return lax.full(part.out_shape(dims.out), 0, part.out_dtype)

    lhs = jax.ShapeDtypeStruct(conv.lhs_shape(dims.lhs), conv.lhs_dtype)
    rhs = jax.ShapeDtypeStruct(conv.rhs_shape(dims.rhs), conv.rhs_dtype)
    with of_ours(wide=conv.is_wide):
        jax.eval_shape(lambda lhs, rhs: composite.compose(conv, dims, lhs, rhs, convolve), lhs, rhs)
    return tuple(parts)


_registry: dict[str, Lowering] = {}


def register_lowering(lowering: Lowering) -> Lowering:
    """Offer a lowering to every later tuning, and give it back.

    Raises:
      ValueError: for a name that is taken or no identifier, and for a lowering that may crash whose class another
        process cannot import by its name.
    """
    if lowering.name in _registry:
        raise ValueError(f"a lowering named {lowering.name!r} is registered already")
    if not lowering.name.isidentifier():
        raise ValueError(f"a lowering's name is an identifier, not {lowering.name!r}")
    if lowering.may_crash and (why := not_importable(type(lowering))):
        raise ValueError(f"lowering {lowering.name!r} may crash, so another process runs it first, but {why}")
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
        _parts.cache_clear()


def lowerings() -> dict[str, Lowering]:
    """All registered lowerings by name; composites with XLA's own convolution inside."""
    return dict(_registry)


def lowering_named(name: str) -> Lowering:
    """The lowering that a candidate names, `outer/inner` for a composite."""
    outer, _, inner = name.partition("/")
    if outer not in _registry:
        raise LookupError(f"no lowering named {outer!r} is registered, only {', '.join(_registry)}")
    found = _registry[outer]
    if not inner:
        return found
    if not isinstance(found, Composite):
        raise LookupError(f"{outer!r} in {name!r} is not a composite lowering")
    found = copy(found)
    found.inner = inner
    return found


def is_relaxed(name: str) -> bool:
    """Whether a lowering, or one inside it, is relaxed."""
    return any(lowering_named(part).relaxed for part in name.split("/"))


def xla_for(conv: ConvSignature) -> str:
    """The lowering that is XLA's own convolution where it is not as written."""
    return "cropped" if conv.crosses else "xla"


def rereads(name: str) -> bool:
    """Whether a lowering, or one inside it, reads lhs several times."""
    return any(lowering_named(part).rereads for part in name.split("/"))


def batch_sequential(name: str) -> bool:
    """Whether a lowering, or one inside it, takes images one after the other."""
    return any(lowering_named(part).batch_sequential for part in name.split("/"))


def may_crash(name: str) -> bool:
    """Whether a lowering, or one inside it, has to be run in a process of its own first."""
    return any(lowering_named(part).may_crash for part in name.split("/"))


def not_importable(cls: type) -> str:
    """Why another process cannot import a class by its name; '' if it can, as far as that is seen here."""
    name = f"{cls.__module__}.{cls.__qualname__}"
    if cls.__module__ in ("__main__", "__mp_main__"):
        return f"{name} cannot be imported there: put it into a module"
    try:
        found = attrgetter(cls.__qualname__)(sys.modules[cls.__module__])
    except (AttributeError, KeyError):
        found = None
    return "" if found is cls else f"{name} cannot be imported there: put it at the top level of a module"


def versioned(name: str) -> str:
    """The name of a lowering with the versions of all that it is made of."""
    return "/".join(f"{part}@{lowering_named(part).version}" for part in name.split("/"))


def prepared_growth(name: str, conv: ConvSignature, dims: ConvDimensionNumbers) -> int:
    """Bytes that what a lowering prepares takes more than the kernel."""
    rhs = jax.ShapeDtypeStruct(conv.rhs_shape(dims.rhs), conv.rhs_dtype)
    prepared = jax.eval_shape(lambda rhs: lowering_named(name).prepare(conv, dims, rhs), rhs)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(prepared)) - rhs.size * rhs.dtype.itemsize


def evaluate(name: str, conv: ConvSignature, dims: ConvDimensionNumbers, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """The convolution through one lowering, traced under settings of ours. Where that is more than one operation, it is
    a call by its name, which is traced and lowered once for many equal ones."""
    parts = tuple(map(lowering_named, name.split("/")))  # themselves, as a name may come to mean another
    run = _evaluate if name == "xla" else _call(name)
    # "tuning": somebody may have decorated what a lowering is made of: JAX's own convolution, say.
    with of_ours(wide=conv.is_wide), within("tuning"):
        return run(name, parts, conv, dims, lhs, rhs)


def _evaluate(
    name: str, parts: tuple[Lowering, ...], conv: ConvSignature, dims: ConvDimensionNumbers, lhs: Any, rhs: Any
) -> jax.Array:
    part = conv if name == "xla" else conv.cropped
    if part.is_empty:
        return lax.full(conv.out_shape(dims.out), 0, conv.out_dtype)
    if part is not conv:  # by a slice: XLA would put a pad into the convolution's own padding again, and not rightly
        for axis, (start, stop) in zip(dims.lhs.spatial, conv.kept, strict=True):
            lhs = lax.slice_in_dim(lhs, start, stop, axis=dims.lhs.axes.index(axis))
    found = lowering_named(name)
    return found.apply(part, dims, lhs, found.prepare(part, dims, rhs))


@cache
def _call(name: str) -> Any:
    """`_evaluate` as profilers show it: `jit(shifted)`."""

    def evaluate(*args: Any) -> jax.Array:
        return _evaluate(*args)

    evaluate.__name__ = evaluate.__qualname__ = name.replace("/", "_")
    return jax.jit(evaluate, static_argnums=(0, 1, 2, 3))
