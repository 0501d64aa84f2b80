"""Primitives that reduce, scan along or slide a window over axes."""

from dataclasses import replace

from jax.extend.core import primitives as p

from jaxlayout.graph.rules.base import Axes, Labelling, Orders, Rule, is_placed, positions, register_rule, same_axes
from jaxlayout.layout.order import permuted


def _reduced(eqn) -> Labelling | None:
    """Arrays of one shape, then scalars (the initial values of the general `reduce`)."""
    if is_placed(eqn.params):
        return None
    gone = eqn.params["dimensions"] if "dimensions" in eqn.params else eqn.params["axes"]

    def axes(atom) -> Axes:
        return tuple((i,) for i in range(len(atom.aval.shape)))

    kept = tuple((i,) for i in range(len(eqn.invars[0].aval.shape)) if i not in gone)
    return Labelling(tuple(map(axes, eqn.invars)), (kept,) * len(eqn.outvars))


def _reduced_params(eqn, orders: Orders) -> dict:
    name = "dimensions" if "dimensions" in eqn.params else "axes"
    return {name: positions(eqn.params[name], orders.operands[0])}


for _primitive in (
    p.reduce_sum_p, p.reduce_max_p, p.reduce_min_p, p.reduce_prod_p, p.reduce_and_p, p.reduce_or_p,
    p.reduce_xor_p, p.reduce_p, p.argmax_p, p.argmin_p,
):  # fmt: skip
    register_rule(_primitive, Rule(_reduced, _reduced_params))


for _primitive in (p.cumsum_p, p.cumprod_p, p.cummax_p, p.cummin_p, p.cumlogsumexp_p):
    register_rule(
        _primitive,
        Rule(same_axes, lambda eqn, orders: {"axis": orders.operands[0].index(eqn.params["axis"])}),
    )


_WINDOW = ("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation")


def _window_params(eqn, orders: Orders) -> dict:
    order = orders.operands[0]
    return {name: permuted(eqn.params[name], order) for name in _WINDOW if name in eqn.params}


def _window(eqn) -> Labelling:
    """Of equal elements in a window the first is the one whose derivative counts: its axes stay in order."""
    labelling = same_axes(eqn)
    if eqn.primitive is p.reduce_window_sum_p:
        return labelling
    return replace(labelling, ordered=tuple(i for i, size in enumerate(eqn.params["window_dimensions"]) if size > 1))


for _primitive in (
    p.reduce_window_max_p, p.reduce_window_min_p, p.reduce_window_sum_p, p.reduce_window_p,
    p.select_and_scatter_add_p, p.select_and_gather_add_p,
):  # fmt: skip
    register_rule(_primitive, Rule(_window, _window_params, sensitive=True))
