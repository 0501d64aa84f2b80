"""Plans and costs drawn at random: any combination of modes is legal, as conversions stand between them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from made_up import measurement

from jaxlayout.convs.candidates import Candidate
from jaxlayout.convs.signature import ConvSignature
from jaxlayout.graph.build import LayoutGraph
from jaxlayout.graph.plan import Plan
from jaxlayout.graph.solve import plan_of
from jaxlayout.layout import ConvDimensionNumbers, ConvLayout, KernelLayout


def random_layouts(seed: int, many: int = 2) -> Callable[[ConvSignature, Candidate], list[Candidate]]:
    """An enumerator that offers, beside what is written, XLA's convolution in random orders."""

    def enumerate_candidates(conv: ConvSignature, written: Candidate) -> list[Candidate]:
        rng = random.Random(f"{seed} {conv.key}")

        def shuffled(axes: str) -> str:
            return "".join(rng.sample(axes, len(axes)))

        images, kernels = (layout.from_spec(range(conv.rank + 2)).axes for layout in (ConvLayout, KernelLayout))

        def dims() -> ConvDimensionNumbers:
            return ConvDimensionNumbers(
                ConvLayout(shuffled(images)), KernelLayout(shuffled(kernels)), ConvLayout(shuffled(images))
            )

        return list(dict.fromkeys([written, *(Candidate("xla", dims()) for _ in range(many))]))

    return enumerate_candidates


def random_plan(graph: LayoutGraph, seed: int) -> Plan:
    """A random mode for each node: conversions make any combination legal."""
    rng = random.Random(seed)
    return plan_of(graph, [rng.choice(node.modes) for node in graph.nodes])


def at_random(seed: int, dear: tuple[str, ...] = ()) -> Callable[..., Any]:
    """In place of measuring: every alternative of a job costs what the seed says; the one written, and those whose
    names begin so, cost dearly."""

    def measure(jobs: Sequence[Any], **_: Any) -> Any:
        for job in jobs:
            costs = {name: random.Random(f"{seed} {job.key} {name}").uniform(1, 1e4) for name in job.alternatives}
            first, *others = costs
            costs |= {name: 1e8 for name in others if name.startswith(dear)} | ({first: 1e9} if others else {})
            yield job, {name: measurement(ns) for name, ns in costs.items()}

    return measure
