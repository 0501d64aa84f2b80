"""A program under a plan that is made to order: what becomes of it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxlayout.convs.candidates import Candidate
from jaxlayout.convs.signature import ConvSignature
from jaxlayout.graph.build import Mode, Node, build_graph
from jaxlayout.graph.plan import Plan
from jaxlayout.graph.program import equations
from jaxlayout.graph.solve import solve
from jaxlayout.layout import ConvDimensionNumbers, Order
from jaxlayout.rewrite.retrace import retrace

MIXED = "NHWC,OIHW->NHWC"
"""Images with their features last, kernels in the order of PyTorch."""


def text(jaxpr: Any) -> str:
    """A jaxpr as text, without what differs from one trace to the next."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(jaxpr))


def trace(fun: Callable[..., Any], *args: Any) -> Any:
    return jax.make_jaxpr(fun)(*args)


def retraced(jaxpr: Any, plan: Plan) -> Any:
    return jax.make_jaxpr(retrace(jaxpr, plan))(*jaxpr.in_avals)


def single(jaxpr: Any, plan: Plan) -> Callable[..., Any]:
    """The retraced function of a program with one result."""
    return lambda *args: retrace(jaxpr, plan)(*args)[0]


def transposes(jaxpr: Any) -> list[tuple[int, ...]]:
    """The shapes of what transposes move, in the order in which they stand."""
    return [eqn.invars[0].aval.shape for eqn in equations(jaxpr) if eqn.primitive.name == "transpose"]


def names(jaxpr: Any) -> list[str]:
    return [eqn.primitive.name for eqn in equations(jaxpr)]


def whole_numbers(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    """Small ones, with which sums are exact in any order."""
    rng = np.random.default_rng(0)
    return [np.asarray(rng.integers(-2, 3, shape), np.float32) for shape in shapes]


def offering(*dims: str) -> Callable[[ConvSignature, Candidate], list[Candidate]]:
    """An enumerator: what is written, and these where the rank is theirs."""
    ways = [ConvDimensionNumbers.parse(each) for each in dims]

    def enumerate_candidates(conv: ConvSignature, written: Candidate) -> list[Candidate]:
        fitting = [Candidate("xla", way) for way in ways if len(way.lhs.axes) == conv.rank + 2]
        return list(dict.fromkeys([written, *fitting]))

    return enumerate_candidates


def size_ns(shape: Sequence[int], dtype: Any, held: Order, wanted: Order) -> float:
    return 10.0 * math.prod(shape)


def plan_in(jaxpr: Any, *dims: str) -> Plan:
    """The plan in which every convolution has one of these dimension numbers, with fewest elements moved."""
    wanted = {ConvDimensionNumbers.parse(each) for each in dims}

    def site_ns(node: Node, mode: Mode) -> float:
        return 0.0 if mode.candidate is None or mode.candidate.dims in wanted else 1e9

    plan = solve(build_graph(jaxpr, offering(*dims)), site_ns, size_ns)
    assert plan.exact and plan.predicted_ns < 1e9
    return plan
