"""`tuned_conv` in the tables of primitives that parts of JAX keep for themselves.

It is entered once somebody has imported such a part: who uses it has, and to others the import would cost time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
from jax.extend.core.primitives import conv_general_dilated_p

from jaxlayout.convs.primitive import conv_params, rebind, tuned_conv_p


def known_elsewhere() -> None:
    """Enter `tuned_conv` wherever it is not known yet. To be called before a transformation meets one."""
    for name, enter in _PARTS.items():
        if name in sys.modules and name not in _entered:
            enter(sys.modules[name])
            _entered.add(name)


def _enter_jet(jet: Any) -> None:
    """Taylor series: the products that JAX's own rule makes, each a derived convolution."""
    plain = jet.jet_rules[conv_general_dilated_p]

    def rule(primals: Sequence[Any], series: Sequence[Any], **params: Any) -> Any:
        terms = partial(plain, **conv_params(params))
        jaxpr, shapes = jax.make_jaxpr(terms, return_shape=True)(primals, series)
        return jax.tree.unflatten(jax.tree.structure(shapes), rebind(jaxpr, params, jax.tree.leaves((primals, series))))

    jet.jet_rules[tuned_conv_p] = rule


def _enter_roofline(roofline: Any) -> None:
    """What it does and moves at least: as the plain convolution."""

    def rule(context: Any, *_: Any, **params: Any) -> Any:
        plain = partial(conv_general_dilated_p.bind, **conv_params(params))
        result = roofline.roofline(plain)(*context.avals_in)[1]
        # Without memory at its peak, which is counted by who asks.
        return roofline.RooflineResult(unfused_flops=result.unfused_flops, unfused_hbm_bytes=result.unfused_hbm_bytes)

    roofline.register_roofline(tuned_conv_p)(rule)


_PARTS: dict[str, Callable[[Any], None]] = {
    "jax.experimental.jet": _enter_jet,
    "jax.experimental.roofline": _enter_roofline,
}
_entered: set[str] = set()
