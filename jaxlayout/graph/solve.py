"""From a graph and a cost function to the plan of least cost: one variable for each equation's mode, and for
a value with several consumers one for the set of orders it exists in, so that a conversion used twice is paid
once. The minimum over such a sparse sum of small tables is found exactly (see minsum)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import chain, combinations
from typing import Any

import numpy as np

from jaxlayout.graph.build import LayoutGraph, Mode, Node
from jaxlayout.graph.minsum import Factor, minimise
from jaxlayout.graph.plan import Conversion, Plan
from jaxlayout.layout import Order, identity, moves_data

NodeCost = Callable[[Node, Mode], float]
"""Nanoseconds of a convolution, or of other work that depends on the order, in one of its modes; inf where it may
not be chosen (the first always may)."""
ConversionCost = Callable[[Sequence[int], Any, Order, Order], float]
"""Nanoseconds of converting a value of some shape and dtype from one order to another; only asked where data
moves."""

RELUCTANCE = 1.0
"""Nanoseconds charged for a mode that is not what the user wrote: what gains nothing stays as it is."""


def solve(graph: LayoutGraph, node_ns: NodeCost, conversion_ns: ConversionCost) -> Plan:
    """The plan of least cost under the additive model, with its lower bound."""
    problem = _Problem(graph, node_ns, conversion_ns)
    solution = minimise([len(node.modes) for node in graph.nodes] + problem.sets, problem.factors)
    modes = [node.modes[i] for node, i in zip(graph.nodes, solution.assignment, strict=False)]
    changed = sum(mode != node.modes[0] for node, mode in zip(graph.nodes, modes, strict=True))
    return replace(
        plan_of(graph, modes),
        predicted_ns=solution.cost - RELUCTANCE * changed,
        written_ns=math.fsum(problem.mode_ns(node, node.modes[0]) for node in graph.nodes),  # as `minimise` adds
        bound_ns=max(0.0, solution.bound - RELUCTANCE * changed),
        exact=solution.exact,
    )


def plan_of(graph: LayoutGraph, modes: Sequence[Mode]) -> Plan:
    """The plan under which each node works in the mode given for it, whatever that costs."""
    return Plan(choices=_choices(graph, modes), conversions=conversions(graph, modes))


class _Problem:
    """The tables: variables are the nodes' modes, then for each shared value the set of orders it exists in."""

    def __init__(self, graph: LayoutGraph, node_ns: NodeCost, conversion_ns: ConversionCost):
        self.graph, self.node_ns, self.conversion_ns = graph, node_ns, cache(conversion_ns)
        self.sets: list[int] = []
        self.factors: list[Factor] = []
        for i, node in enumerate(graph.nodes):
            costs = [self.mode_ns(node, mode) + RELUCTANCE * (mode != node.modes[0]) for mode in node.modes]
            self.factors.append(Factor((i,), np.array(costs)))
        producers, consumers = wiring(graph)
        for value, (producer, slot) in producers.items():
            home = [mode.results[slot] for mode in graph.nodes[producer].modes]
            uses = consumers[value]
            wanted = {c: [{m.operands[s] for s in slots} for m in graph.nodes[c].modes] for c, slots in uses.items()}
            if len(set(home).union(*chain(*wanted.values()))) == 1:
                continue
            if len(uses) == 1:
                ((consumer, sets),) = wanted.items()
                table = [[sum(self.ns(value, a, b) for b in set_) for set_ in sets] for a in home]
                self.factors.append(Factor((producer, consumer), np.array(table)))
            else:
                self.shared(value, producer, home, wanted)

    def mode_ns(self, node: Node, mode: Mode) -> float:
        """What a node costs in itself: the time of what depends on the order, the move of a transpose that stays."""
        if node.conv is not None or node.work is not None:
            return node.times * self.node_ns(node, mode)
        if node.moved is not None and mode == node.modes[0]:
            return self.ns(node.results[0], node.moved, mode.results[0])
        return 0.0

    def ns(self, value: int, held: Order, wanted: Order) -> float:
        described = self.graph.values[value]
        if value in self.graph.invariant or not moves_data(described.shape, held, wanted):
            return 0.0
        return described.times * self.conversion_ns(described.shape, described.dtype, held, wanted)

    def shared(self, value: int, producer: int, home: Sequence[Order], wanted: dict[int, list[set[Order]]]) -> None:
        """A state is the order a value is produced in and the set of others that it is converted to."""
        asked = sorted(set().union(*chain(*wanted.values())))
        states = [
            (a, {a, *extra})
            for a in dict.fromkeys(home)
            for others in ([b for b in asked if b != a],)
            for n in range(len(others) + 1)
            for extra in combinations(others, n)
        ]
        variable = len(self.graph.nodes) + len(self.sets)
        self.sets.append(len(states))
        paid = np.array([sum(self.ns(value, a, b) for b in made if b != a) for a, made in states])
        self.factors.append(Factor((variable,), paid))
        agrees = np.array([[0.0 if a == h else np.inf for a, _ in states] for h in home])
        self.factors.append(Factor((producer, variable), agrees))
        for consumer, sets in wanted.items():
            allowed = np.array([[0.0 if set_ <= made else np.inf for _, made in states] for set_ in sets])
            self.factors.append(Factor((consumer, variable), allowed))


def wiring(graph: LayoutGraph) -> tuple[dict[int, tuple[int, int]], dict[int, dict[int, list[int]]]]:
    """For each value of two axes or more: the node and result that produces it; the nodes that consume it,
    each with the operands that are it."""
    producers: dict[int, tuple[int, int]] = {}
    consumers: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for i, node in enumerate(graph.nodes):
        for slot, value in enumerate(node.results):
            if value >= 0 and len(graph.values[value].shape) > 1:
                producers[value] = (i, slot)
        for slot, value in enumerate(node.operands):
            if value >= 0 and len(graph.values[value].shape) > 1 and value not in node.results:
                consumers[value][i].append(slot)
    return {v: p for v, p in producers.items() if v in consumers}, consumers


def conversions(graph: LayoutGraph, modes: Sequence[Mode]) -> tuple[Conversion, ...]:
    """The transposes that a program has under these modes: one for each order that a value is wanted in and
    was not produced in, however many want it. Those that are done once are not among them."""
    producers, consumers = wiring(graph)
    found = [
        Conversion(described.shape, str(described.dtype), node.moved, mode.results[0], node.path, node.times)
        for node, mode in zip(graph.nodes, modes, strict=True)
        if node.moved is not None and mode == node.modes[0] and node.results[0] not in graph.invariant
        for described in (graph.values[node.results[0]],)
        if moves_data(described.shape, node.moved, mode.results[0])
    ]
    for value, (producer, slot) in producers.items():
        if value in graph.invariant:
            continue
        described, held = graph.values[value], modes[producer].results[slot]
        made = {held}
        for consumer, slots in consumers[value].items():
            for wanted in (modes[consumer].operands[s] for s in slots):
                if wanted not in made:
                    made.add(wanted)
                    if moves_data(described.shape, held, wanted):
                        before, dtype = graph.nodes[consumer].path, str(described.dtype)
                        found.append(Conversion(described.shape, dtype, held, wanted, before, described.times))
    return tuple(found)


def _choices(graph: LayoutGraph, modes: Sequence[Mode]) -> dict:
    """The modes that are not what the user wrote, and all convolutions where there is any such; that of an equation
    with bodies is put together from its ports."""
    if all(mode == node.modes[0] for node, mode in zip(graph.nodes, modes, strict=True)):
        return {}
    choices = {}
    through: dict = defaultdict(lambda: ({}, {}))
    for node, mode in zip(graph.nodes, modes, strict=True):
        if node.port is not None:
            entering, leaving = through[node.path]
            entering.update(zip(node.port.operands, mode.operands, strict=False))  # then come the bodies' own
            leaving.update(zip(node.port.results, mode.results[len(node.port.invars) :], strict=True))
        elif mode != node.modes[0] or node.kind == "site":
            choices[node.path] = mode
    for path, (entering, leaving) in through.items():
        mode = Mode(tuple(o for _, o in sorted(entering.items())), tuple(o for _, o in sorted(leaving.items())))
        if any(order != identity(len(order)) for order in (*mode.operands, *mode.results)):
            choices[path] = mode
    return choices
