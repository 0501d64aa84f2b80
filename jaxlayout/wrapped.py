"""What a function already compiled by `jax.jit` was told, found out from outside with public means."""

from __future__ import annotations

from typing import Any

import jax


class _Neither:
    """Not hashable, so no static argument; not an array, so no dynamic one either."""

    __hash__ = None  # type: ignore[assignment]


def jit_settings(jitted: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keywords of the `jax.jit` that made `jitted`, as far as they matter for calls of this form: static and
    donated arguments, keep_unused, inline, compiler options. The function itself is traced, never run.

    Shardings and physical formats stay with the inner jit.
    """
    probe = _Neither()
    static_argnums = tuple(i for i in range(len(args)) if _is_static(jitted, _replaced(args, i, probe), kwargs))
    static_argnames = tuple(name for name in kwargs if _is_static(jitted, args, kwargs | {name: probe}))
    traced = jitted.trace(*args, **kwargs)
    info_args, info_kwargs = traced.args_info
    dynamic = [i for i in range(len(args)) if i not in static_argnums]
    donated = tuple(i for i, info in zip(dynamic, info_args, strict=True) if _donated(info))
    settings: dict[str, Any] = {
        "static_argnums": static_argnums,
        "static_argnames": static_argnames,
        "donate_argnums": donated,
        "donate_argnames": tuple(name for name, info in info_kwargs.items() if _donated(info)),
    }
    eqn = _jit_equation(jitted, args, kwargs, static_argnums, static_argnames)
    if eqn is not None:
        settings["keep_unused"] = eqn.params["keep_unused"]
        if eqn.params["compiler_options_kvs"]:
            settings["compiler_options"] = dict(eqn.params["compiler_options_kvs"])
    return settings


def _replaced(args: tuple[Any, ...], i: int, value: Any) -> tuple[Any, ...]:
    return (*args[:i], value, *args[i + 1 :])


def _is_static(jitted: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """jit complains of an unhashable static argument with ValueError, of a foreign dynamic one with TypeError."""
    try:
        jitted.trace(*args, **kwargs)
    except ValueError:
        return True
    except TypeError:
        return False
    return False


def _donated(info: Any) -> bool:
    return any(leaf.donated for leaf in jax.tree.leaves(info, is_leaf=lambda x: hasattr(x, "donated")))


def _jit_equation(
    jitted: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    static: tuple[int, ...],
    names: tuple[str, ...],
) -> Any:
    """The jit equation that a call of the function is."""
    fixed = {name: kwargs[name] for name in names}
    given = {name: value for name, value in kwargs.items() if name not in names}
    jaxpr = jax.make_jaxpr(lambda *a, **k: jitted(*a, **k, **fixed), static_argnums=static)(*args, **given)
    return next((eqn for eqn in jaxpr.eqns if "keep_unused" in eqn.params), None)
