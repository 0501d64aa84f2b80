"""What a rule is: which axis of each operand is which axis of each result, and how to bind the equation when
its operands come in another order. The graph builder and the interpreter read the same table, so they cannot
disagree. A primitive without a rule is a barrier: its operands arrive in the order the user wrote.

A rule labels axes as einsum does: axes with the same label are the same axis. An axis has a tuple of labels:
one normally, several where a reshape merges axes (which is free only while they stay adjacent and in order),
none for an axis of size 1 that came from nowhere and may stand anywhere. A *linear order of the labels* then
gives the order of every operand and result, which is all there is to following an order through an equation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.sharding import AxisType, NamedSharding

from jaxlayout.layout import Order, identity
from jaxlayout.runtime._compat import bind_equation, open_jaxpr

Axes = tuple[tuple[int, ...], ...]
"""The labels of each axis of one value."""


@dataclass(frozen=True, slots=True)
class Orders:
    """The order of each operand and of each result of one equation."""

    operands: tuple[Order, ...]
    results: tuple[Order, ...]


@dataclass(frozen=True, slots=True)
class Labelling:
    """The labels of the axes of each operand and each result of one equation."""

    operands: tuple[Axes, ...]
    results: tuple[Axes, ...]
    block: Mapping[int, int] = field(default_factory=dict)
    """Results keep labels of a lower block before those of a higher one (dot_general: batch, lhs, rhs)."""
    ordered: tuple[int, ...] = ()
    """Labels that keep this order among themselves (a window is searched in it, and the first of equals wins)."""


@dataclass(frozen=True, slots=True)
class Rule:
    """How orders pass through the equations of a primitive."""

    axes: Callable[[Any], Labelling | None]
    """Equation to labels; None: this equation is a barrier."""
    rewrite: Callable[[Any, Orders], dict[str, Any]] = lambda eqn, orders: {}
    """The parameters that change when operands and results have these orders."""
    bind: Callable[[Any, Sequence[Any], Orders], list[Any]] | None = None
    """In place of `rewrite`, where more than parameters change: equation, physical operands, orders."""
    moves: bool = False
    """It is there to move its operand's axes: done as written it costs what a conversion costs, absorbed nothing."""

    sensitive: bool = False
    """Whether its time depends on the order, so that it is measured in each."""
    version: int = 1
    """Raised when it comes to do something else: plans and times from before are not found then."""

    def apply(self, eqn: Any, operands: Sequence[Any], orders: Orders) -> list[Any]:
        """Bind the equation on physical operands; gives physical results."""
        if self.bind is not None:
            return self.bind(eqn, operands, orders)
        return bind_equation(eqn, operands, **self.rewrite(eqn, orders))


@dataclass(frozen=True, slots=True)
class Body:
    """A jaxpr that an equation runs."""

    jaxpr: Any
    times: float = 1.0
    """How often, each time the equation runs."""
    own_computation: bool = False
    """Whether it is compiled as a computation of its own: a loop's body, a branch; not a call, which XLA inlines."""


@dataclass(frozen=True, slots=True)
class Port:
    """One array on its way into, through or out of the bodies of an equation: these all have one order."""

    operands: tuple[int, ...] = ()
    """Which of the equation's operands, and which of its results, the array is."""
    results: tuple[int, ...] = ()
    invars: tuple[tuple[int, int], ...] = ()
    """Which of the bodies' own it is (which body, which of its invars or outvars)."""
    outvars: tuple[tuple[int, int], ...] = ()
    stacked: bool = False
    """Whether outside it is one array of many, along an axis more that stands first."""
    fixed: int = 0
    """How many of the first axes stay where they are, in the bodies."""

    def outside(self, order: Order) -> Order:
        """The order of the equation's operand or result when the bodies have `order`."""
        return (0, *(axis + 1 for axis in order)) if self.stacked else order

    def inside(self, order: Order) -> Order | None:
        """The inverse of `outside`; None where bodies cannot have that."""
        if self.stacked:
            if order[0] != 0:
                return None
            order = tuple(axis - 1 for axis in order[1:])
        return order if order[: self.fixed] == identity(self.fixed) else None


Bodies = Sequence[Callable[..., list[Any]]]
"""The re-traced bodies of an equation: physical operands to physical results."""


@dataclass(frozen=True, slots=True)
class RegionRule:
    """A primitive that runs jaxprs."""

    bodies: Callable[[Any], tuple[Body, ...] | None]
    """Equation to its bodies; None: this equation is a barrier."""
    ports: Callable[[Any], tuple[Port, ...]]
    """What passes between the equation and its bodies; every operand, result, invar and outvar is of one port."""
    rebuild: Callable[[Any, Bodies, Sequence[Any], Orders], list[Any]]
    """Make the equation anew: equation, its re-traced bodies, physical operands, orders."""
    version: int = 1
    """Raised with every change of what the rule does; see `Rule`."""
    known: frozenset[str] = frozenset()
    """The parameters that `rebuild` sees to, where it does not bind the equation's own: an equation with others, of a
    later JAX, is a barrier."""

    def inner_orders(self, eqn: Any, orders: Orders) -> tuple[Orders, ...] | None:
        """The orders of each body's invars and outvars when the equation has these; None where that cannot be."""
        known: dict[Any, Order] = {}
        for port in self.ports(eqn):
            outer = [*(orders.operands[i] for i in port.operands), *(orders.results[i] for i in port.results)]
            inner = {port.inside(order) for order in outer} or {identity(port.fixed)}  # a condition stays inside
            if len(inner) != 1 or (order := inner.pop()) is None:
                return None
            known |= {("in", *place): order for place in port.invars}
            known |= {("out", *place): order for place in port.outvars}
        bodies = [open_jaxpr(body.jaxpr) for body in self.bodies(eqn) or ()]
        return tuple(
            Orders(
                tuple(known["in", b, i] for i in range(len(body.invars))),
                tuple(known["out", b, i] for i in range(len(body.outvars))),
            )
            for b, body in enumerate(bodies)
        )


_rules: dict[Primitive | str, Rule | RegionRule] = {}


def register_rule(primitive: Primitive | str, rule: Rule | RegionRule) -> None:
    """Teach every later tuning how orders pass through a primitive, or all of a name. ValueError where it has a rule
    already."""
    if primitive in _rules:
        raise ValueError(f"primitive {primitive} has a rule already")
    _rules[primitive] = rule


@contextmanager
def registered_rule(primitive: Primitive | str, rule: Rule | RegionRule) -> Iterator[None]:
    """Register for the length of a `with` block."""
    register_rule(primitive, rule)
    try:
        yield
    finally:
        del _rules[primitive]


def rule_for(primitive: Primitive) -> Rule | RegionRule | None:
    """The rule of a primitive, if it has one."""
    return _rules.get(primitive, _rules.get(primitive.name))


def bodies_of(eqn: Any) -> tuple[Body, ...] | None:
    """The bodies of an equation that orders enter; None for any other."""
    rule = rule_for(eqn.primitive)
    if not isinstance(rule, RegionRule) or (rule.known and not rule.known.issuperset(eqn.params)):
        return None
    return rule.bodies(eqn)


def closed(body: Callable[..., list[Any]], like: Sequence[Any]) -> Any:
    """The closed jaxpr of a re-traced body, for arguments of the types of some arrays or types. One for each body: JAX
    remembers it."""
    return jax.make_jaxpr(body)(*like)


def rule_names() -> tuple[str, ...]:
    """The primitives with a rule, and its version, for fingerprints."""
    return tuple(sorted(f"{primitive}@{rule.version}" for primitive, rule in _rules.items()))


def is_placed(params: Mapping[str, Any]) -> bool:
    """Whether an equation says where its result is to lie among devices, for the order written. Autodiff names the mesh
    in every transposed one, which says nothing where the mesh has no explicit axes."""
    said = (params.get(name) for name in ("sharding", "out_sharding"))
    free = (s is None or (isinstance(s, NamedSharding) and AxisType.Explicit not in s.mesh.axis_types) for s in said)
    return not all(free)


def same_axes(eqn: Any) -> Labelling:
    """All operands and results have the same axes (scalars have none)."""

    def axes(atom: Any) -> Axes:
        return tuple((i,) for i in range(len(atom.aval.shape)))

    return Labelling(tuple(map(axes, eqn.invars)), tuple(map(axes, eqn.outvars)))


def follow(labelling: Labelling, slot: int, order: Order) -> Orders | None:
    """The orders of all operands and results when one of them (slot: operands first, then results) has `order`.

    A label that it does not have goes behind those that stand directly before it where it occurs. None where the order
    cannot pass: merged axes torn apart, ordered ones swapped, blocks mixed.
    """
    values = (*labelling.operands, *labelling.results)
    every = [[label for axis in axes for label in axis] for axes in (*labelling.results, *labelling.operands)]
    given = [label for a in order for label in values[slot][a]]
    sequence = list(given)
    for labels in every:
        for label in labels:
            if label not in sequence:
                ahead = {before for others in every for before, x in pairwise(others) if x == label}
                sequence.insert(1 + max((i for i, x in enumerate(sequence) if x in ahead), default=-1), label)
    place = {label: i for i, label in enumerate(sequence)}
    if any(place[b] != place[a] + 1 for axes in values for axis in axes for a, b in pairwise(axis)):
        return None
    if any(place[a] > place[b] for a, b in pairwise(labelling.ordered)):
        return None
    block = labelling.block
    operands = [_sorted(axes, lambda label: (0, place[label])) for axes in labelling.operands]
    results = [_sorted(axes, lambda label: (block.get(label, 0), place[label])) for axes in labelling.results]
    found = operands + results
    if given != [label for a in found[slot] for label in values[slot][a]]:
        return None
    found[slot] = order  # as given, its axes without labels too
    return Orders(tuple(found[: len(operands)]), tuple(found[len(operands) :]))


def _sorted(axes: Axes, key: Callable[[int], tuple[int, int]]) -> Order:
    """The order of a value whose labels are sorted; an axis without labels stays behind its predecessor."""
    groups: list[tuple[tuple[int, int], list[int]]] = []
    for i, axis in enumerate(axes):
        if axis or not groups:
            groups.append((key(axis[0]) if axis else (-1, -1), [i]))
        else:
            groups[-1][1].append(i)
    return tuple(i for _, group in sorted(groups) for i in group)


def positions(axes: Iterable[int], order: Order) -> tuple[int, ...]:
    """Where logical axes stand in a physical array, ascending."""
    return tuple(sorted(order.index(a) for a in axes))
