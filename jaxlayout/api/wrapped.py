"""Functions as JAX sees them: of flat arrays; and the keywords of one already compiled by `jax.jit`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import jax
from jax.experimental.layout import Format

from jaxlayout.runtime._compat import jit_info, open_jaxpr, unspecified_sharding


def traced_once(fun: Callable[..., Any], jit_keywords: Mapping[str, Any]) -> Any:
    """`jax.jit` of a function that knows which arguments are static and nothing else: to be traced, never to be run.
    JAX keeps what it traces, so the function itself runs once for the same shapes, whoever asks."""
    return jax.jit(fun, **{name: jit_keywords[name] for name in _STATIC if name in jit_keywords})


def take_after(other: Any, jitted: Any) -> None:
    """Give something the names and the signature of the function that `jitted` was made of, as `jax.jit` does. Not its
    attributes: one of them may hide a method."""
    functools.update_wrapper(other, jitted, updated=())
    with suppress(TypeError, ValueError):  # of what is not written in Python
        other.__signature__ = inspect.signature(jitted)


def forget(jitted: Any) -> None:
    """Have JAX trace and compile it anew. An attribute of the function may hide the method."""
    type(jitted).clear_cache(jitted)


class StandIn:
    """`run` in place of the function that `jitted` was made of: to all that JAX says, in errors, names of programs and
    profiles, it is that function."""

    def __init__(self, run: Callable[..., Any], jitted: Any):
        take_after(self, jitted)
        self._run = run
        self._shown = inner = jitted.__wrapped__
        while isinstance(inner, functools.partial):  # JAX looks for the source line under `__wrapped__`
            inner = inner.func
        self.__wrapped__ = inner

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return self._run(*args, **kwargs)

    def __repr__(self) -> str:
        return repr(self._shown)


def program_of(
    jitted: Any, args: tuple[Any, ...], kwargs: dict[str, Any], places: Sequence[int]
) -> tuple[Any, list[Any], Any]:
    """What a `traced_once` function is for some arguments, of whose leaves those at `places` are not static: its closed
    jaxpr, those leaves, and the tree of the results. Traced values that it closes over are constants of the jaxpr. What
    JAX has to object to, it says of the user's own function."""
    traced = type(jitted).trace(jitted, *args, **kwargs)  # an attribute of the function may hide it
    leaves, tree = jax.tree.flatten((args, kwargs))
    arrays = [leaves[i] for i in places]
    jaxpr = traced.jaxpr
    if len(open_jaxpr(jaxpr).invars) > len(arrays):  # jit has made arguments of those, and does not say which they are

        def call(*dynamic: Any) -> list[Any]:
            full = dict(enumerate(leaves)) | dict(zip(places, dynamic, strict=True))
            args, kwargs = jax.tree.unflatten(tree, full.values())
            return jax.tree.leaves(jitted(*args, **kwargs))

        jaxpr = jax.make_jaxpr(call)(*arrays)
    return jaxpr, arrays, traced.out_tree


def stated_shardings(
    fun: Callable[..., Any], jit_keywords: Mapping[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Sequence[Any]:
    """Where `jax.jit` of a function with such keywords puts the leaves of its arguments that are not static, as it
    says itself: None for what it leaves where it is. Empty where they say nothing of it. Inside a trace only."""
    free = unspecified_sharding()
    if all(sharding is free for sharding in jax.tree.leaves(jit_keywords.get("in_shardings", free))):
        return ()
    nothing = functools.wraps(fun, updated=())(lambda *args, **kwargs: ())
    probe = jax.jit(
        nothing, **{name: jit_keywords[name] for name in ("in_shardings", *_STATIC) if name in jit_keywords}
    )
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
        if all(leaf is unspecified_sharding() for leaf in leaves):
            continue
        settings[f"{place}_shardings"] = jax.tree.unflatten(getattr(info, f"{place}_shardings_treedef"), leaves)
    return settings


_STATIC = ("static_argnums", "static_argnames")
_AS_THEY_ARE = *_STATIC, "donate_argnums", "donate_argnames", "keep_unused", "inline", "device", "backend"
NOT_NESTED = ("compiler_options", "device", "backend")
"""What jit refuses, or ignores, inside another jit."""
_jitted = jax.jit(lambda: None)
