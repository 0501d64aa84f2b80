"""What of a plan may crash, and whether that has been seen to run in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxlayout.convs.lowering import may_crash
from jaxlayout.convs.signature import ConvSignature
from jaxlayout.graph.plan import Plan
from jaxlayout.graph.validate import located, misfit
from jaxlayout.measure.contained import Proofs


def needs_proof(plan: Plan) -> bool:
    """Whether anything in a plan may crash."""
    candidates = [mode.candidate for mode in plan.choices.values()]
    return any(candidate is not None and may_crash(candidate.lowering) for candidate in candidates)


def check_runs(jaxpr: Any, plan: Plan, proofs: Callable[[], Proofs]) -> None:
    """Raise ValueError, naming the equation, where a plan that fits has a form that must not run here. `proofs`: called
    where anything in it may crash."""
    if not needs_proof(plan):
        return
    equations, asked = dict(located(jaxpr)), proofs()
    for path, mode in plan.choices.items():
        if mode.candidate is not None:
            lhs, rhs = (v.aval for v in equations[path].invars)
            conv = ConvSignature.of(lhs, rhs, equations[path].params)
            if why := asked.objection(conv, mode.candidate):
                raise misfit(equations[path], path, f"must not be computed by {mode.candidate} here: {why}")
