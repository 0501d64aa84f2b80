"""Adapting primitives: they add, drop, cut, join, move or contract axes."""

import math
from collections.abc import Sequence
from typing import Any

from jax import lax
from jax.extend.core import primitives as p

from jaxlayout.graph.rules.base import Axes, Labelling, Orders, Rule, is_placed, positions, register_rule, same_axes
from jaxlayout.layout.order import permuted
from jaxlayout.runtime._compat import bind_equation


def _labels(axes: Sequence[int]) -> Axes:
    return tuple((a,) for a in axes)


def _all_axes(atom: Any) -> Axes:
    return _labels(range(len(atom.aval.shape)))


def _transposed(eqn) -> Labelling:
    return Labelling((_all_axes(eqn.invars[0]),), (_labels(eqn.params["permutation"]),))


# The user's own transposes cost nothing: the same array is looked at in another order.
register_rule(p.transpose_p, Rule(_transposed, bind=lambda eqn, operands, orders: [operands[0]], moves=True))


def _broadcast(eqn) -> Labelling | None:
    if is_placed(eqn.params) or len(eqn.invars) != 1:
        return None
    return Labelling((_labels(eqn.params["broadcast_dimensions"]),), (_all_axes(eqn.outvars[0]),))


def _broadcast_params(eqn, orders: Orders) -> dict:
    out, old = orders.results[0], eqn.params["broadcast_dimensions"]
    return {
        "shape": permuted(eqn.params["shape"], out),
        "broadcast_dimensions": tuple(out.index(old[a]) for a in orders.operands[0]),
    }


register_rule(p.broadcast_in_dim_p, Rule(_broadcast, _broadcast_params))


def _iota(eqn) -> Labelling | None:
    if is_placed(eqn.params) or eqn.invars:
        return None
    return Labelling((), (_all_axes(eqn.outvars[0]),))


def _iota_params(eqn, orders: Orders) -> dict:
    order = orders.results[0]
    return {"shape": permuted(eqn.params["shape"], order), "dimension": order.index(eqn.params["dimension"])}


register_rule(p.iota_p, Rule(_iota, _iota_params))


def _squeezed(eqn) -> Labelling:
    gone = eqn.params["dimensions"]
    # The dropped axes have size 1: they carry no label and stand anywhere.
    operand = tuple(() if a in gone else (a,) for a in range(len(eqn.invars[0].aval.shape)))
    return Labelling((operand,), (tuple(axis for axis in operand if axis),))


register_rule(
    p.squeeze_p,
    Rule(_squeezed, lambda eqn, orders: {"dimensions": positions(eqn.params["dimensions"], orders.operands[0])}),
)


def _reshaped(eqn) -> Labelling | None:
    """Split both shapes into the shortest runs of equal product; within a run, one side must be one axis."""
    if eqn.params["dimensions"] is not None or is_placed(eqn.params) or len(eqn.invars) != 1:
        return None
    old, new = eqn.invars[0].aval.shape, eqn.params["new_sizes"]
    if not all(isinstance(size, int) for size in (*old, *new)) or 0 in old:
        return None
    old_axes: list[tuple[int, ...]] = [()] * len(old)
    new_axes: list[tuple[int, ...]] = [()] * len(new)
    left = [i for i, size in enumerate(old) if size != 1]
    right = [i for i, size in enumerate(new) if size != 1]
    label = 0
    while left:
        run, other = [left.pop(0)], [right.pop(0)]
        while (one := math.prod(old[i] for i in run)) != (two := math.prod(new[i] for i in other)):
            (run if one < two else other).append((left if one < two else right).pop(0))
        labels = tuple(range(label, label + max(len(run), len(other))))
        label += len(labels)
        if len(other) == 1:
            new_axes[other[0]] = labels
            old_axes = [(labels[run.index(i)],) if i in run else axis for i, axis in enumerate(old_axes)]
        elif len(run) == 1:
            old_axes[run[0]] = labels
            new_axes = [(labels[other.index(i)],) if i in other else axis for i, axis in enumerate(new_axes)]
        else:  # neither a merge nor a split: both sides stay as they are, in one piece
            return None
    return Labelling((tuple(old_axes),), (tuple(new_axes),))


register_rule(
    p.reshape_p,
    Rule(_reshaped, lambda eqn, orders: {"new_sizes": permuted(eqn.params["new_sizes"], orders.results[0])}),
)


def _pad_params(eqn, orders: Orders) -> dict:
    return {"padding_config": permuted(eqn.params["padding_config"], orders.operands[0])}


def _slice_params(eqn, orders: Orders) -> dict:
    order, params = orders.operands[0], eqn.params
    return {
        name: None if params[name] is None else permuted(params[name], order)
        for name in ("start_indices", "limit_indices", "strides")
    }


def _rev_params(eqn, orders: Orders) -> dict:
    return {"dimensions": positions(eqn.params["dimensions"], orders.operands[0])}


register_rule(p.pad_p, Rule(same_axes, _pad_params))
register_rule(p.slice_p, Rule(same_axes, _slice_params))
register_rule(p.rev_p, Rule(same_axes, _rev_params))
register_rule(
    p.concatenate_p,
    Rule(same_axes, lambda eqn, orders: {"dimension": orders.results[0].index(eqn.params["dimension"])}),
)
register_rule(lax.split_p, Rule(same_axes, lambda eqn, orders: {"axis": orders.operands[0].index(eqn.params["axis"])}))


def _dynamic_slice(eqn, operands: Sequence[Any], orders: Orders) -> list[Any]:
    order = orders.operands[0]
    indices = permuted(operands[1:], order)
    sizes = permuted(eqn.params["slice_sizes"], order)
    return bind_equation(eqn, (operands[0], *indices), slice_sizes=sizes)


def _dynamic_update_slice(eqn, operands: Sequence[Any], orders: Orders) -> list[Any]:
    return bind_equation(eqn, (*operands[:2], *permuted(operands[2:], orders.operands[0])))


def _static_slice(eqn) -> Labelling | None:
    """Only with one scalar index per axis (other forms carry dynamic sizes)."""
    arrays = 1 if eqn.primitive is p.dynamic_slice_p else 2
    return same_axes(eqn) if len(eqn.invars) == arrays + len(eqn.outvars[0].aval.shape) else None


register_rule(p.dynamic_slice_p, Rule(_static_slice, bind=_dynamic_slice))
register_rule(p.dynamic_update_slice_p, Rule(_static_slice, bind=_dynamic_update_slice))


def _dot(eqn) -> Labelling | None:
    if is_placed(eqn.params):
        return None
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]
    lhs_rank, rhs_rank = (len(v.aval.shape) for v in eqn.invars)
    lhs = list(range(lhs_rank))
    rhs = list(range(lhs_rank, lhs_rank + rhs_rank))
    for a, b in zip((*lhs_contract, *lhs_batch), (*rhs_contract, *rhs_batch), strict=True):
        rhs[b] = lhs[a]
    shared = {lhs[a] for a in (*lhs_contract, *lhs_batch)}
    batch = [lhs[a] for a in lhs_batch]
    left = [label for label in lhs if label not in shared]
    right = [label for label in rhs if label not in shared]
    block = dict.fromkeys(batch, 0) | dict.fromkeys(left, 1) | dict.fromkeys(right, 2)
    return Labelling((_labels(lhs), _labels(rhs)), (_labels((*batch, *left, *right)),), block)


def _dot_params(eqn, orders: Orders) -> dict:
    """The result's batch axes come in the order in which they are named, so name them in the result's order."""
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]
    lhs, rhs = orders.operands
    batch = [i for i in orders.results[0] if i < len(lhs_batch)]
    contract = (tuple(lhs.index(a) for a in lhs_contract), tuple(rhs.index(a) for a in rhs_contract))
    batches = (tuple(lhs.index(lhs_batch[i]) for i in batch), tuple(rhs.index(rhs_batch[i]) for i in batch))
    return {"dimension_numbers": (contract, batches)}


# XLA takes any order, but may have to transpose inside.
register_rule(p.dot_general_p, Rule(_dot, _dot_params, sensitive=True))
