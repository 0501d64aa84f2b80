"""A scale and shift for each feature that follows a convolution, folded into its kernel:
`conv(x, k) * s + b` is `conv(x, k * s) + b`, and where `k`, `s` and `b` are invariant the product is taken once.

Batch normalisation in inference, `(conv - mean) * (rsqrt(var + eps) * gamma) + beta`, is a chain of such steps. This
rounds the kernel anew, so, like a new order, it is for the verifier of the whole function to allow.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import source_info_util
from jax.extend.core import Literal
from jax.extend.core import primitives as p

from jaxlayout.convs.primitive import CONVOLUTIONS
from jaxlayout.graph.build import static_shapes
from jaxlayout.graph.rules import Rule, is_placed, rule_for
from jaxlayout.graph.rules.elementwise import ELEMENTWISE
from jaxlayout.rewrite.invariant import invariant_values
from jaxlayout.runtime._compat import bind_equation, eval_equations, open_jaxpr
from jaxlayout.runtime.settings import TRACED, under

_SCALES = frozenset({p.mul_p, p.div_p, p.neg_p})
_STEPS = frozenset({p.add_p, p.sub_p, p.convert_element_type_p}) | _SCALES
_FAITHFUL = frozenset({p.broadcast_in_dim_p, p.reshape_p, p.squeeze_p, p.transpose_p}) | ELEMENTWISE
"""Where an axis of a result varies only if an axis with the same label of an operand does."""


def fold(jaxpr: Any, frozen: Sequence[bool], args: Sequence[Any]) -> Any:
    """The closed jaxpr with every chain of scales and shifts that can be folded; the same object if none can.

    `frozen`: which arguments are invariant. `args`: flat arguments or tracers, for their types. Left alone: chains of
    one shift, convolutions whose result is used elsewhere too, those whose kernel is coarser than their result, and
    chains past the point where they are finer or coarser than the convolution itself.
    """
    with under(TRACED):
        chains = _chains(jaxpr, frozen)
        return _folded(jaxpr, chains, args) if chains else jaxpr


def _folded(jaxpr: Any, chains: Sequence[Sequence[Any]], args: Sequence[Any]) -> Any:
    inside = {eqn.outvars[0] for chain in chains for eqn in chain}
    ends = {chain[-1].outvars[0] for chain in chains}

    def bind(eqn: Any, operands: Sequence[Any]) -> Sequence[Any] | None:
        if not inside.intersection(eqn.outvars):
            return None
        started = eqn.primitive in CONVOLUTIONS
        affine = _Affine(eqn, *operands) if started else _step(eqn, operands)
        return [affine.done() if eqn.outvars[0] in ends else affine]

    return jax.make_jaxpr(lambda *flat: eval_equations(jaxpr, flat, bind))(*args)


@dataclass(frozen=True, slots=True)
class _Affine:
    """`conv(lhs, kernel) * scale + shift`, not done yet. Scale and shift are arrays of one axis or none."""

    conv: Any
    lhs: Any
    kernel: Any
    scale: Any = None
    shift: Any = None

    @property
    def dtype(self) -> Any:
        """What scale and shift are computed in, at least single precision: they are rounded once."""
        return jnp.promote_types(self.kernel.dtype, jnp.float32)

    @property
    def feature(self) -> int:
        """The axis of the result that scale and shift go along."""
        return self.conv.params["dimension_numbers"].out_spec[1]

    def times(self, factor: Any) -> _Affine:
        scale = factor if self.scale is None else self.scale * factor
        return replace(self, scale=scale, shift=None if self.shift is None else self.shift * factor)

    def plus(self, term: Any) -> _Affine:
        return replace(self, shift=term if self.shift is None else lax.add(self.shift, term))

    def done(self) -> Any:
        """The folded convolution, with its one shift if it has any."""
        kernel, numbers = self.kernel, self.conv.params["dimension_numbers"]
        if self.scale is not None:
            wide = lax.convert_element_type(kernel, self.dtype)
            scaled = wide * _along(self.scale, numbers.rhs_spec[0], kernel.ndim)
            kernel = lax.convert_element_type(scaled, kernel.dtype)
        source = self.conv.source_info
        with source_info_util.user_context(source.traceback, name_stack=source.name_stack):
            (out,) = bind_equation(self.conv, [self.lhs, kernel])
        if self.shift is None:
            return out
        return lax.add(out, lax.convert_element_type(_along(self.shift, self.feature, out.ndim), out.dtype))


def _step(eqn: Any, operands: Sequence[Any]) -> _Affine:
    """A chain with one more equation: one operand is the chain so far, the other, if any, is invariant."""
    place = next(i for i, x in enumerate(operands) if isinstance(x, _Affine))
    affine = operands[place]
    if eqn.primitive is p.convert_element_type_p:
        return affine
    minus = jnp.asarray(-1, affine.dtype)
    if eqn.primitive is p.neg_p:
        return affine.times(minus)
    other = _vector(lax.convert_element_type(operands[1 - place], affine.dtype), affine.feature)
    if eqn.primitive is p.mul_p:
        return affine.times(other)
    if eqn.primitive is p.div_p:
        return affine.times(lax.div(lax.full_like(other, 1), other))
    if eqn.primitive is p.add_p:
        return affine.plus(other)
    return affine.plus(-other) if place == 0 else affine.times(minus).plus(other)


def _vector(array: jax.Array, axis: int) -> jax.Array:
    """What an array that varies along one axis has there."""
    if array.ndim == 0:
        return array
    ends = [size if a == axis else 1 for a, size in enumerate(array.shape)]
    return lax.reshape(lax.slice(array, [0] * array.ndim, ends), (ends[axis],))


def _along(vector: jax.Array, axis: int, rank: int) -> jax.Array:
    """A vector or number as an array of some rank that varies along an axis."""
    return lax.reshape(vector, [vector.size if a == axis else 1 for a in range(rank)])


def _chains(jaxpr: Any, frozen: Sequence[bool]) -> list[list[Any]]:
    """The chains to be folded: the equation of a convolution and those that scale and shift its result."""
    inner, invariant = open_jaxpr(jaxpr), invariant_values(jaxpr, frozen)
    varying = _varying(inner)
    users: dict[Any, list[Any]] = defaultdict(list)
    for eqn in inner.eqns:
        for atom in eqn.invars:
            if not isinstance(atom, Literal):
                users[atom].append(eqn)
    for atom in inner.outvars:
        if not isinstance(atom, Literal):
            users[atom].append(None)
    chains = []
    for eqn in inner.eqns:
        if not _may_start(eqn, invariant):
            continue
        chain = [eqn]
        while len(using := users[chain[-1].outvars[0]]) == 1 and using[0] is not None:
            if not _may_follow(using[0], chain[-1].outvars[0], eqn, invariant, varying):
                break
            chain.append(using[0])
        while chain[-1].outvars[0].aval.dtype != eqn.outvars[0].aval.dtype:
            chain.pop()
        steps = [step for step in chain[1:] if step.primitive is not p.convert_element_type_p]
        if len(steps) > 1 or any(step.primitive in _SCALES for step in steps):
            chains.append(chain)
    return chains


def _may_start(eqn: Any, invariant: frozenset[Any]) -> bool:
    if eqn.primitive not in CONVOLUTIONS or not static_shapes(eqn) or is_placed(eqn.params):
        return False
    lhs, kernel = eqn.invars
    dtype = eqn.outvars[0].aval.dtype
    moves = not isinstance(lhs, Literal) and lhs not in invariant
    return moves and kernel in invariant and kernel.aval.dtype == dtype and jnp.issubdtype(dtype, jnp.floating)


def _holds(wide: Any, dtype: Any) -> bool:
    """Whether a dtype holds all numbers of another floating one."""
    return jnp.issubdtype(wide, jnp.floating) and jnp.promote_types(wide, dtype) == wide


def _may_follow(
    eqn: Any, value: Any, conv: Any, invariant: frozenset[Any], varying: Mapping[Any, frozenset[int]]
) -> bool:
    """Whether an equation scales or shifts `value`, which comes of a convolution, by what is invariant and varies along
    its features alone; or rounds it to no less than the convolution gave (half precision is often normalised in
    single)."""
    feature, dtype = conv.params["dimension_numbers"].out_spec[1], conv.outvars[0].aval.dtype
    if eqn.primitive not in _STEPS or eqn.outvars[0].aval.shape != value.aval.shape:
        return False
    if eqn.primitive is p.div_p and eqn.invars[0] is not value:
        return False
    if eqn.primitive is p.convert_element_type_p and not _holds(eqn.outvars[0].aval.dtype, dtype):
        return False
    others = [atom for atom in eqn.invars if atom is not value]

    def fits(atom: Any) -> bool:
        if isinstance(atom, Literal):
            return np.ndim(atom.val) == 0
        return atom in invariant and varying[atom] <= {feature}

    return all(map(fits, others))


def _varying(inner: Any) -> dict[Any, frozenset[int]]:
    """The axes along which each variable of an open jaxpr may vary."""

    def at_most(atom: Any) -> frozenset[int]:
        return frozenset(a for a, size in enumerate(getattr(atom.aval, "shape", ())) if size != 1)

    found = {var: at_most(var) for var in (*inner.constvars, *inner.invars)}
    for eqn in inner.eqns:
        rule = rule_for(eqn.primitive) if eqn.primitive in _FAITHFUL else None
        labelling = rule.axes(eqn) if isinstance(rule, Rule) and static_shapes(eqn) else None
        for i, var in enumerate(eqn.outvars):
            found[var] = at_most(var)
            if labelling is not None:
                operands = [at_most(atom) if isinstance(atom, Literal) else found[atom] for atom in eqn.invars]
                pairs = zip(operands, labelling.operands, strict=True)
                moving = {label for axes, labels in pairs for a in axes for label in labels[a]}
                found[var] &= frozenset(a for a, labels in enumerate(labelling.results[i]) if moving & set(labels))
    return found
