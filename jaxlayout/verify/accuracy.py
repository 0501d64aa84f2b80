"""How accurate each output of a program can be: what is rounded, and summed, on the way to it.

One coarse number makes coarse what is computed from it, and nothing else. So accuracy is handed on from equation to
equation, and through the bodies of loops, branches and calls by the ports that orders go by.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from jax.extend.core import Literal, jaxprs_in_params
from jax.extend.core.primitives import reduce_precision_p

from jaxlayout.convs.primitive import CONVOLUTIONS
from jaxlayout.convs.signature import ConvSignature
from jaxlayout.graph.rules.base import Body, Port, RegionRule, rule_for
from jaxlayout.graph.rules.calls import straight
from jaxlayout.measure.jobs import TOLERANCE
from jaxlayout.runtime._compat import open_jaxpr

MAX_TOLERANCE = 0.1
"""Where c*eps*sqrt(K) of a whole half-precision network exceeds this share of the rms, it would allow anything: what
the original itself moves by decides then."""


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How accurate one value can be, computed from exact arguments."""

    eps: float = 0.0
    """The machine epsilon of the coarsest numbers on the way to it; 0 where nothing is computed."""
    summed: float = 0.0
    """Numbers summed on the longest way to it, by convolutions, products and sums, one after the other."""

    def tolerance(self, relax: float = 1.0) -> float:
        """The error allowed, relative to the rms. `relax`: multiplies it."""
        return min(MAX_TOLERANCE, relax * TOLERANCE * self.eps * math.sqrt(max(1.0, self.summed)))


def accuracies(jaxpr: Any, given: Sequence[Accuracy] | None = None) -> list[Accuracy]:
    """That of each output of a jaxpr. `given`: of its arguments; without, they are exact."""
    inner = open_jaxpr(jaxpr)
    known = dict(zip(inner.invars, given or (), strict=given is not None))

    def of(atom: Any) -> Accuracy:
        return Accuracy() if isinstance(atom, Literal) else known.get(atom, Accuracy())

    for eqn in inner.eqns:
        known.update(zip(eqn.outvars, _results(eqn, list(map(of, eqn.invars))), strict=True))
    return list(map(of, inner.outvars))


def _coarsest(some: Iterable[Accuracy]) -> Accuracy:
    some = list(some)
    return Accuracy(max((a.eps for a in some), default=0.0), max((a.summed for a in some), default=0.0))


def _results(eqn: Any, operands: Sequence[Accuracy]) -> list[Accuracy]:
    rule, inside = rule_for(eqn.primitive), list(jaxprs_in_params(eqn.params))
    if isinstance(rule, RegionRule) and (bodies := rule.bodies(eqn)):
        return _through(eqn, bodies, rule.ports(eqn), operands)
    if isinstance(rule, RegionRule) and len(inside) == 1:  # orders do not enter this one
        return _through(eqn, (Body(inside[0]),), straight(eqn), operands)
    before = _coarsest([*operands, *(a for body in inside for a in accuracies(body))])
    summed = before.summed + _summed(eqn)
    return [Accuracy(max(before.eps, _eps(eqn, var.aval)), summed) for var in eqn.outvars]


def _through(eqn: Any, bodies: Sequence[Body], ports: Sequence[Port], operands: Sequence[Accuracy]) -> list[Accuracy]:
    """What is carried round a loop gets as coarse as it can; what its trips sum, one does after the other."""
    trips = max(body.times for body in bodies)
    loops = trips > 1
    at = [_coarsest(operands[i] for i in port.operands) for port in ports]
    if loops:
        at = [replace(a, summed=0.0) for a in at]
    while True:
        places = {place: a for port, a in zip(ports, at, strict=True) for place in port.invars}
        found = [
            accuracies(body.jaxpr, [places[b, i] for i in range(len(open_jaxpr(body.jaxpr).invars))])
            for b, body in enumerate(bodies)
        ]
        left = [_coarsest([a, *(found[b][i] for b, i in port.outvars)]) for port, a in zip(ports, at, strict=True)]
        if all(a.eps == b.eps for a, b in zip(at, left, strict=True)) or not loops:
            break
        at = [replace(a, eps=b.eps) for a, b in zip(at, left, strict=True)]
    results = {i: a for port, a in zip(ports, left, strict=True) for i in port.results}
    if loops:
        summed = _coarsest(operands).summed + trips * _coarsest(left).summed
        results = {i: replace(a, summed=summed) for i, a in results.items()}
    return [results[i] for i in range(len(eqn.outvars))]


def _summed(eqn: Any) -> float:
    """How many numbers an equation sums for one."""
    shape: Any = getattr(eqn.invars[0].aval, "shape", ()) if eqn.invars else ()
    if eqn.primitive in CONVOLUTIONS:
        lhs, rhs = (v.aval for v in eqn.invars)
        return ConvSignature.of(lhs, rhs, eqn.params).contraction
    match eqn.primitive.name:
        case "dot_general":
            return math.prod(shape[a] for a in eqn.params["dimension_numbers"][0][0])
        case "reduce_sum":
            return math.prod(shape[a] for a in eqn.params["axes"])
        case "reduce_window_sum":
            return math.prod(eqn.params["window_dimensions"])
        case "cumsum":
            return shape[eqn.params["axis"]]
    return 0.0


def _eps(eqn: Any, aval: Any) -> float:
    """That of the numbers an equation gives."""
    dtype = getattr(aval, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
        return 0.0
    own = float(jnp.finfo(dtype).eps)
    return max(own, 2.0 ** -eqn.params["mantissa_bits"]) if eqn.primitive is reduce_precision_p else own
