"""`tuned_conv`: one primitive for a convolution whose lowering has been chosen.

It carries the parameters of `conv_general_dilated` and the name of a lowering. It is a convolution to every
transformation: its derivative, transpose and batch are traced through JAX's own rules for
`conv_general_dilated` and come out as `tuned_conv` again, to be chosen anew, and never as the derivative of
whatever trick the forward pass used.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.extend.core.primitives import conv_general_dilated_p
from jax.interpreters import ad, batching, mlir, xla

from jaxlayout._compat import eval_equations
from jaxlayout.convs.lowering import evaluate, lowering_named
from jaxlayout.convs.signature import ConvSignature, written_order

tuned_conv_p = Primitive("tuned_conv")
CONVOLUTIONS = frozenset({conv_general_dilated_p, tuned_conv_p})
"""The primitives that are convolution sites."""


def conv_params(params: dict[str, Any]) -> dict[str, Any]:
    """The parameters that both convolution primitives share."""
    return {name: value for name, value in params.items() if name != "lowering"}


def chosen_lowering(params: dict[str, Any]) -> str:
    """The lowering of a convolution equation of either primitive."""
    return params.get("lowering", "xla")


def tuned_conv(lhs: jax.Array, rhs: jax.Array, *, lowering: str, **params: Any) -> jax.Array:
    """A convolution with the parameters of a `conv_general_dilated` equation, through a named lowering."""
    return tuned_conv_p.bind(lhs, rhs, lowering=lowering, **params)


def inherited(name: str, conv: ConvSignature, params: dict[str, Any]) -> str:
    """The lowering for a convolution derived from one computed by `name`: the same where it is native in
    the order the derived one has, else XLA's own."""
    return name if lowering_named(name).native(conv, written_order(params)) else "xla"


def _choose(lhs: jax.Array, rhs: jax.Array, *, lowering: str, **params: Any) -> jax.Array:
    dims = written_order(params)
    return evaluate(lowering, ConvSignature.of(lhs, rhs, params), dims, lhs, rhs)


def _rebind(jaxpr: Any, lowering: str, args: Sequence[Any]) -> list[Any]:
    """Evaluate a jaxpr with every convolution bound as a tuned one."""

    def bind(eqn: Any, operands: Sequence[Any]) -> Any:
        if eqn.primitive is not conv_general_dilated_p:
            return None
        lhs, rhs = operands
        conv = ConvSignature.of(lhs, rhs, eqn.params)
        return [tuned_conv(*operands, lowering=inherited(lowering, conv, eqn.params), **eqn.params)]

    return eval_equations(jaxpr, args, bind)


def _transpose_lhs(ct: Any, lhs: Any, rhs: Any, *, lowering: str, **params: Any) -> Any:
    def dgrad(ct: Any, rhs: Any) -> Any:
        return jax.linear_transpose(lambda x: conv_general_dilated_p.bind(x, rhs, **params), lhs.aval)(ct)[0]

    return _rebind(jax.make_jaxpr(dgrad)(ct, rhs), lowering, (ct, rhs))[0]


def _transpose_rhs(ct: Any, lhs: Any, rhs: Any, *, lowering: str, **params: Any) -> Any:
    def wgrad(ct: Any, lhs: Any) -> Any:
        return jax.linear_transpose(lambda x: conv_general_dilated_p.bind(lhs, x, **params), rhs.aval)(ct)[0]

    return _rebind(jax.make_jaxpr(wgrad)(ct, lhs), lowering, (ct, lhs))[0]


def _batch(args: Sequence[Any], dims: Sequence[Any], *, lowering: str, **params: Any) -> Any:
    conv = jax.vmap(partial(conv_general_dilated_p.bind, **params), in_axes=tuple(dims))
    return _rebind(jax.make_jaxpr(conv)(*args), lowering, args)[0], 0


tuned_conv_p.def_impl(partial(xla.apply_primitive, tuned_conv_p))
tuned_conv_p.def_abstract_eval(
    lambda lhs, rhs, *, lowering, **params: conv_general_dilated_p.abstract_eval(lhs, rhs, **params)[0]
)
ad.defbilinear(tuned_conv_p, _transpose_lhs, _transpose_rhs)
batching.primitive_batchers[tuned_conv_p] = _batch
mlir.register_lowering(tuned_conv_p, mlir.lower_fun(_choose, multiple_results=False))
