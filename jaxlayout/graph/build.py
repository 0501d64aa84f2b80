"""`LayoutGraph`: a program as the solver sees it. Nodes are equations with the orders they can work in
(modes), values are what flows between them; a value may be converted between producer and consumer.

The graph is nested as the program is, and written flat: equations inside a jaxpr that another equation runs are
nodes like any other, named by their path, and what passes into it and out of it does so through nodes of its own.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from jax.extend.core import Literal as LiteralAtom

from jaxlayout.convs.candidates import Candidate
from jaxlayout.convs.lowering import batch_sequential, lowering_named, may_crash, xla_for
from jaxlayout.convs.primitive import CONVOLUTIONS, chosen_lowering
from jaxlayout.convs.signature import Context, ConvSignature, written_dims
from jaxlayout.graph import shards
from jaxlayout.graph.program import plain
from jaxlayout.graph.rules import (
    Body,
    Labelling,
    Orders,
    Port,
    RegionRule,
    Rule,
    bodies_of,
    follow,
    is_placed,
    rule_for,
)
from jaxlayout.graph.shards import Division
from jaxlayout.layout import Order, identity
from jaxlayout.runtime._compat import open_jaxpr

Path = tuple[int, ...]
"""Where an equation is: its index in the program, then which of that equation's bodies, the index in there, and so
on."""

MAX_ORDERS = 5
"""How many orders of one value are considered. Two to three occur; a program that permutes its axes back and
forth would multiply them."""


SMALL = 2**16
"""Below so many bytes the order of an equation's operands does not matter."""


@dataclass(frozen=True, slots=True)
class Mode:
    """One way a node can work: the order of each operand and result, and for a convolution the candidate."""

    operands: tuple[Order, ...]
    results: tuple[Order, ...]
    candidate: Candidate | None = None


@dataclass(frozen=True, slots=True)
class Value:
    """What flows along an edge; `shape` is logical, and that of one device's piece where it is divided."""

    shape: tuple[int, ...]
    dtype: Any
    times: float = 1.0
    """How often it is made each time the program runs."""

    @property
    def nbytes(self) -> int:
        """Size in memory, in bytes."""
        return math.prod(self.shape) * getattr(self.dtype, "itemsize", 8)


@dataclass(frozen=True, slots=True)
class Work:
    """An equation, no convolution, whose time depends on the order it works in."""

    key: str
    """What is computed: equal for equal equations."""
    context: Context
    operands: tuple[Value, ...]
    apply: Callable[[Mode, Sequence[Any]], list[Any]] = field(compare=False)
    """Physical operands to physical results in a mode."""


@dataclass(frozen=True, slots=True)
class Node:
    """`operands` and `results` are indices of values; `modes[0]` is what the user wrote."""

    path: Path
    kind: Literal["input", "output", "equation", "port", "barrier", "site"]
    operands: tuple[int, ...]
    results: tuple[int, ...]
    modes: tuple[Mode, ...]
    conv: ConvSignature | None = None
    """What one device computes of it."""
    name: str = ""
    """The primitive's name."""
    moved: Order | None = None
    """A transpose that the user wrote: the order of its result if it is absorbed; `modes[0]` is to do it."""
    work: Work | None = None
    port: Port | None = None
    """Of a port: `operands` are the equation's operands, then the bodies' results that it is; `results` are what the
    bodies get, then the equation's results."""
    times: float = 1.0
    """How often it runs each time the program does."""


@dataclass(frozen=True, slots=True)
class LayoutGraph:
    """Values are produced once; every node but inputs consumes some."""

    values: tuple[Value, ...]
    nodes: tuple[Node, ...]
    invariant: frozenset[int] = frozenset()
    """The values that are computed once, ahead of all calls: to convert them costs nothing."""

    @property
    def sites(self) -> tuple[Node, ...]:
        """The convolutions."""
        return tuple(node for node in self.nodes if node.kind == "site")

    @property
    def barriers(self) -> tuple[Node, ...]:
        """Equations whose primitive has no rule for them, and that touch more than scalars and vectors."""

        def many_axes(node: Node) -> bool:
            return any(len(self.values[value].shape) > 1 for value in (*node.operands, *node.results))

        return tuple(node for node in self.nodes if node.kind == "barrier" and many_axes(node))


Enumerate = Callable[[ConvSignature, Candidate], Sequence[Candidate]]


def build_graph(
    jaxpr: Any,
    enumerate_candidates: Enumerate,
    context: Context = "entry",
    invariant: Collection[Any] = (),
    divided: Mapping[Any, Division] = MappingProxyType({}),
) -> LayoutGraph:
    """The graph of a closed jaxpr. `enumerate_candidates(signature, as written)` gives the ways to compute a
    convolution, the written one first. `invariant`: the variables of the jaxpr that are computed once. `divided`: how
    its arguments and constants are among devices."""
    builder = _Builder(enumerate_candidates, divided)
    outer, place = open_jaxpr(jaxpr), _Place((), context, 1.0)
    env = {var: builder.produced(var.aval, place, "input", divided.get(var)) for var in outer.invars}
    for value, rank in builder.region(jaxpr, env, place):
        builder.add(place, "output", [value], [], _only([rank], []))
    return replace(builder.finish(), invariant=frozenset(env[var][0] for var in invariant if var in env))


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an equation is, how it is compiled there, and how often it runs."""

    path: Path
    context: Context
    times: float

    def at(self, index: int) -> _Place:
        return replace(self, path=(*self.path, index))

    def within(self, index: int, body: Body) -> _Place:
        return _Place((*self.path, index), "nested" if body.own_computation else self.context, self.times * body.times)


@dataclass(slots=True)
class _Draft:
    """A node while its modes are being found: `extend(slot, order)` gives the mode in which one of its values
    (operands first, then results) has an order."""

    node: Node
    modes: dict[Mode, None]
    extend: Callable[[int, Order], Mode | None] | None


def _only(operands: Sequence[int], results: Sequence[int]) -> tuple[Mode, ...]:
    """The single mode of a node that knows no order but the user's; ranks to orders."""
    return (Mode(tuple(map(identity, operands)), tuple(map(identity, results))),)


def _rank(atom: Any) -> int:
    return len(atom.aval.shape)


def _through(port: Port) -> Callable[[int, Order], Mode | None]:
    """How orders pass through a port: the mode in which one of its values has an order."""
    first_inner = len(port.operands)
    first_result = first_inner + len(port.outvars) + len(port.invars)

    def extend(slot: int, order: Order) -> Mode | None:
        inside = port.inside(port.outside(order) if first_inner <= slot < first_result else order)
        if inside is None:
            return None
        outside = port.outside(inside)
        operands = (outside,) * first_inner + (inside,) * len(port.outvars)
        return Mode(operands, (inside,) * len(port.invars) + (outside,) * len(port.results))

    return extend


class _Builder:
    def __init__(self, enumerate_candidates: Enumerate, divided: Mapping[Any, Division]):
        self.enumerate, self.divided = enumerate_candidates, divided
        self.spread = False  # where anything is divided XLA may divide all: it hands on what no rule of ours knows
        self.values: list[Value] = []
        self.divisions: list[Division] = []
        self.drafts: list[_Draft] = []

    def value(self, aval: Any, place: _Place, division: Division | None = None) -> int:
        division = division or shards.of_type(aval) or shards.whole(len(aval.shape))
        self.values.append(Value(shards.local(aval.shape, division), aval.dtype, place.times))
        self.divisions.append(division)
        self.spread |= any(division)
        return len(self.values) - 1

    def add(
        self,
        place: _Place,
        kind: Any,
        operands: Sequence[int],
        results: Sequence[int],
        modes: Sequence[Mode],
        extend: Callable[[int, Order], Mode | None] | None = None,
        **more: Any,
    ) -> None:
        node = Node(place.path, kind, tuple(operands), tuple(results), (), times=place.times, **more)
        self.drafts.append(_Draft(node, dict.fromkeys(modes), extend))

    def produced(self, aval: Any, place: _Place, kind: Any, division: Division | None = None) -> tuple[int, int]:
        """A value that arrives in the user's order: its index and rank."""
        rank = len(getattr(aval, "shape", ()))
        if not hasattr(aval, "shape"):  # tokens
            return -1, 0
        value = self.value(aval, place, division)
        self.add(place, kind, [], [value], _only([], [rank]))
        return value, rank

    def region(self, jaxpr: Any, env: dict[Any, tuple[int, int]], place: _Place) -> list[tuple[int, int]]:
        """Add the nodes of one jaxpr; `env` holds its arguments. Gives its results."""
        inner = open_jaxpr(jaxpr)
        for var in inner.constvars:
            env[var] = self.produced(var.aval, place, "input", self.divided.get(var))

        def read(atom: Any) -> tuple[int, int]:
            return self.produced(atom.aval, place, "input") if isinstance(atom, LiteralAtom) else env[atom]

        for i, eqn in enumerate(inner.eqns):
            operands = [read(atom)[0] for atom in eqn.invars]
            env.update(zip(eqn.outvars, self.equation(eqn, operands, place.at(i)), strict=True))
        return [read(atom) for atom in inner.outvars]

    def equation(self, eqn: Any, operands: list[int], place: _Place) -> list[tuple[int, int]]:
        rule = rule_for(eqn.primitive)
        if any(not hasattr(atom.aval, "shape") for atom in (*eqn.invars, *eqn.outvars)):  # tokens
            return [self.produced(v.aval, place, "barrier") for v in eqn.outvars]
        if isinstance(rule, RegionRule) and (bodies := bodies_of(eqn)) is not None:
            return self.call(eqn, rule, bodies, operands, place)
        if eqn.primitive in CONVOLUTIONS and static_shapes(eqn) and not is_placed(eqn.params):
            return self.site(eqn, operands, place)
        labelling = rule.axes(eqn) if isinstance(rule, Rule) and static_shapes(eqn) else None
        divisions = shards.of_results(eqn, labelling, [self.divisions[i] for i in operands])
        results = [self.value(v.aval, place, d) for v, d in zip(eqn.outvars, divisions, strict=True)]
        ranks = [_rank(v) for v in eqn.invars], [_rank(v) for v in eqn.outvars]
        name = str(eqn.primitive)
        if isinstance(rule, Rule) and labelling is not None:

            def extend(slot: int, order: Order) -> Mode | None:
                orders = follow(labelling, slot, order)
                return orders and Mode(orders.operands, orders.results)

            (written,), free = _only(*ranks), extend(0, identity(ranks[0][0])) if rule.moves else None
            modes = (written,) if free is None else (written, free)
            moved = free and free.results[0]
            work = self.work(eqn, rule, labelling, [self.divisions[i] for i in (*operands, *results)], place.context)
            self.add(place, "equation", operands, results, modes, extend, name=name, moved=moved, work=work)
        else:
            self.add(place, "barrier", operands, results, _only(*ranks), name=name)
        return [(value, _rank(v)) for value, v in zip(results, eqn.outvars, strict=True)]

    def work(
        self, eqn: Any, rule: Rule, labelling: Labelling, divisions: Sequence[Division], context: Context
    ) -> Work | None:
        if not rule.sensitive:
            return None
        avals = [v.aval for v in (*eqn.invars, *eqn.outvars)]
        local = shards.agreed(labelling, divisions, [aval.shape for aval in avals])
        values = [Value(shape, aval.dtype) for shape, aval in zip(local, avals, strict=True)]
        if sum(value.nbytes for value in values) < SMALL:
            return None
        shapes = " ".join(f"{value.dtype}{list(value.shape)}" for value in values)

        def apply(mode: Mode, operands: Sequence[Any]) -> list[Any]:
            return rule.apply(eqn, operands, Orders(mode.operands, mode.results))

        key = f"{eqn.primitive}@{rule.version} {shapes} {plain(eqn.params)} in={context}"
        return Work(key, context, tuple(values[: len(eqn.invars)]), apply)

    def call(
        self, eqn: Any, rule: RegionRule, bodies: Sequence[Body], operands: list[int], place: _Place
    ) -> list[tuple[int, int]]:
        """An equation that runs jaxprs: their nodes, and one for each port."""
        places = [place.within(b, body) for b, body in enumerate(bodies)]
        invars = [open_jaxpr(body.jaxpr).invars for body in bodies]
        entering = {
            end: shards.entering(eqn, port, self.divisions[operands[port.operands[0]]])
            for port in rule.ports(eqn)
            for end in port.invars
        }
        given = [
            [self.value(v.aval, within, entering.get((b, i))) for i, v in enumerate(vars_)]
            for b, (vars_, within) in enumerate(zip(invars, places, strict=True))
        ]
        left = []
        for body, vars_, values, within in zip(bodies, invars, given, places, strict=True):
            env = {var: (value, _rank(var)) for var, value in zip(vars_, values, strict=True)}
            left.append(self.region(body.jaxpr, env, within))
        leaving = {
            i: shards.leaving(eqn, port, self.divisions[left[b][at][0]])
            for port in rule.ports(eqn)
            for b, at in port.outvars[:1]
            for i in port.results
        }
        results = [self.value(v.aval, place, leaving.get(i)) for i, v in enumerate(eqn.outvars)]
        for port in rule.ports(eqn):
            taken = [*(operands[i] for i in port.operands), *(left[b][i][0] for b, i in port.outvars)]
            made = [*(given[b][i] for b, i in port.invars), *(results[i] for i in port.results)]
            slot = min(len(port.operands), len(taken) + len(made) - 1)  # of a body, where the port has one there
            extend = _through(port)
            written = extend(slot, identity(len(self.values[(*taken, *made)[slot]].shape)))
            assert written is not None
            self.add(place, "port", taken, made, (written,), extend, name=str(eqn.primitive), port=port)
        return [(value, _rank(v)) for value, v in zip(results, eqn.outvars, strict=True)]

    def site(self, eqn: Any, operands: list[int], place: _Place) -> list[tuple[int, int]]:
        lhs, rhs = (v.aval for v in eqn.invars)
        full = ConvSignature.of(lhs, rhs, eqn.params, place.context)
        conv, division = shards.of_convolution(full, eqn.params, *(self.divisions[i] for i in operands))
        (out,) = eqn.outvars
        results = [self.value(out.aval, place, shards.of_type(out.aval) or division)]
        written = written_dims(eqn.params)

        numbers, (images, kernels) = eqn.params["dimension_numbers"], (self.divisions[i] for i in operands)
        positions = [*(images[a] for a in numbers.lhs_spec[2:]), *(kernels[a] for a in numbers.rhs_spec[2:])]

        def runs(candidate: Candidate) -> bool:
            lowering = lowering_named(candidate.lowering)
            # Where positions are divided XLA's partitioner is not to be relied on, nor are measurements.
            if any(positions) or (self.spread and not lowering.divisible(full, candidate.dims)):
                return False
            if conv == full:
                return True
            # The program holds the whole convolution, whatever a device has of it.
            native = candidate.lowering == xla_for(full) or lowering.native(full, candidate.dims)
            return native and not batch_sequential(candidate.lowering) and not may_crash(candidate.lowering)

        candidates = self.enumerate(conv, Candidate(chosen_lowering(eqn.params), written))
        modes = [
            Mode(
                (c.dims.lhs.permutation_from(written.lhs), c.dims.rhs.permutation_from(written.rhs)),
                (c.dims.out.permutation_from(written.out),),
                c,
            )
            for i, c in enumerate(candidates)
            if i == 0 or runs(c)
        ]
        self.add(place, "site", operands, results, modes, conv=conv, name=str(eqn.primitive))
        return [(results[0], _rank(out))]

    def finish(self) -> LayoutGraph:
        """Let the orders of the sites flow through the graph until nothing new is found."""
        domains: list[set[Order]] = [{identity(len(value.shape))} for value in self.values]
        touching: list[list[tuple[_Draft, int]]] = [[] for _ in self.values]
        for draft in self.drafts:
            for slot, value in enumerate((*draft.node.operands, *draft.node.results)):
                touching[value].append((draft, slot))
        news: deque[tuple[int, Order]] = deque()

        def offer(node: Node, mode: Mode) -> bool:
            pairs = list(zip((*node.operands, *node.results), (*mode.operands, *mode.results), strict=True))
            fresh = {(value, order) for value, order in pairs if order not in domains[value]}
            if any(len(domains[value]) >= MAX_ORDERS for value, _ in fresh):
                return False
            for value, order in sorted(fresh):
                domains[value].add(order)
                news.append((value, order))
            return True

        for draft in self.drafts:
            if len(draft.modes) > 1:
                first, *rest = draft.modes
                draft.modes = dict.fromkeys((first, *(m for m in rest if offer(draft.node, m))))
        while news:
            value, order = news.popleft()
            for draft, slot in touching[value]:
                if draft.extend is None or any((*m.operands, *m.results)[slot] == order for m in draft.modes):
                    continue  # it has a mode for that
                if (mode := draft.extend(slot, order)) is not None and offer(draft.node, mode):
                    draft.modes[mode] = None
        nodes = (replace(draft.node, modes=tuple(draft.modes)) for draft in self.drafts)
        return LayoutGraph(tuple(self.values), tuple(nodes))


def static_shapes(eqn: Any) -> bool:
    """Whether every size is a number (and not a symbol of `jax.export`)."""
    return all(isinstance(size, int) for v in (*eqn.invars, *eqn.outvars) for size in v.aval.shape)
