"""`tuned_conv`: one primitive for a convolution whose lowering has been chosen.

It carries the parameters of `conv_general_dilated` and the name of a lowering. It is a convolution to every
transformation: its derivative, transpose and batch are traced through JAX's own rules for
`conv_general_dilated` and come out as `tuned_conv` again, never as the derivative of whatever trick the forward pass
used. Such a derived one is chosen anew when it is lowered, the first moment that sees its shapes, where it carries
somebody to ask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import jax
from jax import lax
from jax.extend.core import Primitive
from jax.extend.core.primitives import conv_general_dilated_p
from jax.interpreters import ad, batching, mlir, xla
from jax.sharding import AxisType, NamedSharding, auto_axes

from jaxlayout.convs.candidates import Candidate
from jaxlayout.convs.lowering import evaluate, lowering_named, may_crash, xla_for
from jaxlayout.convs.signature import ConvSignature, written_dims
from jaxlayout.runtime._compat import divides, eval_equations

tuned_conv_p = Primitive("tuned_conv")
CONVOLUTIONS = frozenset({conv_general_dilated_p, tuned_conv_p})
"""The primitives that are convolution sites."""


class LoweringSelector(Protocol):
    """Chooses the way to compute a derived convolution. Hashable: equal ones choose alike."""

    def __call__(
        self, lhs: Any, rhs: Any, lowering: str, params: Mapping[str, Any], platforms: Sequence[str]
    ) -> Candidate:
        """For operands of some shapes and dtypes; `lowering` is what it is computed by otherwise."""
        ...


_OURS = ("lowering", "selector", "derived")


def conv_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that both convolution primitives share."""
    return {name: value for name, value in params.items() if name not in _OURS}


def chosen_lowering(params: Mapping[str, Any]) -> str:
    """The lowering of a convolution equation of either primitive."""
    return params.get("lowering", "xla")


def tuned_conv(
    lhs: jax.Array,
    rhs: jax.Array,
    *,
    lowering: str,
    selector: LoweringSelector | None = None,
    derived: bool = False,
    **params: Any,
) -> jax.Array:
    """A convolution with the parameters of a `conv_general_dilated` equation, through a named lowering.

    `selector` chooses those that JAX derives from it; `derived`: this is one.
    """
    return tuned_conv_p.bind(lhs, rhs, lowering=lowering, selector=selector, derived=derived, **params)


def is_explicit(aval: Any) -> bool:
    """Whether a type says how its values are divided among devices."""
    sharding = getattr(aval, "sharding", None)
    return isinstance(sharding, NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types


def inherited(name: str, conv: ConvSignature, params: Mapping[str, Any]) -> str:
    """The lowering for a convolution derived from one computed by `name`, if nobody chooses: the same where it is
    native in the order the derived one has and nobody has to see first whether it runs, else XLA's own."""
    native = lowering_named(name).native(conv, written_dims(params))
    return name if native and not may_crash(name) else "xla"


def _lower(
    ctx: Any, lhs: Any, rhs: Any, *, lowering: str, selector: LoweringSelector | None, derived: bool, **params: Any
) -> Any:
    written = written_dims(params)
    (lhs_type, rhs_type), (out_type,) = ctx.avals_in, ctx.avals_out
    conv, chosen = ConvSignature.of(lhs_type, rhs_type, params), Candidate(lowering, written)
    if divides(ctx):
        seen = selector is None and not derived  # in a program that was planned, and judged, with its arrays divided
        if not seen or not lowering_named(lowering).divisible(conv, written):
            # XLA's partitioner is trusted with its own convolution, and only in these orders.
            chosen = Candidate(xla_for(conv), replace(written, out=written.lhs))
    elif derived and selector is not None:
        chosen = selector(lhs_type, rhs_type, lowering, params, ctx.module_context.platforms)

    def compute(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        dims = chosen.dims
        lhs = lax.transpose(lhs, dims.lhs.permutation_from(written.lhs))
        rhs = lax.transpose(rhs, dims.rhs.permutation_from(written.rhs))
        out = evaluate(chosen.lowering, conv, dims, lhs, rhs)
        return lax.transpose(out, written.out.permutation_from(dims.out))

    # A lowering says nothing of where arrays lie. XLA sees to that, and out goes where its type says.
    placed: Any = auto_axes(compute, out_sharding=out_type.sharding) if is_explicit(out_type) else compute
    return mlir.lower_fun(placed, multiple_results=False)(ctx, lhs, rhs)


def rebind(jaxpr: Any, ours: Mapping[str, Any], args: Sequence[Any]) -> list[Any]:
    """Evaluate a jaxpr with every convolution bound as one derived from one with our parameters `ours`."""

    def bind(eqn: Any, operands: Sequence[Any]) -> Any:
        if eqn.primitive is not conv_general_dilated_p:
            return None
        lhs, rhs = operands
        name = inherited(ours["lowering"], ConvSignature.of(lhs, rhs, eqn.params), eqn.params)
        return [tuned_conv(lhs, rhs, lowering=name, selector=ours["selector"], derived=True, **eqn.params)]

    return eval_equations(jaxpr, args, bind)


def _transpose_lhs(ct: Any, lhs: Any, rhs: Any, **params: Any) -> Any:
    def dgrad(ct: Any, rhs: Any) -> Any:
        plain = partial(conv_general_dilated_p.bind, **conv_params(params))
        return jax.linear_transpose(lambda x: plain(x, rhs), lhs.aval)(ct)[0]

    return rebind(jax.make_jaxpr(dgrad)(ct, rhs), params, (ct, rhs))[0]


def _transpose_rhs(ct: Any, lhs: Any, rhs: Any, **params: Any) -> Any:
    def wgrad(ct: Any, lhs: Any) -> Any:
        plain = partial(conv_general_dilated_p.bind, **conv_params(params))
        return jax.linear_transpose(lambda x: plain(lhs, x), rhs.aval)(ct)[0]

    return rebind(jax.make_jaxpr(wgrad)(ct, lhs), params, (ct, lhs))[0]


def _batch(args: Sequence[Any], dims: Sequence[Any], **params: Any) -> Any:
    conv = jax.vmap(partial(conv_general_dilated_p.bind, **conv_params(params)), in_axes=tuple(dims))
    return rebind(jax.make_jaxpr(conv)(*args), params, args)[0], 0


tuned_conv_p.def_impl(partial(xla.apply_primitive, tuned_conv_p))
tuned_conv_p.def_abstract_eval(
    lambda lhs, rhs, **params: conv_general_dilated_p.abstract_eval(lhs, rhs, **conv_params(params))[0]
)
ad.defbilinear(tuned_conv_p, _transpose_lhs, _transpose_rhs)
batching.primitive_batchers[tuned_conv_p] = _batch
mlir.register_lowering(tuned_conv_p, _lower)
