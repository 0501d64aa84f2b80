"""The solver on graphs of real programs, against an integer program that is written from the graph's raw nodes."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawing import examples
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from plans import random_layouts
from programs import programs
from scipy import sparse
from scipy.optimize import Bounds, milp

from bench.models import MODELS
from jaxlayout.convs.candidates import candidates
from jaxlayout.graph import minsum
from jaxlayout.graph import solve as solving
from jaxlayout.graph.build import LayoutGraph, Mode, Node, build_graph
from jaxlayout.graph.plan import Plan
from jaxlayout.graph.solve import RELUCTANCE, solve
from jaxlayout.layout import Order, identity, moves_data

SiteCost = Callable[[Node, Mode], float]
ConversionCost = Callable[[Sequence[int], Any, Order, Order], float]


def random_costs(seed: int, forbid: float = 0.0) -> tuple[SiteCost, ConversionCost]:
    """Costs of equal things are equal; some candidates that are not what is written are forbidden."""

    def draw(low: float, high: float, *what: Any) -> float:
        return random.Random(f"{seed} {what}").uniform(low, high)

    def site_ns(node: Node, mode: Mode) -> float:
        what = node.conv.key if node.conv is not None else node.name
        if mode is not node.modes[0] and draw(0, 1, "forbidden", what, mode) < forbid:
            return np.inf
        return draw(0, 1000, what, mode)

    def conversion_ns(shape: Sequence[int], dtype: Any, held: Order, wanted: Order) -> float:
        return draw(0, 400, tuple(shape), str(dtype), held, wanted)

    return site_ns, conversion_ns


def milp_minimum(graph: LayoutGraph, site_ns: SiteCost, conversion_ns: ConversionCost) -> float:
    """The least cost, as an integer program.

    x[node, mode] is 1 for the mode of a node, and the modes of a node sum to 1. For each use of a value (a consumer's
    operand), w[home, order] is a joint distribution of the order that the value is produced in and of the order that
    it is used in, with both as its marginals. y[value, home, order], at least each w of that value, pays for one
    conversion.
    """
    costs: list[float] = []
    binary: list[bool] = []
    rows: list[tuple[list[tuple[int, float]], float, float]] = []  # terms, lowest, highest

    def variable(cost: float, integer: bool) -> int:
        costs.append(cost)
        binary.append(integer)
        return len(costs) - 1

    def conversion(value: int, held: Order, wanted: Order) -> float:
        described = graph.values[value]
        if not moves_data(described.shape, held, wanted):
            return 0.0
        return described.times * conversion_ns(described.shape, described.dtype, held, wanted)

    x: list[dict[int, int]] = []
    for node in graph.nodes:
        modes = {}
        for i, mode in enumerate(node.modes):
            cost = node.times * site_ns(node, mode) if node.conv is not None or node.work is not None else 0.0
            if i == 0 and node.moved is not None:
                cost += conversion(node.results[0], node.moved, mode.results[0])
            if cost < np.inf:
                modes[i] = variable(cost + RELUCTANCE * (i > 0), True)
        x.append(modes)
        rows.append(([(column, 1.0) for column in modes.values()], 1, 1))

    def in_order(node: int, orders: Callable[[Mode], Order]) -> dict[Order, list[tuple[int, float]]]:
        found: dict[Order, list[tuple[int, float]]] = defaultdict(list)
        for i, column in x[node].items():
            found[orders(graph.nodes[node].modes[i])].append((column, -1.0))
        return found

    produced = {v: (n, s) for n, node in enumerate(graph.nodes) for s, v in enumerate(node.results)}
    paid: dict[tuple[int, Order, Order], int] = {}
    for n, node in enumerate(graph.nodes):
        for slot, value in enumerate(node.operands):
            producer, at = produced[value]
            homes = in_order(producer, lambda mode, at=at: mode.results[at])
            wants = in_order(n, lambda mode, slot=slot: mode.operands[slot])
            if len(homes) == len(wants) == 1 and homes.keys() == wants.keys():
                continue
            w = {(home, order): variable(0.0, False) for home in homes for order in wants}
            for home, terms in homes.items():
                rows.append(([*((w[home, order], 1.0) for order in wants), *terms], 0, 0))
            for order, terms in wants.items():
                rows.append(([*((w[home, order], 1.0) for home in homes), *terms], 0, 0))
            for (home, order), column in w.items():
                if cost := conversion(value, home, order):
                    if (value, home, order) not in paid:
                        paid[value, home, order] = variable(cost, False)
                    rows.append(([(paid[value, home, order], 1.0), (column, -1.0)], 0, np.inf))

    entries = [(i, column, factor) for i, (terms, _, _) in enumerate(rows) for column, factor in terms]
    of_row, of_column, factors = zip(*entries, strict=True)
    matrix = sparse.csr_array((factors, (of_row, of_column)), shape=(len(rows), len(costs)))
    result = milp(
        costs,
        integrality=np.array(binary),
        bounds=Bounds(0, 1),
        constraints=(matrix, [low for _, low, _ in rows], [high for _, _, high in rows]),
        options={"mip_rel_gap": 0},
    )
    assert result.success, result.message
    return float(result.fun)


def recomputed_ns(graph: LayoutGraph, plan: Plan, site_ns: SiteCost, conversion_ns: ConversionCost) -> float:
    """What a plan says to do, added up."""
    nodes = [node for node in graph.nodes if node.conv is not None or node.work is not None]
    modes = {mode: mode for node in nodes for mode in node.modes}
    total = 0.0
    for node in nodes:
        chosen = plan.choices.get(node.path, node.modes[0])
        total += node.times * site_ns(node, next(mode for mode in node.modes if mode == chosen))
    assert modes
    return total + sum(c.times * conversion_ns(c.shape, c.dtype, c.held, c.wanted) for c in plan.conversions)


def changed(graph: LayoutGraph, plan: Plan) -> int:
    """How many nodes do not work as written."""
    count = 0
    for node in graph.nodes:
        chosen = plan.choices.get(node.path)
        if chosen is None:
            continue
        if node.port is not None:
            outer = [chosen.operands[i] for i in node.port.operands] + [chosen.results[i] for i in node.port.results]
            count += any(order != identity(len(order)) for order in outer)
        elif node.kind in ("equation", "site"):
            count += chosen != node.modes[0]
    return count


def assert_optimal(graph: LayoutGraph, site_ns: SiteCost, conversion_ns: ConversionCost) -> Plan:
    plan = solve(graph, site_ns, conversion_ns)
    assert plan.exact and plan.gap == 0
    assert plan.bound_ns <= plan.predicted_ns <= plan.written_ns
    assert plan.predicted_ns == pytest.approx(recomputed_ns(graph, plan, site_ns, conversion_ns), rel=1e-9)
    assert plan.written_ns == pytest.approx(recomputed_ns(graph, written(graph), site_ns, conversion_ns), rel=1e-9)
    objective = plan.predicted_ns + RELUCTANCE * changed(graph, plan)
    assert objective == pytest.approx(milp_minimum(graph, site_ns, conversion_ns), rel=1e-6, abs=1e-6)
    return plan


def written(graph: LayoutGraph) -> Plan:
    return solving.plan_of(graph, [node.modes[0] for node in graph.nodes])


@pytest.mark.parametrize("name", MODELS)
def test_an_integer_program_agrees_about_the_demo_models(name):
    """For images of 64x64, by shapes alone: with the candidates that there are, and with any orders at all."""
    model = MODELS[name]
    shape = (2, 64, 64, 3) if model.order == "NHWC" else (2, 3, 64, 64)
    jaxpr = jax.make_jaxpr(model.apply)(model.shapes(), jax.ShapeDtypeStruct(shape, jnp.float32))
    graph = build_graph(jaxpr, candidates)
    assert not assert_optimal(graph, *random_costs(0, forbid=0.2)).trivial
    graph = build_graph(jaxpr, random_layouts(1, many=3))
    assert len(assert_optimal(graph, *random_costs(1, forbid=0.2)).conversions) > len(graph.sites) / 2


@examples(80)
@given(programs(), st.integers(0, 1000))
def test_an_integer_program_agrees_about_drawn_programs(program, seed):
    with program.config():
        graph = build_graph(program.jaxpr(), random_layouts(seed, many=3))
    assert_optimal(graph, *random_costs(seed, forbid=0.2))


def residual_blocks(many: int) -> Any:
    """The jaxpr of a chain of convolutions with bias, relu and a residual each."""

    def net(x: Any, k: Any, b: Any) -> Any:
        for _ in range(many):
            x = x + jax.nn.relu(lax.conv_general_dilated(x, k, (1, 1), "SAME") + b)
        return x

    shapes = (2, 8, 16, 16), (8, 8, 3, 3), (8, 1, 1)
    return jax.make_jaxpr(net)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))


def test_the_work_grows_linearly(monkeypatch):
    solutions = []

    def minimise(*args: Any) -> Any:
        solutions.append(minsum.minimise(*args))
        return solutions[-1]

    monkeypatch.setattr(solving, "minimise", minimise)
    nodes = []
    for many in (50, 100, 800):
        graph = build_graph(residual_blocks(many), candidates)
        plan = solve(graph, *random_costs(0))
        assert plan.exact and not plan.trivial
        nodes.append(len(graph.nodes))
    entries = [solution.entries for solution in solutions]
    assert nodes[2] - nodes[0] == 15 * (nodes[1] - nodes[0])
    assert entries[2] - entries[0] <= 1.1 * 15 * (entries[1] - entries[0])
    assert len({solution.width for solution in solutions}) == 1
