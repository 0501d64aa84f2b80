"""The search for a plan whose program takes no more memory than it may."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

import numpy as np

from jaxlayout.convs.candidates import Candidate
from jaxlayout.convs.lowering import prepared_growth
from jaxlayout.convs.signature import ConvSignature
from jaxlayout.graph.build import LayoutGraph
from jaxlayout.graph.plan import Plan
from jaxlayout.tuning.model import CostModel
from jaxlayout.tuning.outcome import Outcome

PRICES = *[0.5] * 4, *[4.0] * 2, *[32.0] * 2
"""What a byte of temporary memory costs, in passes over it, from try to try, as long as the plan needs too much. Each
time one lowering more is ruled out too."""


def within_memory(
    graph: LayoutGraph,
    costs: CostModel,
    planned: Callable[[CostModel], Outcome | None],
    smaller: Callable[[Outcome], Outcome | None],
) -> Outcome | None:
    """The outcome of the first plan that is not refused for its memory, or of the last one tried.

    `planned`: plans under some costs, and judges; None where tuning is to stop. `smaller`: an outcome with fewer large
    arrays written out, judged; None where there are no more.
    """
    outcome, refused, least = None, "", np.inf
    suspects, innocent, forbidden = set[tuple[str, str]](), set[tuple[str, str]](), set[tuple[str, str]]()
    for price in PRICES:
        costs = replace(costs, byte_ns=price / costs.policy.bytes_per_ns, forbidden=frozenset(forbidden))
        found = planned(costs)
        if found is None:
            return outcome
        outcome = found
        while outcome.verdict.cause == "memory" and (less := smaller(outcome)) is not None:
            outcome = less
        verdict = outcome.verdict
        if verdict.cause != "memory":
            return replace(outcome, verdict=replace(verdict, reason=verdict.reason + refused))
        refused = refused or f" (of the plan that should be fastest: {verdict.reason})"
        if (verdict.tuned_temp or 0) >= least:  # it was not their fault
            forbidden -= suspects
            innocent |= suspects
        least = min(least, verdict.tuned_temp or np.inf)
        suspects = hungriest(graph, outcome.plan, costs, innocent)
        forbidden |= suspects
    return outcome


def hungriest(
    graph: LayoutGraph, plan: Plan, costs: CostModel, innocent: Collection[tuple[str, str]]
) -> set[tuple[str, str]]:
    """A lowering that a plan has at some convolution (its signature's key, and its name): of those in whose run
    most memory is alive (more than half of the most), what they prepare of the kernel included, the one that is the
    least loss for it. With it all others that need as much there, but for the one that is written."""
    needs: dict[tuple[str, str], int] = {}
    losses: dict[tuple[str, str], float] = {}
    likes: dict[tuple[str, str], set[tuple[str, str]]] = {}

    def temp(conv: ConvSignature, candidate: Candidate) -> int:
        found = costs.measurement(conv, candidate)
        if found is None or found.median_ns is None:
            return 0
        return max(found.temp_bytes or 0, prepared_growth(candidate.lowering, conv, candidate.dims))

    for node in graph.sites:
        mode, conv, written = plan.choices.get(node.path), node.conv, node.modes[0]
        if conv is None or mode is None or mode.candidate is None or mode == written:
            continue
        chosen = mode.candidate
        key = conv.key, chosen.lowering
        if key in innocent:
            continue
        needs[key] = conv.nbytes + temp(conv, chosen)
        alike = {chosen.lowering} | {
            candidate.lowering
            for m in node.modes
            if (candidate := m.candidate) is not None and temp(conv, candidate) >= max(1, temp(conv, chosen))
        }
        if written.candidate is not None:
            alike.discard(written.candidate.lowering)
        likes[key] = {(conv.key, lowering) for lowering in alike}
        others = [m for m in node.modes if m.candidate and m.candidate.lowering not in alike]
        loss = min((costs.node_ns(node, m) for m in others), default=np.inf) - costs.node_ns(node, mode)
        losses[key] = losses.get(key, 0.0) + max(0.0, loss) * node.times
    hungry = [key for key, need in needs.items() if need > max(needs.values()) / 2]
    return likes[max(hungry, key=lambda key: needs[key] / (losses[key] + 1e3))] if hungry else set()
