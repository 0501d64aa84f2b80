"""`CostModel`: what a convolution and a conversion cost here, from the table where it was measured and from the
policy where not; and what is missing, as jobs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from jaxlayout.convs.candidates import Candidate
from jaxlayout.convs.signature import Context, ConvSignature
from jaxlayout.costs.measure import Job, candidate_id, coalesced, conv_job, transpose_job, transpose_key
from jaxlayout.costs.measurement import Measurement
from jaxlayout.costs.table import CostTable
from jaxlayout.graph.build import LayoutGraph, Mode, Node, Value
from jaxlayout.graph.solve import wiring
from jaxlayout.layout import ConvLayout, KernelLayout, LayoutPolicy, Order, conversion, moves_data
from jaxlayout.layout.order import permuted


@dataclass(slots=True)
class CostModel:
    """Costs in nanoseconds, in one environment and context."""

    table: CostTable
    environment: str
    policy: LayoutPolicy
    context: Context = "entry"
    forbidden: set[tuple[str, Candidate]] = field(default_factory=set)
    """Candidates (signature key, candidate) ruled out for this program, because of their memory say."""
    _known: dict[str, dict[str, Measurement]] = field(default_factory=dict)

    def known(self, key: str) -> dict[str, Measurement]:
        """The measurements of a signature or transpose, by candidate id."""
        if key not in self._known:
            self._known[key] = self.table.measurements(self.environment, key)
        return self._known[key]

    def record(self, key: str, found: dict[str, Measurement]) -> None:
        """Keep what was measured."""
        self.table.record_many(self.environment, key, found)
        self._known[key] = self.known(key) | found

    def measurement(self, conv: ConvSignature, candidate: Candidate) -> Measurement | None:
        """What was measured of a candidate, if anything."""
        return self.known(conv.key).get(candidate_id(candidate))

    def site_ns(self, conv: ConvSignature, candidate: Candidate) -> float:
        """The cost of a candidate. inf: measured to fail, ruled out, or not measured where others were."""
        if (conv.key, candidate) in self.forbidden:
            return np.inf
        if (found := self.measurement(conv, candidate)) is not None:
            usable = found.status in ("ok", "slow") and found.median_ns is not None
            return float(found.median_ns or 0.0) if usable else np.inf
        return np.inf if self.known(conv.key) else self.prior_ns(conv, candidate)

    def node_ns(self, node: Node, mode: Mode) -> float:
        """`site_ns` of a graph's convolution. The form the user wrote is always allowed, since it is what runs
        without us; it costs dearly where it was measured to fail."""
        if node.conv is None or mode.candidate is None:
            return 0.0
        cost = self.site_ns(node.conv, mode.candidate)
        if np.isfinite(cost) or mode is not node.modes[0]:
            return cost
        return 1000 * self.prior_ns(node.conv, mode.candidate)

    def prior_ns(self, conv: ConvSignature, candidate: Candidate) -> float:
        """What the policy believes."""
        kind = "depthwise" if conv.is_depthwise else "grouped" if conv.feature_groups > 1 else "dense"
        last = ConvLayout.channels_last(conv.rank)
        sizes = conv.lhs_shape(last), conv.rhs_shape(KernelLayout.io_last(conv.rank)), conv.out_shape(last)
        nbytes = sum(int(np.prod(size)) for size in sizes) * conv.lhs_dtype.itemsize
        return self.policy.conv_ns(kind, candidate.lowering, candidate.dims, conv.macs, nbytes)

    def conversion_ns(self, value: Value, held: Order, wanted: Order) -> float:
        """The cost of one transpose."""
        shape, permutation = coalesced(permuted(value.shape, held), conversion(held, wanted))
        found = self.known(transpose_key(shape, value.dtype, permutation, self.context)).get("transpose")
        if found is not None and found.median_ns is not None:
            return found.median_ns
        return self.policy.conversion_ns(value.nbytes)

    def missing(self, graph: LayoutGraph) -> Iterator[Job]:
        """The jobs that would tell all that a graph's solver may ask, each once, convolutions first."""
        asked: set[str] = set()
        ways: dict[ConvSignature, dict[Candidate, None]] = {}
        for node in graph.sites:
            if node.conv is not None:
                ways.setdefault(node.conv, {}).update(
                    dict.fromkeys(m.candidate for m in node.modes if m.candidate)
                )
        for conv, found in ways.items():
            first, *rest = found
            new = [c for c in found if self.measurement(conv, c) is None]
            if new:  # the written one is timed again beside them: only times of one run compare
                yield conv_job(conv, list(dict.fromkeys((first, *new))))
        for value, held, wanted in _conversions_possible(graph):
            shape, permutation = coalesced(permuted(value.shape, held), conversion(held, wanted))
            key = transpose_key(shape, value.dtype, permutation, self.context)
            if key not in asked and not self.known(key) and _measurable(value):
                asked.add(key)
                yield transpose_job(shape, value.dtype, permutation, self.context)


def _measurable(value: Value) -> bool:
    """Typed keys have no ordinary arrays; nothing is to be said of empty ones."""
    return isinstance(value.dtype, np.dtype) and value.nbytes > 0


def _conversions_possible(graph: LayoutGraph) -> Sequence[tuple[Value, Order, Order]]:
    producers, consumers = wiring(graph)
    found: dict[tuple[Value, Order, Order], None] = {}
    for value, (producer, slot) in producers.items():
        described = graph.values[value]
        homes = {mode.results[slot] for mode in graph.nodes[producer].modes}
        wanted = {
            m.operands[s]
            for c, slots in consumers[value].items()
            for m in graph.nodes[c].modes
            for s in slots
        }
        for a in sorted(homes):
            for b in sorted(wanted):
                if moves_data(described.shape, a, b):
                    found[described, a, b] = None
    return list(found)
