"""The solver against brute force, against an independent integer program, and against its own bound."""

import itertools
import math
import sys

import numpy as np
import pytest
from scipy import sparse
from scipy.optimize import Bounds, milp

from jaxlayout.graph.minsum import Factor, Infeasible, Undecided, minimise


def cost_of(factors, assignment):
    return sum(f.table[tuple(assignment[u] for u in f.scope)] for f in factors)


def brute_force(sizes, factors):
    return min(cost_of(factors, values) for values in itertools.product(*map(range, sizes)))


def random_problem(rng, *, forbid):
    """Three to six variables; factors of up to three in any order, some of one scope; costs often tie."""
    n = int(rng.integers(3, 7))
    sizes = rng.integers(1, 4, n).tolist()
    factors = []
    for _ in range(rng.integers(1, 2 * n + 1)):
        scope = tuple(rng.choice(n, rng.choice([1, 2, 2, 2, 3]), replace=False).tolist())
        table = rng.integers(0, 8, [sizes[u] for u in scope]) / 8
        table[rng.random(table.shape) < forbid] = math.inf
        factors.append(Factor(scope, table))
    return sizes, factors


def sparse_problem(rng, n, *, extra, largest=4):
    """A chain of n variables with `extra` chords."""
    sizes = rng.integers(2, largest + 1, n).tolist()
    scopes = [(v,) for v in range(n)] + [(v, v + 1) for v in range(n - 1)]
    scopes += [tuple(rng.choice(n, 2, replace=False).tolist()) for _ in range(extra)]
    return sizes, [Factor(scope, rng.random([sizes[u] for u in scope])) for scope in scopes]


def residual_chain(blocks, *, per_block=8, depth=5):
    """Blocks with a skip edge over each, and the long skips of a U-Net over all."""
    rng = np.random.default_rng(0)
    n = blocks * per_block
    sizes = rng.integers(2, 13, n).tolist()
    scopes = [(v,) for v in range(n)] + [(v, v + 1) for v in range(n - 1)]
    scopes += [(v, v + per_block) for v in range(0, n - per_block, per_block)]
    scopes += [(v, n - 1 - v) for v in range(3, n // 2 - 3, n // (2 * depth))]
    return sizes, [Factor(scope, rng.random([sizes[u] for u in scope])) for scope in scopes]


def different(size):
    return np.where(np.eye(size, dtype=bool), math.inf, 0.0)


# Exact elimination


@pytest.mark.parametrize("forbid", [0.0, 0.2, 0.5])
def test_brute_force_agrees(forbid):
    rng = np.random.default_rng(0)
    infeasible = 0
    for _ in range(150):
        sizes, factors = random_problem(rng, forbid=forbid)
        best = brute_force(sizes, factors)
        if best == math.inf:
            infeasible += 1
            with pytest.raises(Infeasible):
                minimise(sizes, factors)
            continue
        solution = minimise(sizes, factors)
        assert solution.exact
        assert len(solution.assignment) == len(sizes)
        assert solution.cost == cost_of(factors, solution.assignment) == best  # eighths, so without rounding
        assert solution.bound == best
    assert (infeasible > 0) == (forbid > 0)


def milp_minimum(sizes, factors):
    """The same minimum as an integer program: an indicator per value, a weight per table entry.

    The weights of a table's entries that give variable u the value a sum to the indicator of (u, a). Entries
    that are forbidden have no weight.
    """
    first = np.cumsum([0, *sizes])
    costs = [0.0] * first[-1]
    rows, columns, values, right = [], [], [], []

    def equation(terms, constant):
        for column, value in terms:
            rows.append(len(right))
            columns.append(column)
            values.append(value)
        right.append(constant)

    for v, size in enumerate(sizes):
        equation([(first[v] + a, 1) for a in range(size)], 1)
    for factor in factors:
        entries = [(index, cost) for index, cost in np.ndenumerate(factor.table) if cost < math.inf]
        for axis, u in enumerate(factor.scope):
            for a in range(sizes[u]):
                terms = [(len(costs) + i, 1) for i, (index, _) in enumerate(entries) if index[axis] == a]
                equation([*terms, (first[u] + a, -1)], 0)
        costs.extend([cost for _, cost in entries])
    matrix = sparse.csr_array((values, (rows, columns)), shape=(len(right), len(costs)))
    result = milp(
        costs,
        integrality=np.arange(len(costs)) < first[-1],
        bounds=Bounds(0, 1),
        constraints=(matrix, right, right),
        options={"mip_rel_gap": 0},
    )
    assert result.success, result.message
    return result.fun


@pytest.mark.parametrize("seed", range(10))
def test_an_integer_program_agrees(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(30, 61))
    sizes, factors = sparse_problem(rng, n, extra=n // 5)
    scope = tuple(rng.choice(n, 3, replace=False).tolist())
    factors.append(Factor(scope, rng.random([sizes[u] for u in scope])))
    pair = factors[n + 7]  # forbid the half of one table that is cheapest now
    pair.table[pair.table < np.median(pair.table)] = math.inf
    solution = minimise(sizes, factors)
    assert solution.exact
    assert solution.cost == pytest.approx(milp_minimum(sizes, factors), rel=1e-7)
    assert solution.cost == pytest.approx(cost_of(factors, solution.assignment), rel=1e-12)
    assert solution.cost == pytest.approx(solution.bound, rel=1e-12)


def test_known_widths():
    def widths(n, scopes):
        return minimise([2] * n, [Factor(scope, np.ones((2, 2))) for scope in scopes]).width

    assert minimise([], []).width == 0
    assert widths(2, [(0, 1)]) == 2
    assert widths(50, [(v, v + 1) for v in range(49)]) == 2  # a chain
    assert widths(50, [(v, (v + 1) % 50) for v in range(50)]) == 3  # a ring
    assert widths(50, [(0, v) for v in range(1, 50)]) == 2  # a star
    assert widths(50, [(v, 49 - v) for v in range(25)] + [(v, v + 1) for v in range(49)]) == 3  # a U-Net
    assert widths(6, list(itertools.combinations(range(6), 2))) == 6  # all with all
    rungs, rails = [(v, v + 1) for v in range(60) if v % 5 < 4], [(v, v + 5) for v in range(55)]
    assert widths(60, rungs + rails) == 6  # a grid


def test_work_grows_linearly():
    """Neither the table entries made nor the calls executed grow faster than the graph."""

    def work(blocks):
        sizes, factors = residual_chain(blocks)
        calls = 0

        def count(frame, event, argument):
            nonlocal calls
            calls += event in ("call", "c_call")

        before = sys.getprofile()
        sys.setprofile(count)
        try:
            solution = minimise(sizes, factors)
        finally:
            sys.setprofile(before)
        assert solution.exact
        return solution.entries, calls

    small_entries, small_calls = work(50)
    entries, calls = work(200)
    assert entries <= 4.8 * small_entries
    assert calls <= 4.4 * small_calls


def test_deep_chains_need_no_recursion():
    n = 4 * sys.getrecursionlimit() + 1
    solution = minimise([2] * n, [Factor((v, v + 1), different(2)) for v in range(n - 1)])
    assert solution.assignment == (0, 1) * (n // 2) + (0,)


# Shapes of problems


def test_no_variables_and_no_factors():
    assert minimise([], []).assignment == ()
    solution = minimise([3, 1, 2], [])
    assert (solution.assignment, solution.cost, solution.bound, solution.exact) == ((0, 0, 0), 0, 0, True)


def test_constants_and_variables_of_one_value():
    factors = [
        Factor((), np.array(2.0)),
        Factor((1,), np.array([3.0])),
        Factor((2, 1), np.array([[5.0], [4.0]])),
    ]
    solution = minimise([2, 1, 2], factors)
    assert (solution.assignment, solution.cost, solution.width) == ((0, 0, 1), 9, 1)


def test_factors_of_one_scope_add_up_in_any_order_of_it():
    table = np.array([[0.0, 2.0, 5.0], [1.0, 0.0, 5.0]])
    unary = Factor((0,), np.array([1.0, 0.0]))
    solution = minimise([2, 3], [Factor((0, 1), table), Factor((1, 0), 2 * table.T), unary, unary])
    assert (solution.assignment, solution.cost) == ((1, 1), 0)


def test_components_are_independent():
    step = np.array([[9.0, 1.0], [9.0, 9.0]])
    solution = minimise([2] * 5, [Factor((0, 3), step), Factor((4, 1), step)])
    assert (solution.assignment, solution.cost) == ((0, 1, 0, 1, 0), 2)


def test_negative_costs():
    factors = [Factor((0, 1), np.array([[-1.0, 2.0], [-3.0, math.inf]])), Factor((1,), np.array([0.0, -9.0]))]
    solution = minimise([2, 2], factors)
    assert (solution.assignment, solution.cost, solution.bound) == ((0, 1), -7, -7)


def test_ties_go_to_the_lowest_value():
    sizes, factors = residual_chain(6)
    flat = [Factor(f.scope, np.ones_like(f.table)) for f in factors]
    assert minimise(sizes, flat).assignment == (0,) * len(sizes)
    assert minimise(sizes, flat, max_table=1).assignment == (0,) * len(sizes)
    # The same three costs in two orders: 0.6000000000000001 and 0.6. Rounding makes no difference.
    orders = [Factor((0,), np.array(pair)) for pair in ([0.1, 0.3], [0.2, 0.2], [0.3, 0.1])]
    assert minimise([2], orders).assignment == (0,)


def test_results_repeat_and_factors_stay_as_they_are():
    sizes, factors = sparse_problem(np.random.default_rng(3), 40, extra=20)
    copies = [f.table.copy() for f in factors]
    for limit in (1 << 20, 32):
        assert minimise(sizes, factors, max_table=limit) == minimise(sizes, factors, max_table=limit)
    for factor, copy in zip(factors, copies, strict=True):
        np.testing.assert_array_equal(factor.table, copy)


# Mini-buckets


@pytest.mark.parametrize("limit", [1, 9, 20])
@pytest.mark.parametrize("forbid", [0.0, 0.25])
def test_small_tables_bound_the_optimum(limit, forbid):
    rng = np.random.default_rng(limit)
    for _ in range(100):
        sizes, factors = random_problem(rng, forbid=forbid)
        best = brute_force(sizes, factors)
        if best == math.inf:
            with pytest.raises((Infeasible, Undecided)):
                minimise(sizes, factors, max_table=limit)
            continue
        solution = minimise(sizes, factors, max_table=limit)
        assert solution.cost == cost_of(factors, solution.assignment)
        assert solution.bound <= best * (1 + 1e-12)
        assert best <= solution.cost
        assert solution.exact == (solution.cost <= solution.bound + 1e-12 * abs(solution.bound))


def test_the_bound_tightens_as_tables_grow():
    sizes, factors = sparse_problem(np.random.default_rng(0), 60, extra=40)
    whole = minimise(sizes, factors)
    narrow, wide = (minimise(sizes, factors, max_table=limit) for limit in (16, 1024))
    assert whole.exact
    assert not narrow.exact
    assert narrow.bound < wide.bound < whole.cost * (1 + 1e-12)
    assert whole.cost <= min(narrow.cost, wide.cost) * (1 + 1e-12)
    assert max(narrow.cost, wide.cost) < 1.1 * whole.cost
    assert narrow.width < wide.width < whole.width
    assert narrow.entries < whole.entries


def test_a_factor_beyond_the_limit_is_used_whole():
    table = np.arange(1.0, 28.0).reshape(3, 3, 3)[::-1].copy()
    solution = minimise([3, 3, 3], [Factor((0, 1, 2), table), Factor((1,), np.array([5.0, 0.0, 9.0]))], max_table=4)
    assert (solution.assignment, solution.cost, solution.exact) == ((2, 1, 0), 4, True)


def test_shifted_costs_make_good_bounds():
    solutions = []
    for seed in range(10):
        sizes, factors = sparse_problem(np.random.default_rng(seed), 60, extra=40)
        solutions.append(minimise(sizes, factors, max_table=16))
    assert sum(s.bound for s in solutions) > 0.94 * sum(s.cost for s in solutions)  # 0.96; unshifted 0.88


def colouring(rng, n, edges):
    """Prices for three colours of n vertices, which some colouring of them allows."""
    colours = rng.permutation(np.arange(n) % 3)
    pairs = [pair for pair in itertools.combinations(range(n), 2) if colours[pair[0]] != colours[pair[1]]]
    factors = [Factor(pairs[i], different(3)) for i in rng.choice(len(pairs), edges, replace=False)]
    return [3] * n, factors + [Factor((v,), rng.random(3)) for v in range(n)]


@pytest.mark.parametrize("seed", range(10))
def test_dead_ends_are_left(seed):
    """With tables this small, reading off a colouring runs into dead ends, which alone prove nothing."""
    sizes, factors = colouring(np.random.default_rng(seed), 60, 130)
    solution = minimise(sizes, factors, max_table=9)
    assert solution.bound <= solution.cost < math.inf


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("forbid", [False, True])
def test_no_one_or_two_changes_improve_the_result(seed, forbid):
    rng = np.random.default_rng(seed)
    sizes, factors = colouring(rng, 30, 65) if forbid else sparse_problem(rng, 40, extra=30)
    solution = minimise(sizes, factors, max_table=9)
    assert not solution.exact
    for factor in factors:
        near = [f for f in factors if set(f.scope) & set(factor.scope)]
        values = list(solution.assignment)
        here = cost_of(near, values)
        for changed in itertools.product(*[range(sizes[u]) for u in factor.scope]):
            for u, value in zip(factor.scope, changed, strict=True):
                values[u] = value
            assert cost_of(near, values) > here - 1e-9


def test_no_result_is_worse_than_all_zeros():
    """Eleven holes for twelve pigeons, which is hard to rule out, or 0 for all of them, at a price."""
    either = np.full((12, 12), math.inf)
    either[1:, 1:] = different(11)
    either[0, 0] = 0
    factors = [Factor(pair, either) for pair in itertools.combinations(range(12), 2)]
    factors += [Factor((v,), np.array([1.0, *[0.0] * 11])) for v in range(12)]
    solution = minimise([12] * 12, factors, max_table=144)
    assert solution.assignment == (0,) * 12
    assert solution.bound < solution.cost == 12
    assert not solution.exact


# Problems without a solution


def test_infeasible_names_a_variable():
    with pytest.raises(Infeasible, match=r"every value of variable 1 is forbidden by the factor over variables 1"):
        minimise([2, 2], [Factor((1,), np.full(2, math.inf))])
    with pytest.raises(Infeasible, match="no assignment is allowed") as caught:
        minimise([2, 2, 2], [Factor(pair, different(2)) for pair in ((0, 1), (1, 2), (2, 0))])
    assert caught.value.variable in (0, 1, 2)
    assert isinstance(caught.value, ValueError)
    halves = [Factor((0,), np.array([math.inf, 0])), Factor((0,), np.array([0, math.inf]))]
    for limit in (1, 100):
        with pytest.raises(Infeasible, match="variable 0"):
            minimise([2, 2], [*halves, Factor((0, 1), np.ones((2, 2)))], max_table=limit)


def pigeons(n):
    return [Factor(pair, different(n - 1)) for pair in itertools.combinations(range(n), 2)]


def test_infeasible_is_proved_by_search_or_left_undecided():
    with pytest.raises(Infeasible):
        minimise([5] * 6, pigeons(6), max_table=25)
    with pytest.raises(Undecided, match="none was ruled out, with tables of at most 121 entries"):
        minimise([11] * 12, pigeons(12), max_table=121)


@pytest.mark.parametrize(
    ("sizes", "factor", "message"),
    [
        ([2, 2], Factor((0, 0), np.ones((2, 2))), "distinct"),
        ([2, 2], Factor((0, 2), np.ones((2, 2))), r"among 0\.\.1"),
        ([2, 2], Factor((-1,), np.ones(2)), "distinct"),
        ([2, 3], Factor((1, 0), np.ones((2, 3))), r"shape \(2, 3\)"),
        ([2], Factor((0,), np.array([0, math.nan])), "NaN"),
        ([2], Factor((0,), np.array([0, -math.inf])), "-inf"),
        ([2], Factor((), np.array(math.inf)), "no variables"),
        ([0], Factor((0,), np.ones(0)), "variable 0"),
    ],
)
def test_malformed_problems_are_refused(sizes, factor, message):
    with pytest.raises(ValueError, match=message):
        minimise(sizes, [factor])
