"""Exact minimisation of a sum of small cost tables over discrete variables.

The method is variable elimination, dynamic programming without a fixed direction (bucket elimination:
R. Dechter, "Bucket elimination: a unifying framework for reasoning", Artificial Intelligence 113, 1999). To
eliminate a variable, add up the tables that mention it and minimise it out of the sum; what remains is one
table over its neighbours. When all are gone, the constants left over are the minimum, and walking back reads
off the values. The work is exponential in the width of the graph alone, so it is linear in the length of a
chain, a row of residual blocks or a U-Net.

Where a joint table would have more than `max_table` entries, the bucket is split into mini-buckets, each
minimised by itself (R. Dechter and I. Rish, "Mini-buckets: a general scheme for bounded inference", J. ACM
50, 2003) after shifting costs between them until they agree about the variable (A. Ihler et al., "Join-graph
based cost-shifting schemes", UAI 2012). The constants are then a lower bound; the assignment read off is
improved by local search, and the `Solution` says how far apart the two are.

This module knows nothing of layouts, and imports nothing but numpy.
"""

import heapq
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from operator import index

import numpy as np

__all__ = ["Factor", "Infeasible", "Solution", "Undecided", "minimise"]

_Scope = tuple[int, ...]  # always ascending in here, so that tables are joined by reshaping alone
_Tables = dict[_Scope, np.ndarray]
_Bucket = list[tuple[_Scope, np.ndarray]]
_Key = tuple[float, int, int]  # fill, size of the joint table, variable

_HUB = 24  # a variable of more neighbours than this is eliminated last, for its fill takes too long to count
_EPS = 2.0**-52
_ALL = slice(None)


@dataclass(frozen=True, slots=True)
class Factor:
    """A cost for each joint value of a few variables."""

    scope: tuple[int, ...]  # variables, distinct, in any order
    table: np.ndarray  # float64, one axis per variable of the scope, as long as its domain; inf forbids


@dataclass(frozen=True, slots=True)
class Solution:
    """An assignment, its cost, and the proof of how good it is."""

    assignment: tuple[int, ...]  # a value per variable
    cost: float  # of this assignment, summed over the given factors
    bound: float  # no assignment costs less; the cost itself (up to rounding) where elimination was exact
    exact: bool  # the assignment is proved optimal
    width: int  # number of variables of the largest table made
    entries: int  # number of entries of all tables made: the work done


class Infeasible(ValueError):
    """Proof that no assignment has a finite cost: every value of `variable` is forbidden."""

    def __init__(self, variable: int, why: str) -> None:
        super().__init__(f"no assignment is allowed: every value of variable {variable} is forbidden {why}")
        self.variable = variable


class Undecided(ValueError):
    """No assignment of finite cost was found, and none was proved not to exist."""


def minimise(sizes: Sequence[int], factors: Sequence[Factor], *, max_table: int = 1 << 20) -> Solution:
    """The assignment of least total cost; variable v takes the values 0..sizes[v]-1.

    The result depends on nothing but the arguments. Costs that differ by no more than the rounding of the
    total count as equal, and of equal values the lowest is taken; a variable that no factor mentions is 0.

    No table of more than `max_table` entries is made (a given factor may be larger). What is left of each,
    at most `max_table` / size entries, is kept until the end.

    Raises `Infeasible` if every assignment is forbidden, `Undecided` if elimination was not exact and no
    allowed assignment was found, and `ValueError` for malformed arguments.
    """
    sizes = [index(size) for size in sizes]
    tables = _absorb(sizes, factors)
    constant = float(tables.pop((), 0.0))
    done = _eliminate(sizes, tables, max_table)
    bound = math.fsum([constant, *done.constants])
    slack = 4 * _EPS * math.fsum(map(abs, done.constants))

    assignment = [0] * len(sizes)
    decoded = _decode(done, assignment, slack)
    cost = _cost(factors, assignment)
    if done.split and not (decoded and _close(cost, bound)):
        # The second start is 0 everywhere: where 0 means "leave it alone", no result is worse than that.
        for start in (list(assignment), [0] * len(sizes)):
            _improve(sizes, tables, start, slack)
            improved = _cost(factors, start)
            if improved < cost:
                assignment, cost = start, improved
        if cost == math.inf:
            raise Undecided(
                f"no allowed assignment of {len(sizes)} variables was found, and none was ruled out, "
                f"with tables of at most {max_table} entries; a larger max_table decides it"
            )
    return Solution(
        assignment=tuple(assignment),
        cost=cost,
        bound=min(bound, cost),  # above it by rounding only
        exact=not done.split or _close(cost, bound),
        width=done.width,
        entries=done.entries,
    )


def _close(cost: float, bound: float) -> bool:
    return cost <= bound + 1e-12 * abs(bound)


def _cost(factors: Sequence[Factor], assignment: list[int]) -> float:
    return math.fsum(float(f.table[tuple([assignment[u] for u in f.scope])]) for f in factors)


def _absorb(sizes: Sequence[int], factors: Sequence[Factor]) -> _Tables:
    """One table for each set of variables; variables of one value are dropped from the scopes."""
    for v, size in enumerate(sizes):
        if size < 1:
            raise Infeasible(v, "because it has none")
    tables: _Tables = {}
    for factor in factors:
        scope, table = tuple([index(u) for u in factor.scope]), np.asarray(factor.table, dtype=np.float64)
        if len(set(scope)) != len(scope) or not all(0 <= u < len(sizes) for u in scope):
            raise ValueError(f"the scope {scope} is not of distinct variables among 0..{len(sizes) - 1}")
        if table.shape != tuple([sizes[u] for u in scope]):
            raise ValueError(f"a table of shape {table.shape} does not fit the domains of its scope {scope}")
        low = table.min()
        if not low > -math.inf:
            raise ValueError(f"the table of the scope {scope} holds NaN or -inf")
        if low == math.inf and scope:
            raise Infeasible(scope[0], f"by the factor over {_few(scope)}")
        if low == math.inf:
            raise ValueError("a factor over no variables is inf, which forbids everything")
        ascending = tuple(sorted(scope))
        if scope != ascending:
            table = table.transpose([scope.index(u) for u in ascending])
        kept = tuple([u for u in ascending if sizes[u] > 1])
        table = table.reshape([sizes[u] for u in kept])
        tables[kept] = tables[kept] + table if kept in tables else table
    return tables


@dataclass(slots=True)
class _Elimination:
    order: list[int]  # in which the variables went
    buckets: list[_Bucket]  # the tables that mentioned each as it went
    constants: list[float]  # their sum is the minimum, or a bound where buckets were split
    split: bool
    width: int
    entries: int


def _eliminate(sizes: Sequence[int], tables: _Tables, max_table: int) -> _Elimination:
    """Eliminate all variables, in the order that `_Queue` says."""
    tables = dict(tables)
    done = _Elimination([], [], [], False, 0, 0)
    mentions = _mentions(sizes, tables)
    queue = _Queue(sizes, mentions)
    while (going := queue.pop()) is not None:
        v, near = going
        bucket = [(scope, tables.pop(scope)) for scope in mentions[v]]
        for scope, _ in bucket:
            for u in scope:
                if u != v:
                    del mentions[u][scope]
        done.order.append(v)
        done.buckets.append(bucket)
        made = []
        for part in _partition(sizes, v, bucket, near, max_table, done):
            rest, message = _minimised(sizes, v, part, done)
            if not rest:
                continue
            made.append(rest)
            if rest in tables:
                tables[rest] = tables[rest] + message
                continue
            tables[rest] = message
            for u in rest:
                mentions[u][rest] = None
        queue.join(near, made)
    return done


def _minimised(sizes: Sequence[int], v: int, part: _Bucket, done: _Elimination) -> tuple[_Scope, np.ndarray]:
    """A variable minimised out of the sum of some tables. The minimum of what is left moves to the constants: messages,
    and their rounding, stay as small as local costs."""
    scope, joint = _join(sizes, part)
    done.width = max(done.width, len(scope))
    done.entries += joint.size
    axis = scope.index(v)
    message = np.minimum.reduce(joint, axis=axis)
    low = float(np.minimum.reduce(message, axis=None))
    if low == math.inf:
        raise Infeasible(v, f"by the factors over {_few(scope)} and those eliminated into them")
    done.constants.append(low)
    return scope[:axis] + scope[axis + 1 :], message - low


class _Queue:
    """Which variables share a table, and which goes next: always the one that adds the lightest edges between its
    neighbours.

    This is weighted min-fill. The key of a variable is computed anew only when its neighbours changed, or an edge
    between two of them appeared; an entry of the heap with another key than `_keys` is out of date.
    """

    def __init__(self, sizes: Sequence[int], mentions: Sequence[Collection[_Scope]]) -> None:
        self._sizes = sizes
        self._neighbours = [set().union(*scopes) - {v} for v, scopes in enumerate(mentions)]
        self._keys: list[_Key | None] = [self._key(v) if scopes else None for v, scopes in enumerate(mentions)]
        self._heap = [key for key in self._keys if key is not None]
        heapq.heapify(self._heap)

    def pop(self) -> tuple[int, set[int]] | None:
        """The next variable, and what were its neighbours; None when all have gone."""
        while self._heap:
            queued = heapq.heappop(self._heap)
            v = queued[-1]
            if queued == self._keys[v]:
                self._keys[v] = None
                near = self._neighbours[v]
                for u in near:
                    self._neighbours[u].discard(v)
                return v, near
        return None

    def join(self, near: set[int], scopes: Sequence[_Scope]) -> None:
        """Make neighbours of what shares one of these scopes, now that a variable with such neighbours has gone."""
        changed = set(near)
        for a, b in chain.from_iterable(combinations(scope, 2) for scope in scopes):
            if b not in self._neighbours[a]:
                changed |= self._neighbours[a] & self._neighbours[b]
                self._neighbours[a].add(b)
                self._neighbours[b].add(a)
        for u in changed:
            if (fresh := self._key(u)) != self._keys[u]:
                self._keys[u] = fresh
                heapq.heappush(self._heap, fresh)

    def _key(self, v: int) -> _Key:
        near, sizes = self._neighbours[v], self._sizes
        if len(near) > _HUB:
            return math.inf, len(near), v
        fill = sum(sizes[a] * sizes[b] for a, b in combinations(near, 2) if b not in self._neighbours[a])
        return fill, math.prod([sizes[u] for u in near]) * sizes[v], v


def _mentions(sizes: Sequence[int], tables: _Tables) -> list[dict[_Scope, None]]:
    """For each variable the scopes it is in; dictionaries, as sets that keep their order."""
    mentions: list[dict[_Scope, None]] = [{} for _ in sizes]
    for scope in tables:
        for u in scope:
            mentions[u][scope] = None
    return mentions


def _partition(
    sizes: Sequence[int], v: int, bucket: _Bucket, near: set[int], limit: int, done: _Elimination
) -> list[_Bucket]:
    """The bucket whole where its joint table is within the limit, otherwise as mini-buckets that are."""
    if len(bucket) == 1 or math.prod([sizes[u] for u in near]) * sizes[v] <= limit:
        return [bucket]
    parts: list[tuple[set[int], _Bucket]] = []
    for scope, table in sorted(bucket, key=lambda item: (-item[1].size, item[0])):
        for members, part in parts[-8:]:  # no more, so that the work is linear in the size of the bucket
            union = members.union(scope)
            if len(union) == len(members) or math.prod([sizes[u] for u in union]) <= limit:
                members |= union
                part.append((scope, table))
                break
        else:
            parts.append((set(scope), [(scope, table)]))
    if len(parts) == 1:
        return [bucket]

    # Each part would choose a value of v by itself. Shift costs between the parts until all see the same cost
    # for each value, which tightens the bound. The shifts sum to zero; what one part forbids, all forbid.
    done.split = True
    marginals = []
    for _, part in parts:
        scope, joint = _join(sizes, part)
        done.entries += joint.size
        marginals.append(joint.min(axis=tuple([i for i, u in enumerate(scope) if u != v])))
    mean = sum(marginals) / len(marginals)
    for (_, part), marginal in zip(parts, marginals, strict=True):
        shift = np.full_like(mean, math.inf)
        part.append(((v,), np.subtract(mean, marginal, out=shift, where=np.isfinite(mean))))
    return [part for _, part in parts]


def _join(sizes: Sequence[int], part: _Bucket) -> tuple[_Scope, np.ndarray]:
    """The sum of tables as one table over all their variables."""
    scope = tuple(sorted(set().union(*[s for s, _ in part])))
    joint = 0.0
    for s, table in part:
        joint = joint + (table if s == scope else table.reshape([sizes[u] if u in s else 1 for u in scope]))
    return scope, np.asarray(joint)


def _few(scope: _Scope) -> str:
    names = ", ".join(map(str, scope[:8]))
    return f"variables {names}, ..." if len(scope) > 8 else f"variables {names}"


def _decode(done: _Elimination, x: list[int], slack: float) -> bool:
    """Give each variable its best value, last eliminated first; whether all have one.

    After exact elimination every step succeeds. After a split a variable may find all its values forbidden;
    then go back to the latest variable that can be to blame and forbid its value (graph-based backjumping:
    R. Dechter, "Enhancement schemes for constraint processing", Artificial Intelligence 41, 1990), within a
    fixed number of steps. Running out of variables to blame proves that there is no allowed assignment.
    """
    order, buckets = done.order[::-1], done.buckets[::-1]
    position = {v: i for i, v in enumerate(order)}
    rows: list[np.ndarray] = []  # for each position reached, what the values cost that were not tried in vain
    blamed: list[set[int]] = []  # and the earlier positions that those failures depend on
    steps = 64 * len(order) + (1 << 16)
    i = 0
    while i < len(order):
        v = order[i]
        if i == len(rows):
            rows.append(_slices((v,), buckets[i], x))
            blamed.append(set())
        row = rows[i]
        value = int(row.argmin())
        low = float(row[value])
        if low < math.inf:
            x[v] = int((row <= low + slack).argmax()) if value else 0
            i += 1
            continue
        blame = blamed[i].union(*[[position[u] for u in scope] for scope, _ in buckets[i]]) - {i}
        if not blame:
            raise Infeasible(v, "by the factors over it and those eliminated into it")
        back = max(blame)
        steps -= i - back
        if steps < 0:
            return False
        del rows[back + 1 :], blamed[back + 1 :]
        blamed[back] |= blame - {back}
        rows[back][x[order[back]]] = math.inf
        i = back
    return True


def _slices(block: _Scope, bucket: _Bucket, x: list[int]) -> np.ndarray:
    """The sum of tables over a block of variables, all others at their values."""
    total = 0.0
    for scope, table in bucket:
        part = table[tuple([_ALL if u in block else x[u] for u in scope])]
        if part.ndim < len(block):  # one of a pair
            part = part[:, None] if block[0] in scope else part
        total = total + part
    return np.asarray(total)


def _improve(sizes: Sequence[int], tables: _Tables, x: list[int], slack: float) -> None:
    """Local search in place: the best value of one variable, or of two that share a table, given the others.

    Iterated conditional modes (J. Besag, "On the statistical analysis of dirty pictures", J. R. Statist. Soc.
    B 48, 1986), until no move helps or a fixed number of table look-ups is used up. A forbidden entry costs
    more here than all else together, so that the search also mends what is not allowed.
    """
    allowed = {scope: np.isfinite(table) for scope, table in tables.items()}
    spans = [float(np.ptp(table[allowed[scope]])) for scope, table in tables.items()]
    forbidden = 2 * math.fsum(spans) or 1.0
    finite = {scope: np.where(allowed[scope], table, table.min() + forbidden) for scope, table in tables.items()}

    mentions = _mentions(sizes, tables)
    pairs = {pair for scope in tables for pair in combinations(scope, 2)}
    blocks: list[_Scope] = [(v,) for v, scopes in enumerate(mentions) if scopes]
    blocks += sorted(pairs)
    touching: list[list[int]] = [[] for _ in sizes]
    for i, block in enumerate(blocks):
        for u in block:
            touching[u].append(i)

    heap = list(range(len(blocks)))  # lowest first: a pair is tried only when no single variable can improve
    queued = [True] * len(blocks)
    lookups = 64 * len(tables) + 4096
    while heap and lookups > 0:
        i = heapq.heappop(heap)
        queued[i] = False
        block = blocks[i]
        bucket = [(scope, finite[scope]) for scope in {s: None for u in block for s in mentions[u]}]
        lookups -= len(bucket)
        costs = _slices(block, bucket, x)
        best = np.unravel_index(int(costs.argmin()), costs.shape)
        if costs[best] >= costs[tuple([x[u] for u in block])] - slack:
            continue
        for u, value in zip(block, best, strict=True):
            x[u] = int(value)
        for w in {w for scope, _ in bucket for w in scope}:
            for other in touching[w]:
                if not queued[other]:
                    queued[other] = True
                    heapq.heappush(heap, other)
