"""The interpreter: a program under a plan, with explicit transposes exactly where the plan has conversions.
It reads the plan's choices only: where the orders of a value differ between who makes it and who reads it a transpose
is put in (`LayoutTensor.to_layout` makes it), and those are the plan's conversions and what is done once of frozen
arguments (`tests/test_retrace.py`).

Every equation is bound in sequence, in its own name scope and source line, so effects happen as often and in
the order they did. A value is converted at most once to each order in the jaxpr that it lives in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax.extend.core import Literal, jaxprs_in_params
from jax.extend.core import primitives as p

from jaxlayout.convs.lowering import rereads
from jaxlayout.convs.lowerings.materialised import materialised
from jaxlayout.convs.primitive import CONVOLUTIONS, LoweringSelector, conv_params, tuned_conv
from jaxlayout.graph.build import Mode, Path
from jaxlayout.graph.plan import Plan
from jaxlayout.graph.program import equations
from jaxlayout.graph.rules import Orders, RegionRule, Rule, bodies_of, rule_for
from jaxlayout.graph.rules.elementwise import ELEMENTWISE, TRANSCENDENTAL
from jaxlayout.graph.validate import misfit
from jaxlayout.layout import LayoutTensor, LazyLayoutTensor, Order, identity
from jaxlayout.runtime._compat import bind_equation, consts_of, equation_scope, open_jaxpr, rank_of

_VIEWS = {p.pad_p, p.reshape_p, p.rev_p, p.slice_p, p.squeeze_p, p.transpose_p}
_CALLS = {p.jit_p, p.custom_jvp_call_p, p.custom_vjp_call_p}
_FUSED = ELEMENTWISE | _VIEWS | _CALLS
"""What XLA may put into one fusion with all its readers; of calls, if all that they run is of the kind."""


def retrace(jaxpr: Any, plan: Plan, selector: LoweringSelector | None = None) -> Callable[..., list[Any]]:
    """A function of the jaxpr's flat arguments that computes the same flat results under the plan. `selector`: chooses
    the convolutions that JAX derives from those of the program, the plan's and the others.

    Raises ValueError where the plan does not fit the program.
    """

    def run(*args: Any) -> list[Any]:
        outs = _Interpreter(plan, selector).region(jaxpr, [_lazy(x, _written(x)) for x in args], ())
        return [_in_order(x, _written(x)) for x in outs]

    return run


def _lazy(array: Any, order: Order) -> Any:
    """A value of the interpreter; scalars (which have no order) and what is no array stay as they are."""
    return LazyLayoutTensor(LayoutTensor(array, order)) if order else array


def _in_order(value: Any, order: Order) -> Any:
    return value.request_layout(order).materialize().data if isinstance(value, LazyLayoutTensor) else value


def _written(value: Any) -> Order:
    """The user's order of an array or value."""
    return identity(len(getattr(value, "shape", ())))


class _Interpreter:
    def __init__(self, plan: Plan, selector: LoweringSelector | None):
        self.choices, self.materialised_bytes, self.selector = plan.choices, plan.materialised_bytes, selector
        # Repeated blocks share one inner jaxpr: rebuilt the same way they are one function again.
        self.bodies: dict[Any, Callable[..., list[Any]]] = {}
        self.inside: dict[Path, tuple[tuple[Path, Mode], ...]] = {}
        for path, mode in self.choices.items():
            for n in range(1, len(path)):
                self.inside[path[:n]] = (*self.inside.get(path[:n], ()), (path[n:], mode))

    def region(self, jaxpr: Any, args: Sequence[Any], path: Path) -> list[Any]:
        inner = open_jaxpr(jaxpr)
        env: dict[Any, Any] = {}
        for var, const in zip(inner.constvars, consts_of(jaxpr), strict=True):
            env[var] = _lazy(const, _written(const))
        env.update(zip(inner.invars, args, strict=True))

        def read(atom: Any) -> Any:
            if not isinstance(atom, Literal):
                return env[atom]
            return _lazy(atom.val, identity(rank_of(atom)))

        costly: set[Any] = set()  # what costs much to compute, and that XLA may compute anew for each of its readers
        for i, eqn in enumerate(inner.eqns):
            operands = [read(atom) for atom in eqn.invars]
            reads = [not isinstance(atom, Literal) and atom in costly for atom in eqn.invars]
            with equation_scope(eqn):
                results = self.equation(eqn, operands, (*path, i), reads[:1] == [True])
            if _is_costly(eqn, any(reads)):
                costly.update(var for var in eqn.outvars if rank_of(var))
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in inner.outvars]

    def equation(self, eqn: Any, operands: Sequence[Any], path: Path, costly: bool) -> list[Any]:
        """The results of one equation; `costly`: its first operand is."""
        mode = self.choices.get(path)
        orders = _orders(eqn, mode, path)
        arrays = [_in_order(x, order) for x, order in zip(operands, orders.operands, strict=True)]
        rule = rule_for(eqn.primitive)
        if path in self.inside or (isinstance(rule, RegionRule) and (mode is not None or self.derives(eqn))):
            outs = self.call(eqn, rule, arrays, orders, path)
        elif mode is not None and mode.candidate is not None:
            if eqn.primitive not in CONVOLUTIONS:
                raise misfit(eqn, path, "is not a convolution")
            numbers = {"dimension_numbers": mode.candidate.dims.to_lax()}
            materialises = costly and self.may_materialise(arrays[0], mode.candidate.lowering)
            name = materialised(mode.candidate.lowering) if materialises else mode.candidate.lowering
            outs = self.convolution(arrays, conv_params(eqn.params) | numbers, lowering=name)
        elif eqn.primitive in CONVOLUTIONS and self.selector is not None:
            outs = self.convolution(arrays, {"lowering": "xla"} | eqn.params)
        elif mode is None:
            outs = bind_equation(eqn, arrays)
        elif isinstance(rule, Rule):
            outs = rule.apply(eqn, arrays, orders)
        else:
            raise misfit(eqn, path, "has no rule for other orders")
        return [_lazy(out, order) for out, order in zip(outs, orders.results, strict=True)]

    def convolution(self, arrays: Sequence[Any], params: Mapping[str, Any], **ours: Any) -> list[Any]:
        return [tuned_conv(*arrays, **{**params, **ours, "selector": self.selector})]

    def may_materialise(self, lhs: Any, lowering: str) -> bool:
        """Whether an lhs that is costly to compute is written out for a lowering."""
        small = self.materialised_bytes is None or lhs.size * lhs.dtype.itemsize <= self.materialised_bytes
        return small and rereads(lowering)

    def derives(self, eqn: Any) -> bool:
        """Whether an equation runs convolutions that others may be derived from."""
        if self.selector is None or bodies_of(eqn) is None:
            return False
        return any(inner.primitive in CONVOLUTIONS for sub in jaxprs_in_params(eqn.params) for inner in equations(sub))

    def call(self, eqn: Any, rule: Any, arrays: Sequence[Any], orders: Orders, path: Path) -> list[Any]:
        bodies = bodies_of(eqn)
        if bodies is None:
            raise misfit(eqn, path, "cannot be entered")
        inner = rule.inner_orders(eqn, orders)
        if inner is None:
            raise misfit(eqn, path, "cannot have the orders that the plan says")
        pairs = enumerate(zip(bodies, inner, strict=True))
        retraced = [self.body(eqn, body.jaxpr, inside, (*path, b)) for b, (body, inside) in pairs]
        return rule.rebuild(eqn, retraced, arrays, orders)

    def body(self, eqn: Any, jaxpr: Any, orders: Orders, path: Path) -> Callable[..., list[Any]]:
        key = (id(jaxpr), orders, self.inside.get(path, ()))
        if key not in self.bodies:

            def run(*args: Any) -> list[Any]:
                held = [_lazy(x, order) for x, order in zip(args, orders.operands, strict=True)]
                outs = self.region(jaxpr, held, path)
                return [_in_order(x, order) for x, order in zip(outs, orders.results, strict=True)]

            run.__name__ = run.__qualname__ = str(eqn.params.get("name", eqn.primitive))
            self.bodies[key] = run
        return self.bodies[key]


def _is_costly(eqn: Any, reads_costly: bool) -> bool:
    """Whether an equation's results cost much to compute, by it or what may be fused with it, at each element."""
    if eqn.primitive not in _FUSED:
        return False
    steps = [eqn, *(one for sub in jaxprs_in_params(eqn.params) for one in equations(sub))]
    if any(one.primitive not in _FUSED for one in steps):
        return False
    return reads_costly or any(one.primitive in TRANSCENDENTAL for one in steps)


def _orders(eqn: Any, mode: Mode | None, path: Path) -> Orders:
    if mode is None:
        return Orders(tuple(identity(rank_of(v)) for v in eqn.invars), tuple(identity(rank_of(v)) for v in eqn.outvars))
    ranks = [rank_of(v) for v in (*eqn.invars, *eqn.outvars)]
    if ranks != [len(order) for order in (*mode.operands, *mode.results)]:
        raise misfit(eqn, path, "has other operands or results than the plan says")
    return Orders(mode.operands, mode.results)
