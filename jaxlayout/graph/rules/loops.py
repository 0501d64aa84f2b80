"""Loops and branches: `scan`, `while` and `cond`, bound again with other bodies and all else that they have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.extend.core import primitives as p

from jaxlayout.graph.rules.base import Bodies, Body, Orders, Port, RegionRule, closed, register_rule
from jaxlayout.runtime._compat import bind_equation, open_jaxpr, rank_of, reordered

WHILE_TRIPS = 10.0
"""How often a loop is believed to run that does not say."""


def _scan_parts(eqn: Any) -> tuple[int, int]:
    """How many of a scan's operands are constants, and how many are carried round; the others have an axis more than
    in the body. (The parameters that tell this differ between versions of JAX.)"""
    inner = open_jaxpr(eqn.params["jaxpr"])
    carried = sum(rank_of(a) == rank_of(b) for a, b in zip(eqn.outvars, inner.outvars, strict=True))
    unstacked = sum(rank_of(a) == rank_of(b) for a, b in zip(eqn.invars, inner.invars, strict=True))
    return unstacked - carried, carried


def _scan_ports(eqn: Any) -> tuple[Port, ...]:
    consts, carried = _scan_parts(eqn)
    operands, results = range(len(eqn.invars)), range(len(eqn.outvars))
    return (
        *(Port(operands=(i,), invars=((0, i),)) for i in operands[:consts]),
        *(
            Port(operands=(i,), results=(i - consts,), invars=((0, i),), outvars=((0, i - consts),))
            for i in operands[consts : consts + carried]
        ),
        *(Port(operands=(i,), invars=((0, i),), stacked=True) for i in operands[consts + carried :]),
        *(Port(results=(i,), outvars=((0, i),), stacked=True) for i in results[carried:]),
    )


def _rebuild_scan(eqn: Any, bodies: Bodies, operands: Sequence[Any], orders: Orders) -> list[Any]:
    whole = sum(_scan_parts(eqn))  # of the others the body has one after the other
    one = [var.aval for var in open_jaxpr(eqn.params["jaxpr"]).invars[whole:]]
    moved = [reordered(aval, tuple(a - 1 for a in o[1:])) for aval, o in zip(one, orders.operands[whole:], strict=True)]
    return bind_equation(eqn, operands, jaxpr=closed(bodies[0], [*operands[:whole], *moved]))


register_rule(
    p.scan_p,
    RegionRule(
        lambda eqn: (Body(eqn.params["jaxpr"], float(eqn.params["length"]), own_computation=True),),
        _scan_ports,
        _rebuild_scan,
    ),
)


def _while_bodies(eqn: Any) -> tuple[Body, ...]:
    return tuple(Body(eqn.params[f"{name}_jaxpr"], WHILE_TRIPS, own_computation=True) for name in ("cond", "body"))


def _while_ports(eqn: Any) -> tuple[Port, ...]:
    """A loop of many under vmap has a predicate for each of them: what is carried has the predicate's axes first."""
    first, second = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    many = rank_of(open_jaxpr(eqn.params["cond_jaxpr"]).outvars[0])
    return (
        *(Port(operands=(i,), invars=((0, i),)) for i in range(first)),
        *(Port(operands=(first + i,), invars=((1, i),)) for i in range(second)),
        *(
            Port(
                operands=(first + second + i,),
                results=(i,),
                invars=((0, first + i), (1, second + i)),
                outvars=((1, i),),
                fixed=many,
            )
            for i in range(len(eqn.outvars))
        ),
        Port(outvars=((0, 0),), fixed=many),
    )


def _rebuild_while(eqn: Any, bodies: Bodies, operands: Sequence[Any], orders: Orders) -> list[Any]:
    first, second = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    one, two, carry = operands[:first], operands[first : first + second], operands[first + second :]
    holds, body = (closed(run, [*held, *carry]) for run, held in zip(bodies, (one, two), strict=True))
    return bind_equation(eqn, operands, cond_jaxpr=holds, body_jaxpr=body)


register_rule(p.while_p, RegionRule(_while_bodies, _while_ports, _rebuild_while))


def _cond_bodies(eqn: Any) -> tuple[Body, ...]:
    branches = eqn.params["branches"]
    return tuple(Body(branch, 1 / len(branches), own_computation=True) for branch in branches)


def _cond_ports(eqn: Any) -> tuple[Port, ...]:
    branches = range(len(eqn.params["branches"]))
    return (
        Port(operands=(0,)),
        *(Port(operands=(i,), invars=tuple((b, i - 1) for b in branches)) for i in range(1, len(eqn.invars))),
        *(Port(results=(i,), outvars=tuple((b, i) for b in branches)) for i in range(len(eqn.outvars))),
    )


def _rebuild_cond(eqn: Any, bodies: Bodies, operands: Sequence[Any], orders: Orders) -> list[Any]:
    return bind_equation(eqn, operands, branches=tuple(closed(body, operands[1:]) for body in bodies))


register_rule(p.cond_p, RegionRule(_cond_bodies, _cond_ports, _rebuild_cond))
