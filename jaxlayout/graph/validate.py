"""Whether a plan fits a program: asked of a plan that was made elsewhere, perhaps for another version of it, and of one
from the table, which may be somebody else's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jax.extend import source_info_util

from jaxlayout.convs.candidates import Candidate, candidates
from jaxlayout.convs.lowering import xla_for
from jaxlayout.convs.primitive import CONVOLUTIONS, chosen_lowering
from jaxlayout.convs.signature import ConvSignature, written_dims
from jaxlayout.graph.build import Mode, Path
from jaxlayout.graph.plan import Plan
from jaxlayout.graph.rules import Orders, RegionRule, Rule, bodies_of, follow, rule_for
from jaxlayout.layout import identity
from jaxlayout.runtime._compat import open_jaxpr, rank_of


def located(jaxpr: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The equations that a plan can speak of, with where they are."""
    for i, eqn in enumerate(open_jaxpr(jaxpr).eqns):
        here = (*path, i)
        yield here, eqn
        for b, body in enumerate(bodies_of(eqn) or ()):
            yield from located(body.jaxpr, (*here, b))


def check_plan(jaxpr: Any, plan: Plan, *, relaxed: bool = True) -> None:
    """Raise ValueError, naming the equation, where a plan says what cannot be of this program. `relaxed`: it may have
    lowerings of relaxed numerics."""
    equations = dict(located(jaxpr)) if plan.choices else {}
    for path, mode in plan.choices.items():
        if path not in equations:
            raise ValueError(f"the plan does not fit: the program has no equation {path}")
        if why := _objection(equations[path], mode, relaxed):
            raise misfit(equations[path], path, why)


def misfit(eqn: Any, path: Path, why: str) -> ValueError:
    """The error for an equation that is not what a plan takes it for."""
    shapes = ", ".join(str(v.aval) for v in eqn.invars)
    line = source_info_util.summarize(eqn.source_info)
    return ValueError(f"the plan does not fit: equation {path} {eqn.primitive}({shapes}) {why} [{line}]")


def _objection(eqn: Any, mode: Mode, relaxed: bool) -> str:
    ranks = [rank_of(v) for v in (*eqn.invars, *eqn.outvars)]
    if ranks != [len(order) for order in (*mode.operands, *mode.results)]:
        return "has other operands or results than the plan says"
    if all(order == identity(len(order)) for order in (*mode.operands, *mode.results)) and mode.candidate is None:
        return ""  # as written
    rule = rule_for(eqn.primitive)
    if mode.candidate is not None:
        return _site_objection(eqn, mode, mode.candidate, relaxed)
    if isinstance(rule, Rule) and (labelling := rule.axes(eqn)) is not None:
        orders = Orders(mode.operands, mode.results)
        slots = enumerate((*orders.operands, *orders.results))
        possible = any(follow(labelling, slot, order) == orders for slot, order in slots)
        return "" if possible else "cannot have the orders that the plan says"
    if isinstance(rule, RegionRule) and bodies_of(eqn) is not None:
        fits = rule.inner_orders(eqn, Orders(mode.operands, mode.results)) is not None
        return "" if fits else "cannot have the orders that the plan says"
    return "has no rule for other orders"


def _site_objection(eqn: Any, mode: Mode, candidate: Candidate, relaxed: bool) -> str:
    if eqn.primitive not in CONVOLUTIONS:
        return "is not a convolution"
    dims = written_dims(eqn.params)
    lhs, rhs = (v.aval for v in eqn.invars)
    conv = ConvSignature.of(lhs, rhs, eqn.params)
    written = Candidate(chosen_lowering(eqn.params), dims)
    # XLA takes any order, and a plan may be of a device that prefers another.
    takes_any = candidate.lowering == xla_for(conv) and len(candidate.dims.lhs.axes) == len(dims.lhs.axes)
    if not takes_any and candidate not in candidates(conv, written, relaxed=relaxed):
        return f"cannot be computed by {candidate}"
    operands = candidate.dims.lhs.permutation_from(dims.lhs), candidate.dims.rhs.permutation_from(dims.rhs)
    agree = (*mode.operands, *mode.results) == (*operands, candidate.dims.out.permutation_from(dims.out))
    return "" if agree else "has other orders than its candidate"
