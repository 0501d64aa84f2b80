"""Functions as JAX sees them: of flat arrays; and what one already compiled by `jax.jit` was told."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.experimental.layout import Format

from jaxlayout._compat import jit_info, unspecified_sharding


def flat_function(
    call: Callable[[Any], Any], leaves: Sequence[Any], tree: Any, places: Sequence[int]
) -> tuple[Callable[..., list[Any]], list[Any]]:
    """`call`, which takes a tree, as a function from the leaves at some places to flat results; and a list that gets
    the tree of the results when that is traced."""
    out_trees: list[Any] = []

    def flat(*dynamic: Any) -> list[Any]:
        full = dict(enumerate(leaves)) | dict(zip(places, dynamic, strict=True))
        outs, out_tree = jax.tree.flatten(call(jax.tree.unflatten(tree, full.values())))
        out_trees.append(out_tree)
        return outs

    return flat, out_trees


def told_shardings(
    fun: Callable[..., Any], told: Mapping[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Sequence[Any]:
    """Where `jax.jit` of a function with keywords `told` puts the leaves of its arguments that are not static, as it
    says itself: None for what it leaves where it is. Empty where it was told nothing. Inside a trace only."""
    free = unspecified_sharding()
    if all(sharding is free for sharding in jax.tree.leaves(told.get("in_shardings", free))):
        return ()
    names = ("in_shardings", "static_argnums", "static_argnames")
    nothing = functools.wraps(fun, updated=())(lambda *args, **kwargs: ())
    probe = jax.jit(nothing, **{name: told[name] for name in names if name in told})
    (eqn,) = jax.make_jaxpr(lambda: probe(*args, **kwargs))().eqns
    return [None if sharding is free else sharding for sharding in eqn.params["in_shardings"]]


def is_jitted(fun: Any) -> bool:
    """Whether a function is what `jax.jit` returned (and not a method or another wrapper of that)."""
    return isinstance(fun, type(_jitted))


def jit_settings(jitted: Any) -> dict[str, Any]:
    """The keywords of the `jax.jit` that made `jitted`: `jax.jit(jitted.__wrapped__, **jit_settings(jitted))` is
    the same again. Raises TypeError where this JAX does not tell."""
    info = jit_info(jitted)
    settings = {name: getattr(info, name) for name in _AS_THEY_ARE}
    if info.compiler_options_kvs:
        settings["compiler_options"] = dict(info.compiler_options_kvs)
    for place in ("in", "out"):
        shardings, layouts = getattr(info, f"{place}_shardings_leaves"), getattr(info, f"{place}_layouts_leaves")
        leaves = [s if at is None else Format(at, s) for at, s in zip(layouts, shardings, strict=True)]
        settings[f"{place}_shardings"] = jax.tree.unflatten(getattr(info, f"{place}_shardings_treedef"), leaves)
    return settings


_AS_THEY_ARE = (
    *("static_argnums", "static_argnames", "donate_argnums", "donate_argnames"),
    *("keep_unused", "inline", "device", "backend"),
)
NOT_NESTED = ("compiler_options", "device", "backend")
"""What jit refuses, or ignores, inside another jit."""
_jitted = jax.jit(lambda: None)
