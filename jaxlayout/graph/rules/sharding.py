"""Where arrays lie among devices: `with_sharding_constraint` and `shard_map`, whose specs follow the axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.extend.core import primitives as p
from jax.sharding import NamedSharding, PartitionSpec

from jaxlayout.graph.rules.base import Bodies, Body, Labelling, Orders, RegionRule, Rule, register_rule, same_axes
from jaxlayout.graph.rules.calls import straight
from jaxlayout.layout import Order
from jaxlayout.layout.order import permuted


def _spec(spec: PartitionSpec, order: Order) -> PartitionSpec:
    """The spec of an array in another order. It may say less than there are axes."""
    entries = (*spec, *(None,) * (len(order) - len(spec)))
    return spec.update(partitions=permuted(entries, order))


def _constrained(eqn: Any) -> Labelling | None:
    plain = isinstance(eqn.params["sharding"], NamedSharding) and eqn.params["layout"] is None
    return same_axes(eqn) if plain else None


def _constrained_params(eqn: Any, orders: Orders) -> dict[str, Any]:
    (order,), sharding = orders.operands, eqn.params["sharding"]
    moved = sharding.update(spec=_spec(sharding.spec, order))
    return {"sharding": moved, "unconstrained_dims": frozenset(map(order.index, eqn.params["unconstrained_dims"]))}


register_rule(p.sharding_constraint_p, Rule(_constrained, _constrained_params))


def _rebuild_shard_map(eqn: Any, bodies: Bodies, operands: Sequence[Any], orders: Orders) -> list[Any]:
    (body,) = bodies
    params = eqn.params
    mapped = jax.shard_map(
        lambda *args: tuple(body(*args)),
        mesh=params["mesh"],
        in_specs=tuple(map(_spec, params["in_specs"], orders.operands)),
        out_specs=tuple(map(_spec, params["out_specs"], orders.results)),
        axis_names=set(params["newly_manual_axes"]),
        check_vma=params["check_vma"],
    )
    return list(mapped(*operands))


# Neither primitive has a public name.
_KNOWN = frozenset({"jaxpr", "mesh", "in_specs", "out_specs", "newly_manual_axes", "check_vma"})
register_rule(
    "shard_map",
    RegionRule(lambda eqn: (Body(eqn.params["jaxpr"]),), straight, _rebuild_shard_map, known=_KNOWN),
)
register_rule("pvary", Rule(same_axes))
