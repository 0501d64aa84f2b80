"""Everything that differs between jax 0.10 and 0.12, and the little of JAX's machinery that is public but raw."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any

import jax
import jax.extend.core as jex_core
from jax.api_util import debug_info
from jax.core import ShapedArray
from jax.extend import linear_util, source_info_util
from jax.extend.core import Literal

Bind = Callable[[Any, Sequence[Any]], Sequence[Any] | None]
"""`bind(eqn, operands)` gives an equation's results, or None for the default: to bind its primitive."""

am_i_under_a_jit: Callable[[], bool] = jex_core.unsafe_am_i_under_a_jit_DO_NOT_USE  # pyright: ignore[reportPrivateImportUsage]

BARRIERS_STAY = jax.__version_info__ >= (0, 11)
"""Whether an optimization barrier is there until XLA:CPU fuses (in jaxlib 0.10 it goes before that)."""

_CROSSING = "it reads past lhs in convolutions whose padding cuts before an axis and adds after it (xla issue 48713)"
KNOWN_BAD = {
    "0.10.2": "it miscompiles some programs through YNNPACK, and crashes on others (jax issues 39103, 39257, 40412); "
    + _CROSSING,
    "0.11.0": "it crashes or hangs on some reductions of arrays with seven axes or more (jax issue 39257)",
    "0.11.2": _CROSSING,
}
"""Versions of jaxlib whose CPU backend is known to go wrong, and how: from issues, and what has been seen here."""


class Surroundings:
    """All that JAX's own caches of traced functions go by, beside the function and its arguments: settings, mesh, named
    axes, the user's contexts. Equal ones are one object, which JAX lets go of with its caches (`jax.clear_caches`)."""


def surroundings() -> Surroundings:
    """Those of this thread as things stand."""
    return _surroundings(_always_the_same)


@linear_util.cache
def _surroundings(function: Any) -> Surroundings:
    return Surroundings()


_always_the_same = linear_util.wrap_init(surroundings, debug_info=debug_info("surroundings", surroundings, (), {}))


with ThreadPoolExecutor(1) as _thread:  # this module may be imported while something is traced
    _top_level = _thread.submit(jex_core.get_opaque_trace_state).result()


def at_top_level() -> bool:
    """Whether no transformation of JAX is under way in this thread."""
    return jex_core.get_opaque_trace_state() == _top_level


def open_jaxpr(jaxpr: Any) -> Any:
    """The equations of a jaxpr, closed or not (from 0.12 on there is one class for both)."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def rank_of(atom: Any) -> int:
    """How many axes a variable or literal of a jaxpr has; none where it is no array (a token)."""
    return len(getattr(atom.aval, "shape", ()))


def reordered(aval: Any, order: Sequence[int]) -> Any:
    """The type of an array whose axes have been moved. (Made anew of a shape and a dtype it would lack the rest.)"""
    if list(order) == list(range(len(order))):
        return aval
    spec = (*aval.sharding.spec, *(None,) * (len(order) - len(aval.sharding.spec)))
    spec = aval.sharding.spec.update(partitions=tuple(spec[axis] for axis in order))
    return aval.update(shape=tuple(aval.shape[axis] for axis in order), sharding=aval.sharding.update(spec=spec))


def is_array(aval: Any) -> bool:
    """Whether a type in a jaxpr is that of an array, and not of a reference to one, or of a token."""
    return isinstance(aval, ShapedArray)


def consts_of(jaxpr: Any) -> Sequence[Any]:
    """The constants that go with `open_jaxpr(jaxpr).constvars`."""
    return getattr(jaxpr, "consts", ())


def divides(ctx: Any) -> bool:
    """Whether XLA cuts what is being lowered in this context into pieces for several devices, as it sees fit."""
    place = ctx.module_context.axis_context
    if (mesh := getattr(place, "mesh", None)) is None:
        return getattr(place, "num_devices", None) != 1
    return any(size > 1 for name, size in mesh.shape.items() if name not in place.manual_axes)


@contextmanager
def equation_scope(eqn: Any) -> Iterator[None]:
    """The contexts an equation was made in: mesh, name scopes and source line, for what is bound inside."""
    name_stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
    with source_info_util.user_context(eqn.source_info.traceback, name_stack=name_stack), eqn.ctx.manager:
        yield


def bind_equation(eqn: Any, operands: Sequence[Any], **changed: Any) -> list[Any]:
    """Bind an equation's primitive on other operands, with some of its parameters changed."""
    params = eqn.params | changed if changed else eqn.params
    out = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(params))
    return list(out) if eqn.primitive.multiple_results else [out]


def _default(eqn: Any, operands: Sequence[Any]) -> None:
    return None


def eval_equations(
    jaxpr: Any, args: Sequence[Any], bind: Bind = _default, *, consts: Sequence[Any] | None = None
) -> list[Any]:
    """Evaluate a jaxpr equation by equation. `consts`: in place of its own."""
    jaxpr_, env = open_jaxpr(jaxpr), {}
    env.update(zip(jaxpr_.constvars, consts_of(jaxpr) if consts is None else consts, strict=True))
    env.update(zip(jaxpr_.invars, args, strict=True))
    run_equations(jaxpr_.eqns, env, bind)
    return [atom.val if isinstance(atom, Literal) else env[atom] for atom in jaxpr_.outvars]


def run_equations(eqns: Sequence[Any], env: dict[Any, Any], bind: Bind = _default) -> None:
    """Evaluate equations in sequence, from and into the values of variables in `env`."""
    for eqn in eqns:
        operands = [atom.val if isinstance(atom, Literal) else env[atom] for atom in eqn.invars]
        with equation_scope(eqn):
            results = bind(eqn, operands)
            if results is None:
                results = bind_equation(eqn, operands)
        env.update(zip(eqn.outvars, results, strict=True))


def consts_as_arguments(jaxpr: Any, args: Sequence[Any]) -> Any:
    """The same program, equation by equation, with its constants as leading arguments."""
    consts = consts_of(jaxpr)

    def run(*flat: Any) -> list[Any]:
        return eval_equations(jaxpr, flat[len(consts) :], consts=flat[: len(consts)])

    return jax.make_jaxpr(run)(*consts, *args)


@cache
def unspecified_sharding() -> Any:
    """What a `jit` equation has in place of a sharding where the user gave none."""
    with jax.disable_jit(False), jax.no_tracing(False):
        return jax.make_jaxpr(jax.jit(lambda x: x))(0.0).eqns[0].params["in_shardings"][0]


def jit_info(jitted: Any) -> Any:
    """All the keywords that `jax.jit` had for a function that it has compiled. No public call gives the compiler
    options (they are refused in any nested trace), so this reads an attribute; TypeError where it is gone."""
    info = getattr(jitted, "_jit_info", None)
    if info is None:
        raise TypeError(
            f"jax {jax.__version__} does not tell what jax.jit was told: "
            "decorate the function itself, and give the keywords to auto_layout"
        )
    return info
