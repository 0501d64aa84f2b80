"""A graph under a plan: which order each value has, what converts it, and the few steps that matter."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxlayout.convs.signature import written_dims
from jaxlayout.graph.build import LayoutGraph, Mode, Node, Path
from jaxlayout.graph.plan import Plan
from jaxlayout.graph.rules import Rule, rule_for
from jaxlayout.graph.solve import wiring
from jaxlayout.layout import Order, identity, moves_data
from jaxlayout.report.value import Step

Wiring = tuple[dict[int, tuple[int, int]], dict[int, dict[int, list[int]]]]
Letters = tuple[str, ...]
"""What the axes of a value are, to a convolution."""
ANCHORS = ("site", "input", "output", "barrier")
"""What has its order of itself, and does not follow others."""


def modes_under(graph: LayoutGraph, plan: Plan) -> list[Mode]:
    """The mode of each node under a plan."""

    def mode(node: Node) -> Mode:
        chosen = plan.choices.get(node.path, node.modes[0])
        if node.port is None:
            return chosen if node.kind in ("site", "equation") else node.modes[0]
        if node.path not in plan.choices:
            return node.modes[0]
        outer, inner, port = len(node.port.operands), len(node.port.invars), node.port
        for known in node.modes:  # the equation's mode is put together from its ports
            entering = tuple(chosen.operands[i] for i in port.operands) == known.operands[:outer]
            if entering and tuple(chosen.results[i] for i in port.results) == known.results[inner:]:
                return known
        return node.modes[0]

    return [mode(node) for node in graph.nodes]


@dataclass(frozen=True, slots=True)
class Converted:
    """One value in an order other than it is made in: by which node, and for which."""

    value: int
    held: Order
    wanted: Order
    producer: int
    consumers: tuple[int, ...]


def converted(graph: LayoutGraph, modes: Sequence[Mode]) -> list[Converted]:
    """The conversions that a program has under these modes, the user's own transposes aside."""
    producers, consumers = wiring(graph)
    found = []
    for value, (producer, slot) in producers.items():
        held, wants = modes[producer].results[slot], {}
        for consumer, slots in consumers[value].items():
            for order in {modes[consumer].operands[s] for s in slots}:
                wants.setdefault(order, []).append(consumer)
        for order, those in wants.items():
            if value not in graph.invariant and moves_data(graph.values[value].shape, held, order):
                found.append(Converted(value, held, order, producer, tuple(those)))
    return found


def nearest_anchor(graph: LayoutGraph, modes: Sequence[Mode], wired: Wiring, start: int, upwards: bool) -> Node | None:
    """The nearest node that others follow, from a node upwards or downwards along values that are not converted; the
    node itself where it is one. `wired`: the graph's `wiring`."""
    producers, consumers = wired
    seen, left = {start}, deque([start])
    while left:
        i = left.popleft()
        node = graph.nodes[i]
        if node.kind in ANCHORS:
            return node
        for place, value in enumerate(node.operands if upwards else node.results):
            if value not in producers:
                continue
            producer, slot = producers[value]
            held = modes[producer].results[slot]
            if upwards:
                others = [producer] if modes[i].operands[place] == held else []
            else:
                others = [c for c, at in consumers[value].items() if any(modes[c].operands[s] == held for s in at)]
            left.extend(other for other in others if other not in seen)
            seen.update(others)
    return None


def axis_letters(graph: LayoutGraph, equations: Mapping[Path, Any]) -> dict[int, tuple[str, ...]]:
    """The letters of the logical axes of values, as far as they come from or go to a convolution; those of forward
    convolutions first, since gradients have them in other roles."""
    letters: dict[int, tuple[str, ...]] = {}
    touching: dict[int, list[tuple[Node, Any]]] = {}
    for node in graph.nodes:
        for value in dict.fromkeys((*node.operands, *node.results)):
            touching.setdefault(value, []).append((node, equations.get(node.path)))

    def learn(value: int, found: Letters) -> None:
        left = deque([(value, found)])
        while left:
            value, found = left.popleft()
            if value < 0 or value in letters or not all(found) or len(found) != len(graph.values[value].shape):
                continue
            letters[value] = found
            for node, eqn in touching[value]:
                left.extend(_passed_on(node, eqn, letters))

    def of_kernel(node: Node) -> bool:
        return node.conv is not None and node.conv.is_kernel_gradient and is_gradient(equations[node.path])

    # Forward convolutions, then their input gradients, then their kernel gradients.
    for node in sorted(graph.sites, key=lambda node: (of_kernel(node), is_gradient(equations[node.path]))):
        dims = written_dims(equations[node.path].params)
        roles = KERNEL_GRADIENT if of_kernel(node) else FORWARD
        layouts = zip((*node.operands, *node.results), (dims.lhs, dims.rhs, dims.out), roles, strict=True)
        for value, layout, named in layouts:
            learn(value, tuple(layout.axes.translate(named)))
    return letters


FORWARD = ({}, {}, {})
KERNEL_GRADIENT = tuple(map(str.maketrans, ({"N": "C", "C": "N"}, {"O": "C", "I": "N"}, {"N": "I", "C": "O"})))
"""What the axes of lhs, rhs and out are where autodiff writes a kernel's gradient as a convolution."""


def is_gradient(eqn: Any) -> bool:
    """Whether an equation comes from reverse differentiation."""
    return "transpose(" in str(eqn.source_info.name_stack)


def _passed_on(node: Node, eqn: Any, letters: Mapping[int, Sequence[str]]) -> Iterator[tuple[int, Letters]]:
    """What the letters of some of a node's values say of the others."""
    values, axes = _labelled(node, eqn)
    named: dict[int, str] = {}
    for value, groups in zip(values, axes, strict=True):
        if value in letters:
            pairs = zip(groups, letters[value], strict=True)
            named |= {group[0]: letter for group, letter in pairs if len(group) == 1}
    for value, groups in zip(values, axes, strict=True):
        known = [all(label in named for label in group) for group in groups]
        if all(known):
            yield value, tuple("".join(named[label] for label in group) or "1" for group in groups)


def _labelled(node: Node, eqn: Any) -> tuple[tuple[int, ...], Sequence[Any]]:
    """The values of a node whose axes have to do with each other, and the labels of their axes."""
    if node.port is not None and not node.port.stacked:
        rank = max((len(order) for order in (*node.modes[0].operands, *node.modes[0].results)), default=0)
        values = (*node.operands, *node.results)
        return values, [tuple((i,) for i in range(rank))] * len(values)
    rule = rule_for(eqn.primitive) if eqn is not None and node.kind == "equation" else None
    labelling = rule.axes(eqn) if isinstance(rule, Rule) else None
    if labelling is None:
        return (), ()
    return (*node.operands, *node.results), (*labelling.operands, *labelling.results)


def order_name(letters: Sequence[str] | None, order: Order) -> str:
    """An order in letters, or else in numbers."""
    if letters is not None:
        return "".join(letters[a] if len(letters[a]) == 1 else f"({letters[a]})" for a in order)
    return "as written" if order == identity(len(order)) else str(order)


@dataclass(slots=True)
class Flow:
    """Puts together the steps of a program under a plan."""

    graph: LayoutGraph
    modes: Sequence[Mode]
    letters: Mapping[int, Sequence[str]]
    label: Callable[[Node], str]
    cost: Callable[[Node, Mode], float]
    conversion_ns: Callable[[int, Order, Order], float]

    def steps(self) -> tuple[Step, ...]:
        """All of them, each after those that it reads."""
        return _Contraction(self).run()


class _Contraction:
    """What is elementwise, and what concerns weights alone, disappears between the steps that stay."""

    def __init__(self, flow: Flow):
        self.flow, self.graph, self.modes = flow, flow.graph, flow.modes
        self.made = {v: (i, s) for i, node in enumerate(self.graph.nodes) for s, v in enumerate(node.results) if v >= 0}
        self.found: list[Step] = []
        self.behind: dict[int, frozenset[int]] = {}
        """The steps that a value comes from; none for weights."""
        self.arrived: dict[tuple[int, Order], frozenset[int]] = {}
        self.sites = {node.path: i for i, node in enumerate(self.graph.sites)}

    def run(self) -> tuple[Step, ...]:
        data = set(self.data())
        ranked = sorted(
            (({"input": 0, "output": 2}.get(node.kind, 1), node.path, i) for i, node in enumerate(self.graph.nodes)),
        )
        few = sum(node.kind == "output" for node in self.graph.nodes) <= 3
        for _, _, i in ranked:
            node = self.graph.nodes[i]
            if node.kind == "input":
                keep = [v for v in node.results if v in data]
                self.settle(node, frozenset([self.add("argument", node, ())] if keep else ()))
            elif node.port is None:
                self.enter(node, self.modes[i], few)
        return self.without_dead_ends()

    def data(self) -> Iterator[int]:
        """The arguments that are no weights: more than a vector, and read as a convolution's lhs."""
        _, consumers = wiring(self.graph)
        for node in self.graph.nodes:
            shape = [size for v in node.results for size in self.graph.values[v].shape]
            if node.kind != "input" or sum(size != 1 for size in shape) < 2:  # a size may be symbolic
                continue
            left, seen = deque(v for v in node.results), set(node.results)
            while left:
                value = left.popleft()
                if value in self.graph.invariant:
                    continue
                for consumer, slots in consumers.get(value, {}).items():
                    other = self.graph.nodes[consumer]
                    if other.kind == "site" and 0 in slots:
                        yield from node.results
                        left.clear()
                        break
                    if other.kind in ("equation", "port"):
                        left.extend(v for v in other.results if v not in seen)
                        seen.update(other.results)

    def enter(self, node: Node, mode: Mode, results: bool) -> None:
        read = [self.arrive(v, order) for v, order in zip(node.operands, mode.operands, strict=True)]
        reads = self.latest(frozenset().union(*read))
        if node.kind == "site":
            self.settle(node, frozenset([self.add("convolution", node, reads, mode)]))
        elif node.kind == "output":
            if results and reads:
                self.add("result", node, reads)
        elif not reads:
            self.settle(node, reads)
        elif node.kind == "barrier" and any(len(self.graph.values[v].shape) > 1 for v in node.results):
            self.settle(node, frozenset([self.add("barrier", node, reads, mode)]))
        elif node.moved is not None and mode == node.modes[0] and self.flow.cost(node, mode) > 0:
            self.settle(node, frozenset([self.add("transpose", node, reads, mode)]))
        elif node.work is not None:
            self.settle(node, frozenset([self.add("equation", node, reads, mode)]))
        elif len(reads) > 1:
            self.settle(node, frozenset([self.add("join", node, reads, mode)]))
        else:
            self.settle(node, reads)

    def latest(self, reads: frozenset[int]) -> frozenset[int]:
        """Without what a join among them has read already."""
        covered: set[int] = set()
        for step in sorted(reads, reverse=True):
            if step in covered or self.found[step].kind == "join":
                covered.update(self.found[step].inputs)
        return reads - covered

    def settle(self, node: Node, steps: frozenset[int]) -> None:
        self.behind.update((value, steps) for value in node.results if value >= 0)

    def comes_from(self, value: int) -> frozenset[int]:
        if value < 0 or value in self.graph.invariant:
            return frozenset()
        if value not in self.behind:  # of a port: into a body from outside, and out of it from inside
            i, slot = self.made[value]
            node, mode = self.graph.nodes[i], self.modes[i]
            assert node.port is not None
            outer, entering = len(node.port.operands), slot < len(node.port.invars)
            pairs = list(zip(node.operands, mode.operands, strict=True))
            self.behind[value] = frozenset()  # a loop that hands on what it got
            chosen = pairs[:outer] if entering or len(pairs) == outer else pairs[outer:]
            self.behind[value] = self.latest(frozenset().union(*(self.arrive(v, order) for v, order in chosen)))
        return self.behind[value]

    def arrive(self, value: int, wanted: Order) -> frozenset[int]:
        """The steps behind a value in an order."""
        steps = self.comes_from(value)
        if not steps or value not in self.made:
            return steps
        producer, slot = self.made[value]
        held, described = self.modes[producer].results[slot], self.graph.values[value]
        if not moves_data(described.shape, held, wanted):
            return steps
        if (value, wanted) not in self.arrived:
            letters, ns = self.flow.letters.get(value), self.flow.conversion_ns(value, held, wanted)
            names = order_name(letters, held), order_name(letters, wanted)
            label, inputs = f"{names[0]} → {names[1]}", tuple(sorted(steps))
            step = Step(kind="conversion", label=label, inputs=inputs, order=names[1], ns=ns, times=described.times)
            self.found.append(step)
            self.arrived[value, wanted] = frozenset([len(self.found) - 1])
        return self.arrived[value, wanted]

    def add(self, kind: str, node: Node, reads: Any, mode: Mode | None = None) -> int:
        value = max((*node.results, *node.operands), key=lambda v: (v in node.results, len(self.graph.values[v].shape)))
        orders = dict(
            zip((*node.operands, *node.results), ((*mode.operands, *mode.results) if mode else ()), strict=False)
        )
        order = orders.get(value, identity(len(self.graph.values[value].shape)))
        name = order_name(self.flow.letters.get(value), order)
        cost, site = (
            self.flow.cost(node, mode or node.modes[0]),
            self.sites.get(node.path) if kind == "convolution" else None,
        )
        label, inputs = self.flow.label(node), tuple(sorted(reads))
        self.found.append(Step(kind=kind, label=label, inputs=inputs, order=name, site=site, ns=cost, times=node.times))
        return len(self.found) - 1

    def without_dead_ends(self) -> tuple[Step, ...]:
        """Without joins and conversions that no step reads, and renumbered."""
        read = Counter(i for step in self.found for i in step.inputs)
        gone: set[int] = set()
        for i in reversed(range(len(self.found))):
            if self.found[i].kind == "join" and not read[i]:
                gone.add(i)
                read.subtract(self.found[i].inputs)
        # A conversion that only leaves the program stands behind what it converts.
        sinks = {i for i, step in enumerate(self.found) if step.kind == "conversion" and not read[i]}
        order = sorted(
            (i for i in range(len(self.found)) if i not in gone),
            key=lambda i: (max(self.found[i].inputs), i) if i in sinks else (i, -1),
        )
        places = {old: new for new, old in enumerate(order)}
        kept = (self.found[i] for i in order)
        return tuple(_renumbered(step, places) for step in kept)


def _renumbered(step: Step, places: Mapping[int, int]) -> Step:
    return replace(step, inputs=tuple(places[i] for i in step.inputs))
