"""`explain`: what was chosen for a program and why, as a value that prints."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from jax.extend import source_info_util

from jaxlayout.convs.candidates import candidates
from jaxlayout.convs.primitive import CONVOLUTIONS
from jaxlayout.graph.build import build_graph
from jaxlayout.graph.fit import located
from jaxlayout.outcome import Outcome
from jaxlayout.program import count_transposes


@dataclass(frozen=True, slots=True)
class Site:
    """One convolution and what became of it."""

    line: str
    """The user's source line."""
    conv: str
    written: str
    chosen: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Prints as a report."""

    outcome: Outcome
    sites: tuple[Site, ...]
    barriers: tuple[str, ...]
    """Equations that stop an order, with how often each occurs."""
    transposes: int
    """In the program as written."""

    def __str__(self) -> str:
        outcome, plan, verdict = self.outcome, self.outcome.plan, self.outcome.verdict
        lines = [
            f"{'kept' if outcome.kept else 'left as it is'}: {verdict.reason} (plan: {outcome.source}, "
            f"{outcome.seconds:.1f} s of tuning)"
        ]
        if not plan.trivial:
            proof = "optimal" if plan.exact else f"within {plan.gap:.1%} of optimal"
            predicted = (
                f"predicted {plan.written_ns / 1e6:.2f} -> {plan.predicted_ns / 1e6:.2f} ms for convolutions and "
                f"conversions, {proof} under the measured costs; "
            )
            counted = f"{self.transposes} transposes as written, {len(plan.conversions)} in the plan"
            lines.append(counted if outcome.source == "forced" else predicted + counted)
        for site in self.sites:
            lines.append(f"  {site.line}: {site.conv}\n    {site.written}  =>  {site.chosen}")
        for c in plan.conversions:
            lines.append(f"  conversion of {c.dtype}{list(c.shape)} {list(c.held)} -> {list(c.wanted)} for {c.before}")
        if self.barriers:
            lines.append("  barriers (no rule, operands in the order written): " + ", ".join(self.barriers))
        return "\n".join(lines)


def explain(jaxpr: Any, outcome: Outcome) -> Explanation:
    """The explanation of an outcome for a closed jaxpr."""
    graph = build_graph(jaxpr, candidates)
    lines = {
        path: source_info_util.summarize(eqn.source_info)
        for path, eqn in located(jaxpr)
        if eqn.primitive in CONVOLUTIONS
    }
    sites = []
    for node in graph.sites:
        mode = outcome.plan.choices.get(node.path, node.modes[0])
        sites.append(
            Site(
                lines.get(node.path, "?"),
                str(node.conv and node.conv.key),
                str(node.modes[0].candidate),
                str(mode.candidate),
            )
        )
    barriers = Counter(node.name for node in graph.barriers)
    return Explanation(
        outcome=outcome,
        sites=tuple(sites),
        barriers=tuple(f"{name} x{count}" for name, count in barriers.most_common()),
        transposes=count_transposes(jaxpr),
    )
