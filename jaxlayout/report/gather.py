"""From a program, what became of it, and the cost table, to an `Explanation`."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from jax.extend import source_info_util

from jaxlayout.convs.candidates import Candidate
from jaxlayout.convs.signature import ConvSignature
from jaxlayout.graph.build import Enumerate, LayoutGraph, Mode, Node, Path, build_graph
from jaxlayout.graph.plan import Plan
from jaxlayout.graph.shards import Division
from jaxlayout.graph.solve import wiring
from jaxlayout.graph.validate import located
from jaxlayout.layout import Order, identity, moves_data
from jaxlayout.report.explanation import Explanation, Site
from jaxlayout.report.flow import Flow, axis_letters, converted, is_gradient, modes_under, nearest_anchor, order_name
from jaxlayout.report.value import Barrier, Move, Transpose, Tried, short_line
from jaxlayout.rewrite.invariant import invariant_values
from jaxlayout.tuning.model import CostModel
from jaxlayout.tuning.outcome import Outcome

OWN = os.path.dirname(os.path.dirname(__file__))
INSTALLED = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")
FRAMES = 64
"""How far up the user's line is looked for."""


def explain(
    jaxpr: Any,
    outcome: Outcome,
    model: CostModel,
    *,
    name: str = "function",
    relaxed: bool = False,
    frozen: Sequence[bool] = (),
    divided: Mapping[Any, Division] = MappingProxyType({}),
) -> Explanation:
    """The explanation of what came of a closed jaxpr. `model`: costs of the environment that it was planned
    in. `relaxed`: whether relaxed candidates were allowed. `frozen`: which arguments are, if any. `divided`: how they
    are among devices; all shapes are those of one device's pieces."""

    def offered(conv: ConvSignature, written: Candidate) -> Sequence[Candidate]:
        return model.candidates(conv, written, relaxed=relaxed)

    invariant = invariant_values(jaxpr, frozen) if any(frozen) else ()
    graph = build_graph(jaxpr, offered, model.context, invariant, divided)
    return _Gathered(jaxpr, graph, outcome.plan, model, offered).explanation(name, outcome)


class _Gathered:
    def __init__(self, jaxpr: Any, graph: LayoutGraph, plan: Plan, model: CostModel, offered: Enumerate):
        self.graph, self.plan, self.model, self.offered = graph, plan, model, offered
        self.equations: Mapping[Path, Any] = dict(located(jaxpr))
        self.modes, self.wired = modes_under(graph, plan), wiring(graph)
        self.letters = axis_letters(graph, self.equations)
        inputs = (i for i, node in enumerate(graph.nodes) if node.kind == "input" and node.path == ())
        self.numbers = {i: n for n, i in enumerate(inputs)}
        outputs = (i for i, node in enumerate(graph.nodes) if node.kind == "output")
        self.numbers |= {i: n for n, i in enumerate(outputs)}
        self.places = {id(node): i for i, node in enumerate(graph.nodes)}

    def explanation(self, name: str, outcome: Outcome) -> Explanation:
        flow = Flow(self.graph, self.modes, self.letters, self.label, self.cost, self.conversion_ns)
        return Explanation(
            name=name,
            outcome=outcome,
            sites=tuple(self.site(node) for node in self.graph.sites),
            moves=tuple(self.moves()),
            transposes=tuple(self.transposes()),
            barriers=tuple(self.barriers()),
            steps=flow.steps(),
        )

    # Convolutions

    def site(self, node: Node) -> Site:
        conv, eqn, written = node.conv, self.equations[node.path], node.modes[0].candidate
        assert conv is not None and written is not None
        chosen = self.plan.choices.get(node.path, node.modes[0]).candidate or written
        line, caller = self.lines(node.path)
        return Site(
            path=node.path,
            line=line,
            caller=caller,
            scope=str(eqn.source_info.name_stack),
            kind=kind_of(conv, derived=is_gradient(eqn)),
            lhs=self.graph.values[node.operands[0]].shape,
            rhs=self.graph.values[node.operands[1]].shape,
            out=self.graph.values[node.results[0]].shape,
            dtype=str(conv.lhs_dtype) if conv.out_dtype == conv.lhs_dtype else f"{conv.lhs_dtype} to {conv.out_dtype}",
            signature=conv.key,
            times=node.times,
            tried=self.tried(conv, written, chosen),
        )

    def tried(self, conv: ConvSignature, written: Candidate, chosen: Candidate) -> tuple[Tried, ...]:
        """All that was measured of what a convolution was offered; the form written and the chosen one in any case."""
        found = [
            Tried(candidate=one, measurement=seen, written=one == written, chosen=one == chosen)
            for one in dict.fromkeys((written, chosen, *self.offered(conv, written)))
            for seen in (self.model.measurement(conv, one),)
            if seen is not None or one in (written, chosen)
        ]
        return tuple(sorted(found, key=lambda one: (one.measurement and one.measurement.median_ns) or math.inf))

    # Conversions, transposes, barriers

    def moves(self) -> list[Move]:
        found = []
        for c in converted(self.graph, self.modes):
            described, letters = self.graph.values[c.value], self.letters.get(c.value)
            seen = self.model.conversion_measurement(described.shape, described.dtype, c.held, c.wanted)
            found.append(
                Move(
                    shape=described.shape,
                    dtype=str(described.dtype),
                    held=order_name(letters, c.held),
                    wanted=order_name(letters, c.wanted),
                    held_by=self.because(c.producer, upwards=True),
                    wanted_by=tuple(self.because(i, upwards=False) for i in c.consumers),
                    times=described.times,
                    ns=self.conversion_ns(c.value, c.held, c.wanted),
                    measured=seen is not None,
                )
            )
        return found

    def because(self, i: int, upwards: bool) -> str:
        """A node, and the one that it has its order from."""
        node, anchor = self.graph.nodes[i], nearest_anchor(self.graph, self.modes, self.wired, i, upwards)
        said = self.said(node)
        if anchor is None or anchor is node:
            return said
        return f"{said}, {'after' if upwards else 'before'} {self.said(anchor)}"

    def transposes(self) -> list[Transpose]:
        found = []
        for node, mode in zip(self.graph.nodes, self.modes, strict=True):
            if node.moved is None or node.results[0] in self.graph.invariant:
                continue
            eqn, described = self.equations[node.path], self.graph.values[node.results[0]]
            if not moves_data(described.shape, node.moved, identity(len(node.moved))):
                continue
            found.append(
                Transpose(
                    line=self.near(node.path),
                    shape=self.graph.values[node.operands[0]].shape,
                    permutation=tuple(eqn.params.get("permutation", node.moved)),
                    absorbed=mode != node.modes[0],
                    times=described.times,
                )
            )
        return found

    def barriers(self) -> list[Barrier]:
        counts = Counter(node.name for node in self.graph.barriers)
        lines: dict[str, dict[str, None]] = {}
        for node in self.graph.barriers:
            lines.setdefault(node.name, {})[self.near(node.path)] = None
        return [Barrier(name=name, count=count, lines=tuple(lines[name])) for name, count in counts.most_common()]

    # Costs and words

    def cost(self, node: Node, mode: Mode) -> float:
        """What a step takes each time that it runs, in nanoseconds; 0 where nobody knows."""
        if node.moved is not None and mode == node.modes[0]:
            return self.conversion_ns(node.results[0], node.moved, mode.results[0])
        if node.conv is not None and mode.candidate is not None:
            seen = self.model.measurement(node.conv, mode.candidate)
            return (seen.median_ns if seen is not None else 0.0) or 0.0
        found = self.model.work_ns(node.work, mode) if node.work is not None else 0.0
        return found if math.isfinite(found) else 0.0

    def conversion_ns(self, value: int, held: Order, wanted: Order) -> float:
        described = self.graph.values[value]
        return self.model.conversion_ns(described.shape, described.dtype, held, wanted)

    def said(self, node: Node) -> str:
        """A node in words."""
        if node.kind == "input":
            number = self.numbers.get(self.places[id(node)])
            return "a constant" if number is None else f"argument {number}"
        if node.kind == "output":
            return f"result {self.numbers[self.places[id(node)]]}"
        return f"{self.label(node)} at {self.near(node.path)}"

    def lines(self, path: Path) -> tuple[str, str]:
        """The source lines of an equation; of one without, those of the equation that runs it."""
        found = source_lines(self.equations[path])
        return found or (self.lines(path[:-2]) if len(path) > 2 else ("?", "?"))

    def near(self, path: Path) -> str:
        """The user's line, the file without its folders."""
        return short_line(self.lines(path)[1])

    def label(self, node: Node) -> str:
        """A node in a few words."""
        if node.conv is not None:
            eqn = self.equations[node.path]
            return kind_of(node.conv, derived=is_gradient(eqn))
        return self.said(node) if node.kind in ("input", "output") else node.name


def source_lines(eqn: Any) -> tuple[str, str] | None:
    """The line that wrote an equation, and the innermost one of no installed package: "file:line:column (function)"."""
    frames = source_info_util.summarize(eqn.source_info, FRAMES).splitlines()[::-1]
    theirs = (line for line in frames if not line.startswith(OWN) and not any(part in line for part in INSTALLED))
    return (frames[0], next(theirs, frames[0])) if frames else None


def kind_of(conv: ConvSignature, derived: bool) -> str:
    """What sort of convolution it is, in a few words."""

    def sizes(numbers: Sequence[int]) -> str:
        return "x".join(map(str, numbers)) if len(set(numbers)) > 1 or len(numbers) < 2 else f"{numbers[0]}"

    taps = conv.out_spatial if conv.is_kernel_gradient else conv.kernel
    groups = max(conv.feature_groups, conv.batch_groups)
    depthwise = conv.is_depthwise or (conv.is_kernel_gradient and groups > 1 and groups == conv.out_features)
    sort = "depthwise " if depthwise else "" if groups == 1 else f"{groups} groups, "
    words = sort + "x".join(map(str, taps))
    strides, dilation = (conv.strides, conv.rhs_dilation)[:: -1 if conv.is_kernel_gradient else 1]
    for name, numbers in (("stride", strides), ("lhs dilation", conv.lhs_dilation), ("dilation", dilation)):
        if any(number != 1 for number in numbers):
            words += f" {name} {sizes(numbers)}"
    gradient = "kernel gradient" if conv.is_kernel_gradient else "gradient"
    return f"{gradient}, {words}" if derived or conv.is_kernel_gradient else words
