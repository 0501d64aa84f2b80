"""Which axes of a program's values are cut into pieces, one for each device along a mesh axis.

A program under automatic sharding is written for whole arrays; what runs on a device, and takes time, is its pieces.
What is known of the arguments is handed on through the labels that orders go by. What is not known counts as whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
from jax.core import Tracer
from jax.extend.core import primitives as p
from jax.sharding import AxisType, NamedSharding

from jaxlayout.convs.signature import ConvSignature
from jaxlayout.graph.rules.base import Labelling, Port
from jaxlayout.runtime._compat import consts_of, open_jaxpr, rank_of

Part = tuple[tuple[str, int], ...]
"""The mesh axes, with their sizes, along which an axis of an array is divided; () where it is whole."""
Division = tuple[Part, ...]
"""The part of each axis of a value."""


def whole(rank: int) -> Division:
    """That of a value which every device has all of."""
    return ((),) * rank


def pieces(part: Part) -> int:
    """In how many pieces an axis is."""
    return math.prod(size for _, size in part)


def local(shape: Sequence[Any], division: Division) -> tuple[Any, ...]:
    """The shape of what one device has."""
    return tuple(size // pieces(part) if part else size for size, part in zip(shape, division, strict=True))


def of_sharding(sharding: Any, rank: int) -> Division:
    """The division that a sharding says; whole where it is none of a mesh."""
    if not isinstance(sharding, NamedSharding):
        return whole(rank)
    sizes = sharding.mesh.shape

    def part(entry: Any) -> Part:
        names = entry if isinstance(entry, tuple) else (entry,)
        return tuple((name, sizes[name]) for name in names if isinstance(name, str) and sizes[name] > 1)

    return tuple(map(part, (*sharding.spec, *(None,) * (rank - len(sharding.spec)))))


def of_arguments(jaxpr: Any, shardings: Sequence[Any]) -> Mapping[Any, Division]:
    """The divisions of a closed jaxpr's arguments and constants, as far as they say. `shardings`: of the arguments,
    None for those not known; or empty."""
    inner = open_jaxpr(jaxpr)
    consts = [getattr(const, "sharding", None) for const in consts_of(jaxpr)]
    given = [*consts, *(shardings or [None] * len(inner.invars))]
    pairs = zip((*inner.constvars, *inner.invars), given, strict=True)
    return {var: of_sharding(sharding, rank_of(var)) for var, sharding in pairs if sharding is not None}


def of_type(aval: Any) -> Division | None:
    """The division in the type of a value, on a mesh with explicit axes; None elsewhere."""
    sharding = getattr(aval, "sharding", None)
    if not isinstance(sharding, NamedSharding) or AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    return of_sharding(sharding, len(aval.shape))


def _fitting(parts: Sequence[Part], shape: Sequence[Any]) -> Division:
    """No mesh axis twice, and even pieces only."""
    found: list[Part] = []
    for part, size in zip(parts, shape, strict=True):
        taken = {name for other in found for name, _ in other}
        fits = isinstance(size, int) and size % pieces(part) == 0 and not any(name in taken for name, _ in part)
        found.append(part if fits else ())
    return tuple(found)


def of_results(eqn: Any, labelling: Labelling | None, operands: Sequence[Division]) -> list[Division]:
    """The divisions of an equation's results, given those of its operands; `labelling`: its axes, where its rule knows
    them. A divided axis that is merged with others stays so where it is the first of them."""
    parts: dict[int, Part] = {}
    for axes, division in zip(labelling.operands if labelling else (), operands, strict=False):
        for labels, part in zip(axes, division, strict=True):
            if labels and part:
                parts.setdefault(labels[0], part)
    constrained = eqn.params["sharding"] if eqn.primitive is p.sharding_constraint_p else None
    stated = eqn.params.get("out_shardings") or [constrained] * len(eqn.outvars)
    found = []
    for i, (var, sharding) in enumerate(zip(eqn.outvars, stated, strict=True)):
        axes = labelling.results[i] if labelling else ((),) * rank_of(var)
        carried = [parts.get(labels[0], ()) if labels else () for labels in axes]
        if isinstance(sharding, NamedSharding):
            free = eqn.params.get("unconstrained_dims", ())
            given = of_sharding(sharding, rank_of(var))
            carried = [carried[a] if a in free else part for a, part in enumerate(given)]
        typed = of_type(var.aval)
        found.append(_fitting(carried, getattr(var.aval, "shape", ())) if typed is None else typed)
    return found


def of_convolution(
    conv: ConvSignature, params: Mapping[str, Any], lhs: Division, rhs: Division
) -> tuple[ConvSignature, Division]:
    """What one device computes of a convolution, and the division of out. Spatial axes count as whole: neighbours
    exchange what they need of each other."""
    numbers = params["dimension_numbers"]
    batch, features = (lhs[axis] for axis in numbers.lhs_spec[:2])
    outs, ins = (rhs[axis] for axis in numbers.rhs_spec[:2])
    plain = not conv.is_grouped
    images = batch if conv.batch_groups == 1 else ()
    summed = features if features == ins and conv.feature_groups == 1 else ()
    grouped = features if conv.feature_groups > 1 else batch if conv.batch_groups > 1 else ()
    if grouped != outs or max(conv.feature_groups, conv.batch_groups) % pieces(grouped):
        grouped = ()
    (_, made) = _fitting((images, outs if plain else grouped), (conv.batch, conv.out_features))
    groups = pieces(grouped)
    piece = replace(
        conv,
        batch=conv.batch // (groups if conv.batch_groups > 1 else pieces(images)),
        in_features=conv.in_features // (groups if conv.feature_groups > 1 else pieces(summed)),
        out_features=conv.out_features // pieces(made),
        feature_groups=conv.feature_groups // groups if conv.feature_groups > 1 else 1,
        batch_groups=conv.batch_groups // groups if conv.batch_groups > 1 else 1,
    )
    out = dict(zip(numbers.out_spec[:2], (images, made), strict=True))
    return piece, tuple(out.get(axis, ()) for axis in range(len(lhs)))


def agreed(
    labelling: Labelling, divisions: Sequence[Division], shapes: Sequence[Sequence[int]]
) -> tuple[tuple[int, ...], ...]:
    """The local shapes of an equation's operands and results as it could have them on a device: an axis on whose
    pieces, or size, they do not agree counts as whole."""
    seen: dict[int, set[tuple[Part, int]]] = {}
    values = (*labelling.operands, *labelling.results)
    for axes, division, shape in zip(values, divisions, shapes, strict=True):
        for labels, part, size in zip(axes, division, shape, strict=True):
            seen.setdefault(labels[0] if labels else -1, set()).add((part, size))

    def even(axes: Any, division: Division) -> Division:
        return tuple(
            p if labels and len(seen[labels[0]]) == 1 else () for labels, p in zip(axes, division, strict=True)
        )

    return tuple(local(s, even(a, d)) for a, d, s in zip(values, divisions, shapes, strict=True))


def entering(eqn: Any, port: Port, division: Division) -> Division:
    """What a body of an equation gets of an operand through a port."""
    names = eqn.params.get("newly_manual_axes", ())  # of a shard_map, in which shapes are those of the pieces
    inside = division[1:] if port.stacked else division
    return tuple(tuple((name, size) for name, size in part if name not in names) for part in inside)


def leaving(eqn: Any, port: Port, division: Division) -> Division:
    """What an equation gives of a body's result through a port."""
    if "newly_manual_axes" not in eqn.params:
        return ((), *division) if port.stacked else division
    specs = [eqn.params["out_specs"][i] for i in port.results]
    outside = of_sharding(NamedSharding(eqn.params["mesh"], specs[0]), len(division))
    return tuple((*ours, *theirs) for ours, theirs in zip(outside, division, strict=True))


def spans_processes(shardings: Sequence[Any]) -> bool:
    """Whether some array is not on this process's devices alone."""
    return any(not sharding.is_fully_addressable for sharding in shardings if sharding is not None)


def placement(leaf: Any) -> Any:
    """Where an argument lies, as far as it matters to what is decided: () unless it is divided or spans processes."""
    known = isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) and not isinstance(leaf, Tracer)
    if not known or leaf.sharding is None:
        return ()
    division, spans = of_sharding(leaf.sharding, leaf.ndim), spans_processes([leaf.sharding])
    return (division, spans) if spans or any(division) else ()


def placements(leaves: Sequence[Any], given: Sequence[Any]) -> list[Any]:
    """The shardings of arguments, arrays or shapes: what `jax.jit` was told of them, else their own; None where it puts
    them where the others are."""
    own = [getattr(leaf, "sharding", None) if getattr(leaf, "committed", True) else None for leaf in leaves]
    return [a or b for a, b in zip(given or own, own, strict=True)]
