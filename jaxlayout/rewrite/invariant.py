"""What is invariant: the values of a program that depend on frozen arguments alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend.core import Literal, jaxprs_in_params

from jaxlayout.graph.program import equations
from jaxlayout.runtime._compat import open_jaxpr

_RANDOM = ("random_", "rng_", "threefry")


def invariant_values(jaxpr: Any, frozen: Sequence[bool]) -> frozenset[Any]:
    """The variables of a jaxpr (not of those that it calls) that are invariant when the arguments marked in `frozen`
    and the constants do."""
    inner = open_jaxpr(jaxpr)
    invariant = {*inner.constvars, *(var for var, held in zip(inner.invars, frozen, strict=True) if held)}
    for eqn in inner.eqns:
        if is_invariant(eqn, invariant):
            invariant.update(eqn.outvars)
    return frozenset(invariant)


def is_invariant(eqn: Any, invariant: set[Any] | frozenset[Any]) -> bool:
    """Whether an equation may be done once, given the variables that are invariant. Not what has effects or speaks of a
    mesh axis, which is bound in the call alone, and no random numbers: they are cheaper to draw than to keep."""
    if eqn.effects or any(not (isinstance(atom, Literal) or atom in invariant) for atom in eqn.invars):
        return False
    inner = (inner for sub in jaxprs_in_params(eqn.params) for inner in equations(sub))
    return not any(str(one.primitive).startswith(_RANDOM) or _names_axes(one) for one in (eqn, *inner))


def _names_axes(eqn: Any) -> bool:
    axes = (eqn.params.get("axes", ()), eqn.params.get("axis_name", ()))
    named = [name for given in axes for name in (given if isinstance(given, tuple | list) else (given,))]
    return any(not isinstance(name, int | np.integer) for name in named)
