"""A program in two parts: what depends on frozen arguments alone, done once, and the rest.

What passes from the first to the second are arrays, so the second takes them as arguments and the compiler never
sees them as constants.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax.extend.core import Literal
from jax.extend.core import primitives as p

from jaxlayout.convs.lowering import evaluate, lowering_named
from jaxlayout.convs.primitive import is_explicit, tuned_conv_p
from jaxlayout.convs.signature import ConvSignature, written_dims
from jaxlayout.graph.rules import bodies_of
from jaxlayout.rewrite.invariant import invariant_values, is_invariant
from jaxlayout.runtime._compat import consts_of, eval_equations, open_jaxpr, run_equations


def flattened(function: Callable[..., Sequence[Any]], args: Sequence[Any], *, expand: bool = False) -> Any:
    """The closed jaxpr of a function of flat arguments with the bodies of its `jit` calls in their place: of a call as
    a whole either all operands are invariant or nothing is. `expand`: convolutions that have been chosen, too, as what
    their lowering does with the kernel and with the image. Calls with shardings of their own stay calls."""

    def bind(eqn: Any, operands: Sequence[Any]) -> list[Any] | None:
        if expand and eqn.primitive is tuned_conv_p:
            lhs, rhs = operands
            name, conv, dims = eqn.params["lowering"], ConvSignature.of(lhs, rhs, eqn.params), written_dims(eqn.params)
            # Others are seen to where they are lowered.
            if is_explicit(eqn.outvars[0].aval) or not lowering_named(name).divisible(conv, dims):
                return None
            lowered = jax.make_jaxpr(partial(evaluate, name, conv, dims))(*operands)
            return eval_equations(lowered, operands, bind)
        if eqn.primitive is p.jit_p and (bodies := bodies_of(eqn)) is not None:
            return eval_equations(bodies[0].jaxpr, operands, bind)
        return None

    traced = jax.make_jaxpr(function)(*args)
    return jax.make_jaxpr(lambda *flat: eval_equations(traced, flat, bind))(*args)


@dataclass(frozen=True, slots=True)
class Split:
    """`run(*prepare(frozen), *rest)` is what the whole program gives."""

    jaxpr: Any
    frozen: tuple[bool, ...]
    """Which arguments of the jaxpr are."""
    kept: tuple[Any, ...]
    """Variables: the frozen arguments that the rest needs as they are, then what is computed once."""
    once: tuple[Any, ...]
    """Equations, in order, as are those of the rest: effects come as often as they did, in the order they did."""
    rest: tuple[Any, ...]

    @classmethod
    def of(cls, jaxpr: Any, frozen: Sequence[bool]) -> Split:
        """Split a closed jaxpr. What no result and no effect needs is in neither part; views of what is invariant, and
        what depends on no argument at all, are in both."""
        inner = open_jaxpr(jaxpr)
        invariant = invariant_values(jaxpr, frozen)
        constant = invariant_values(jaxpr, [False] * len(frozen))  # those the compiler may know
        uses = Counter(var for eqn in inner.eqns for var in _variables(eqn.invars))
        wanted = _variables(inner.outvars)
        kept: list[Any] = []
        rest: list[Any] = []
        for eqn in reversed(inner.eqns):
            needed = [var for var in eqn.outvars if var in wanted]
            if is_invariant(eqn, invariant) and not is_invariant(eqn, constant) and not _is_view(eqn, uses):
                kept += needed
            elif needed or eqn.effects:
                rest.append(eqn)
                wanted |= _variables(eqn.invars)
        lives = set(kept)
        once: list[Any] = []
        for eqn in reversed(inner.eqns):
            if is_invariant(eqn, invariant) and any(var in lives for var in eqn.outvars):
                once.append(eqn)
                lives |= _variables(eqn.invars)
        as_they_are = (var for var, held in zip(inner.invars, frozen, strict=True) if held and var in wanted)
        return cls(jaxpr, tuple(frozen), (*as_they_are, *kept), tuple(once[::-1]), tuple(rest[::-1]))

    @classmethod
    def unprepared(cls, jaxpr: Any, frozen: Sequence[bool]) -> Split:
        """The split of which nothing is done once: the frozen arguments are kept as they are."""
        inner = open_jaxpr(jaxpr)
        held = (var for var, held in zip(inner.invars, frozen, strict=True) if held)
        return cls(jaxpr, tuple(frozen), tuple(held), (), tuple(inner.eqns))

    @property
    def nbytes(self) -> tuple[int, int]:
        """Of the frozen arguments, and of what is kept of them."""
        given, _ = self.sides(open_jaxpr(self.jaxpr).invars)
        return sum(map(_nbytes, given)), sum(map(_nbytes, self.kept))

    def sides(self, args: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """The frozen ones of all arguments, and the others."""
        pairs = list(zip(args, self.frozen, strict=True))
        return [x for x, held in pairs if held], [x for x, held in pairs if not held]

    def prepare(self, frozen: Sequence[Any]) -> tuple[Any, ...]:
        """What the rest needs, from all frozen arguments."""
        names, _ = self.sides(open_jaxpr(self.jaxpr).invars)
        given = dict(zip(names, frozen, strict=True))
        computed = [var for var in self.kept if var not in given]

        def compute(*arrays: Any) -> list[Any]:
            env = self._constants() | dict(zip(names, arrays, strict=True))
            run_equations(self.once, env)
            return [env[var] for var in computed]

        made = dict(zip(computed, jax.jit(compute)(*frozen) if computed else (), strict=True))
        return tuple((given | made)[var] for var in self.kept)

    def run(self, *args: Any) -> list[Any]:
        """The results, from what was prepared and the other arguments, all flat."""
        _, moving = self.sides(open_jaxpr(self.jaxpr).invars)
        env = self._constants() | dict(zip((*self.kept, *moving), args, strict=True))
        run_equations(self.rest, env)
        return [atom.val if isinstance(atom, Literal) else env[atom] for atom in open_jaxpr(self.jaxpr).outvars]

    def _constants(self) -> dict[Any, Any]:
        return dict(zip(open_jaxpr(self.jaxpr).constvars, consts_of(self.jaxpr), strict=True))


def _nbytes(var: Any) -> int:
    return var.aval.size * var.aval.dtype.itemsize


def _variables(atoms: Sequence[Any]) -> set[Any]:
    return {atom for atom in atoms if not isinstance(atom, Literal)}


def _is_view(eqn: Any, uses: Mapping[Any, int]) -> bool:
    """Whether an equation only looks at an array as another, at no cost inside what reads it: kept, it would make large
    arrays of small ones, or many of one."""
    if eqn.primitive is p.slice_p:
        return uses[eqn.invars[0]] > 1
    return eqn.primitive in (p.broadcast_in_dim_p, p.reshape_p, p.squeeze_p)
