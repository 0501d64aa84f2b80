"""Primitives that call a jaxpr: `jit`, `checkpoint`, and functions with a derivative rule of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend.core import primitives as p
from jax.extend.core.primitives import conv_general_dilated_p

from jaxlayout.convs.primitive import conv_params, tuned_conv_p
from jaxlayout.graph.rules.base import Bodies, Body, Orders, Port, RegionRule, closed, register_rule
from jaxlayout.layout import Order, conversion, identity
from jaxlayout.layout.order import permuted
from jaxlayout.runtime._compat import bind_equation, consts_as_arguments, consts_of, open_jaxpr, unspecified_sharding


def straight(eqn: Any) -> tuple[Port, ...]:
    """An operand for each of the one body's invars, a result for each outvar."""
    entering = (Port(operands=(i,), invars=((0, i),)) for i in range(len(eqn.invars)))
    leaving = (Port(results=(i,), outvars=((0, i),)) for i in range(len(eqn.outvars)))
    return (*entering, *leaving)


def _jit_body(eqn: Any) -> tuple[Body, ...] | None:
    params, unspecified = eqn.params, unspecified_sharding()
    shardings = (*params["in_shardings"], *params["out_shardings"])
    layouts = (*params["in_layouts"], *params["out_layouts"])
    if any(s is not unspecified for s in shardings) or any(x is not None for x in layouts):
        return None  # stated for the order the user wrote
    return (Body(params["jaxpr"]),)


def _rebuild_jit(eqn: Any, bodies: Bodies, operands: Sequence[Any], orders: Orders) -> list[Any]:
    return bind_equation(eqn, operands, jaxpr=closed(bodies[0], operands))


register_rule(p.jit_p, RegionRule(_jit_body, straight, _rebuild_jit))


def _as_convolutions(policy: Any) -> Any:
    """A checkpoint policy that takes a convolution of ours for one of JAX's."""
    if policy is None:
        return None

    def answer(primitive: Any, *avals: Any, **params: Any) -> Any:
        if primitive is tuned_conv_p:
            primitive, params = conv_general_dilated_p, conv_params(params)
        return policy(primitive, *avals, **params)

    return answer


def _rebuild_checkpoint(eqn: Any, bodies: Bodies, operands: Sequence[Any], orders: Orders) -> list[Any]:
    params, traced = {"policy": _as_convolutions(eqn.params["policy"])}, closed(bodies[0], operands)
    if consts := list(consts_of(traced)):
        traced, operands = consts_as_arguments(traced, operands), [*consts, *operands]
        if isinstance(each := eqn.params["prevent_cse"], tuple):  # for each operand
            params["prevent_cse"] = (False,) * len(consts) + each
    return bind_equation(eqn, operands, jaxpr=open_jaxpr(traced), **params)


register_rule(p.remat_p, RegionRule(lambda eqn: (Body(eqn.params["jaxpr"]),), straight, _rebuild_checkpoint))


def _reordered(arrays: Sequence[Any], held: Sequence[Order], wanted: Sequence[Order]) -> tuple[Any, ...]:
    """Arrays from one order to another; the cotangents of integers (float0) have no data to move."""

    def one(x: Any, a: Order, b: Order) -> Any:
        if a == b:
            return x
        if x.dtype == jax.dtypes.float0:
            return np.zeros(permuted(x.shape, conversion(a, b)), x.dtype)
        return lax.transpose(x, conversion(a, b))

    return tuple(one(x, a, b) for x, a, b in zip(arrays, held, wanted, strict=True))


def _written(orders: Sequence[Order]) -> tuple[Order, ...]:
    return tuple(identity(len(order)) for order in orders)


def _plain_custom(eqn: Any) -> tuple[Body, ...] | None:
    """Barriers: closed-over constants (JAX cannot differentiate such an equation either) and rules that want to
    see symbolic zeros."""
    params = eqn.params
    return None if params["num_consts"] or params["symbolic_zeros"] else (Body(params["call_jaxpr"]),)


def _rebuild_custom_jvp(eqn: Any, bodies: Bodies, operands: Sequence[Any], orders: Orders) -> list[Any]:
    """A new `custom_jvp` around the re-traced body; its rule runs the user's rule, through the jvp of the bound
    original equation."""
    (body,) = bodies
    ins, outs = orders.operands, orders.results
    fun = jax.custom_jvp(lambda *args: tuple(body(*args)))

    def rule(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
        out, out_tangents = jax.jvp(
            lambda *args: tuple(bind_equation(eqn, args)),
            _reordered(primals, ins, _written(ins)),
            _reordered(tangents, ins, _written(ins)),
        )
        return _reordered(out, _written(outs), outs), _reordered(out_tangents, _written(outs), outs)

    fun.defjvp(rule)
    return list(fun(*operands))


def _rebuild_custom_vjp(eqn: Any, bodies: Bodies, operands: Sequence[Any], orders: Orders) -> list[Any]:
    """Likewise: the residuals are those of the user's own forward rule, inside the vjp of the bound equation."""
    (body,) = bodies
    ins, outs = orders.operands, orders.results
    fun = jax.custom_vjp(lambda *args: tuple(body(*args)))

    def forward(*args: Any) -> tuple[Any, Any]:
        written = _reordered(args, ins, _written(ins))
        out, backward = jax.vjp(lambda *args: tuple(bind_equation(eqn, args)), *written)
        return _reordered(out, _written(outs), outs), backward

    def backward(saved: Callable[..., Any], cotangents: Sequence[Any]) -> tuple[Any, ...]:
        return _reordered(saved(_reordered(cotangents, outs, _written(outs))), _written(ins), ins)

    fun.defvjp(forward, backward)
    return list(fun(*operands))


_CUSTOM = frozenset({"call_jaxpr", "num_consts", "symbolic_zeros"})
_JVP, _VJP = _CUSTOM | {"jvp_jaxpr_fun"}, _CUSTOM | {"fwd_jaxpr_thunk", "bwd", "out_trees"}
register_rule(p.custom_jvp_call_p, RegionRule(_plain_custom, straight, _rebuild_custom_jvp, known=_JVP))
register_rule(p.custom_vjp_call_p, RegionRule(_plain_custom, straight, _rebuild_custom_vjp, known=_VJP))
