"""The policy 'channels_last': a plan without measuring, from the same graph and solver as any other.

Every convolution is XLA's own, channels last with the kernel that the device's `LayoutPolicy` has beside that; a
conversion costs its bytes, so a value with several readers is converted once, and before it is padded or widened
rather than after. That may be slower than what was written: nothing is timed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from jaxlayout.convs.candidates import Candidate
from jaxlayout.convs.lowering import xla_for
from jaxlayout.convs.signature import Context, ConvSignature
from jaxlayout.graph.build import LayoutGraph, Mode, Node, build_graph
from jaxlayout.graph.plan import Plan
from jaxlayout.graph.solve import solve
from jaxlayout.layout import ConvDimensionNumbers, LayoutPolicy, Order
from jaxlayout.tuning.outcome import Outcome, untouched
from jaxlayout.verify.accept import Verdict

OTHERS = 100
"""A program is left alone where it has more than so many other equations for each convolution, those in loops counted
as often as they run. Equations on numbers and vectors do not count: they have no order. Networks have 9 to 33 to each,
training steps 9 to 42 (`bench.models`, `bench.training`)."""


def force(jaxpr: Any, policy: LayoutPolicy, context: Context, invariant: Collection[Any] = ()) -> Outcome:
    """The outcome for a closed jaxpr. `invariant`: its variables that are computed once, and cost nothing to
    convert."""

    def ways(conv: ConvSignature, written: Candidate) -> Sequence[Candidate]:
        if written.lowering != "xla":  # chosen already, by an auto_layout inside
            return [written]
        return list(dict.fromkeys((written, *(Candidate(xla_for(conv), dims) for dims in channels_last(conv, policy)))))

    graph = build_graph(jaxpr, ways, context, invariant)
    convolutions, others = _counts(graph)
    if others > OTHERS * convolutions:
        return untouched(
            f"policy 'channels_last' is for programs with at least one convolution for each {OTHERS} other equations: "
            f"here are {convolutions:.0f} among {others:.0f}"
        )
    plan = _plan(graph, policy)
    if plan.trivial:
        return _outcome(plan, False, "every convolution is channels last as written")
    return _outcome(plan, True, "neither timed nor compared, and maybe slower than the original")


def channels_last(conv: ConvSignature, policy: LayoutPolicy) -> tuple[ConvDimensionNumbers, ...]:
    """A convolution's layouts where the arrays around it are channels last: also what autodiff writes for a kernel
    gradient, but for one outside the entry computation, where XLA:CPU does well with the canonical ones alone."""
    if conv.is_kernel_gradient and conv.context == "entry":
        return policy.last(conv.rank), ConvDimensionNumbers.kernel_gradient(conv.rank)
    return (policy.last(conv.rank),)


def _counts(graph: LayoutGraph) -> tuple[float, float]:
    """How many convolutions run, and how many other equations on arrays of two axes or more."""

    def counts(node: Node) -> bool:
        return any(len(graph.values[value].shape) > 1 for value in (*node.operands, *node.results))

    others = (node.times for node in graph.nodes if node.kind in ("equation", "barrier") and counts(node))
    return sum(node.times for node in graph.sites), sum(others)


def _plan(graph: LayoutGraph, policy: LayoutPolicy) -> Plan:
    # More than all conversions that could be made for the sake of one convolution.
    far = 10 * (len(graph.nodes) + sum(value.times * policy.conversion_ns(value.nbytes) for value in graph.values))

    def node_ns(node: Node, mode: Mode) -> float:
        if node.conv is None or mode.candidate is None or len(node.modes) == 1:
            return 0.0
        last = mode.candidate.dims in channels_last(node.conv, policy)
        return 0.0 if last else far / (node.times or 1.0)  # what never runs has no times

    def conversion_ns(shape: Sequence[int], dtype: Any, held: Order, wanted: Order) -> float:
        return policy.conversion_ns(math.prod(shape) * getattr(dtype, "itemsize", 8))

    plan = solve(graph, node_ns, conversion_ns)
    return replace(plan, predicted_ns=0.0, written_ns=0.0, bound_ns=0.0)  # none of that was time


def _outcome(plan: Plan, kept: bool, why: str) -> Outcome:
    verdict = Verdict(kept=kept, reason=f"forced by policy 'channels_last': {why}", cause="untried")
    return Outcome(plan=plan, verdict=verdict, source="forced")
