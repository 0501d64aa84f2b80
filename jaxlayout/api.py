"""`auto_layout`: the decorator, the one place that runs the whole line of stages.

The wrapper is `jax.jit` of a body that traces the user's function, tunes it (in a thread of its own, where the
tracing under way cannot reach) and evaluates it under the plan. A warm call is a jit call.
"""

from __future__ import annotations

import functools
import inspect
import threading
import types
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import fields
from typing import Any, overload

import jax
import numpy as np

from jaxlayout._compat import am_i_under_a_jit, eval_equations
from jaxlayout.convs.signature import Context
from jaxlayout.graph.plan import Plan
from jaxlayout.options import Options
from jaxlayout.progress import progress_bar
from jaxlayout.report import Explanation, explain
from jaxlayout.retrace import retrace
from jaxlayout.tune import Outcome, tune
from jaxlayout.wrapped import jit_settings

_JIT_KEYWORDS = tuple(inspect.signature(jax.jit).parameters)[1:]
_OPTIONS = tuple(field.name for field in fields(Options))
_NOT_NESTED = ("compiler_options", "device", "backend")
"""What jit refuses, or ignores, inside another jit."""


@overload
def auto_layout(fun: Callable[..., Any], /, *, plan: Plan | None = None, **keywords: Any) -> AutoLayout: ...
@overload
def auto_layout(*, plan: Plan | None = None, **keywords: Any) -> Callable[[Callable[..., Any]], AutoLayout]: ...
def auto_layout(fun: Any = None, /, *, plan: Plan | None = None, **keywords: Any) -> Any:
    """Compile a function with `jax.jit`, its convolutions in the layouts and forms that are fastest here.

    The first call with arguments of new shapes tunes the function: measures what the cost table does not know,
    plans, compares the rewritten function with the original in numbers, memory and time, and keeps the better.

    Args:
      fun: a function, or one already compiled by `jax.jit`, which keeps what jit was told.
      plan: a plan made elsewhere (see `AutoLayout.plan`, `Plan.load`), used without measuring or judging.
      keywords: any keyword of `jax.jit`, and any field of `Options`.

    Raises:
      TypeError: for an unknown keyword, and for a jit keyword over a function that is jitted already.
      ValueError: for an option out of its range.
    """
    unknown = [name for name in keywords if name not in (*_JIT_KEYWORDS, *_OPTIONS)]
    if unknown:
        raise TypeError(
            f"auto_layout: unknown keyword {', '.join(unknown)}; it takes plan, the options "
            f"{', '.join(_OPTIONS)}, and the keywords of jax.jit: {', '.join(_JIT_KEYWORDS)}"
        )
    if fun is None:
        return functools.partial(auto_layout, plan=plan, **keywords)
    options = Options.from_environment(**{k: v for k, v in keywords.items() if k in _OPTIONS})
    return AutoLayout(fun, options, plan, {k: v for k, v in keywords.items() if k in _JIT_KEYWORDS})


class AutoLayout:
    """A function under `auto_layout`. Called like the function that it wraps."""

    def __init__(self, fun: Callable[..., Any], options: Options, plan: Plan | None, jit: dict[str, Any]):
        if isinstance(fun, AutoLayout):
            fun = fun.__wrapped__
        self.options = options
        self._plan = plan
        self._jit = jit
        self._concrete = threading.local()
        self._jitted_already = isinstance(fun, jax.stages.Wrapped)
        if self._jitted_already and jit:
            raise TypeError(f"auto_layout: give {', '.join(jit)} to the jax.jit that is inside")
        functools.update_wrapper(self, fun)
        self.__wrapped__ = fun
        self._fronts: dict[Any, tuple[Any, Any]] = {}
        self._entry, self._nested = (None, None) if self._jitted_already else self._front(jit)

    def _front(self, jit: dict[str, Any]) -> tuple[Any, Any]:
        """The jits of the body, as outermost computation and inside another."""
        inner = {name: value for name, value in jit.items() if name not in _NOT_NESTED}
        return jax.jit(self._body("entry"), **jit), jax.jit(self._body("nested"), **inner)

    def _fronts_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if self._entry is not None:
            return self._entry, self._nested
        shape = (len(args), *kwargs)
        if shape not in self._fronts:
            self._fronts[shape] = self._front(jit_settings(self.__wrapped__, args, kwargs))
        return self._fronts[shape]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        entry, nested = self._fronts_for(args, kwargs)
        if am_i_under_a_jit():
            return nested(*args, **kwargs)
        self._concrete.args = args, kwargs  # for the body, which runs only where this shape is new
        try:
            return entry(*args, **kwargs)
        finally:
            self._concrete.args = None

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)

    def __repr__(self) -> str:
        return f"auto_layout({self.__wrapped__!r})"

    def trace(self, *args: Any, **kwargs: Any) -> Any:
        """As `jax.jit(f).trace`: the tuned function, traced. Arrays or `jax.ShapeDtypeStruct`."""
        return self._fronts_for(args, kwargs)[0].trace(*args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """As `jax.jit(f).lower`: the tuned function, lowered."""
        return self._fronts_for(args, kwargs)[0].lower(*args, **kwargs)

    def outcome(self, *args: Any, **kwargs: Any) -> Outcome:
        """The plan for these arguments, the verdict on it and where it came from, tuning if need be."""
        return self._looked_at(args, kwargs)[1]

    def plan(self, *args: Any, **kwargs: Any) -> Plan:
        """The plan for these arguments, to be shown, saved, loaded and pinned."""
        return self.outcome(*args, **kwargs).plan

    def explain(self, *args: Any, **kwargs: Any) -> Explanation:
        """What was chosen for these arguments and why; print it."""
        jaxpr, outcome = self._looked_at(args, kwargs)
        return explain(jaxpr, outcome, self.options)

    def _looked_at(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Outcome]:
        """Run the body once more (its plan is in the table by now, or gets there) and look at its outcome."""
        seen: list[tuple[Any, Outcome]] = []
        jit = jit_settings(self.__wrapped__, args, kwargs) if self._jitted_already else self._jit
        if not any(isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct) for x in jax.tree.leaves((args, kwargs))):
            self._concrete.args = args, kwargs
        try:
            jax.jit(self._body("entry", seen.append), **jit).trace(*args, **kwargs)
        finally:
            self._concrete.args = None
        return seen[0]

    def _body(self, context: Context, seen: Callable[[Any], None] | None = None) -> Callable[..., Any]:
        fun = self.__wrapped__

        @functools.wraps(fun)
        def body(*args: Any, **kwargs: Any) -> Any:
            leaves, tree = jax.tree.flatten((args, kwargs))
            places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.core.Tracer)]
            if jax.config.jax_disable_jit:
                return fun(*args, **kwargs)

            def flat(*dynamic: Any) -> Any:
                full = list(leaves)
                for i, leaf in zip(places, dynamic, strict=True):
                    full[i] = leaf
                args, kwargs = jax.tree.unflatten(tree, full)
                return fun(*args, **kwargs)

            arrays = [leaves[i] for i in places]
            jaxpr, shapes = jax.make_jaxpr(flat, return_shape=True)(*arrays)
            outcome = self._tuned(jaxpr, self._concrete_leaves(arrays), context)
            if seen is not None:
                seen((jaxpr, outcome))
            if outcome.kept:
                outs = retrace(jaxpr, outcome.plan)(*arrays)
            else:
                outs = eval_equations(jaxpr, arrays, lambda eqn, operands: None)
            return jax.tree.unflatten(jax.tree.structure(shapes), outs)

        return body

    def _concrete_leaves(self, arrays: Sequence[Any]) -> list[Any] | None:
        """The arguments of the call under way as arrays, where it has real ones (not under grad, vmap, lower)."""
        if getattr(self._concrete, "args", None) is None:
            return None
        leaves = jax.tree.leaves(self._concrete.args)
        dynamic = iter(arrays)
        found, wanted = [], next(dynamic, None)
        for leaf in leaves:  # static leaves stand between the dynamic ones
            if wanted is None:
                break
            if isinstance(leaf, jax.core.Tracer):
                return None
            if np.shape(leaf) == wanted.shape and isinstance(leaf, jax.Array | np.ndarray | np.generic | int | float):
                keys = jax.dtypes.issubdtype(wanted.dtype, jax.dtypes.prng_key)
                found.append(leaf if keys else jax.numpy.asarray(leaf, wanted.dtype))
                wanted = next(dynamic, None)
        return found if wanted is None else None

    def _tuned(self, jaxpr: Any, args: Sequence[Any] | None, context: Context) -> Outcome:
        """Tune in a worker thread, where no trace is under way; the caller's thread-local settings go along."""
        stop = threading.Event()
        name = getattr(self.__wrapped__, "__name__", "function")
        settings = _thread_settings()

        def work() -> Outcome:
            with ExitStack() as stack, progress_bar(name) as progress:
                for setting in settings:
                    stack.enter_context(setting)
                return tune(
                    jaxpr,
                    args,
                    self.options,
                    context=context,
                    pinned=self._plan,
                    progress=progress,
                    stop=stop,
                )

        with ThreadPoolExecutor(1, thread_name_prefix="jaxlayout") as pool:
            future = pool.submit(work)
            try:
                return future.result()
            except KeyboardInterrupt:
                stop.set()  # what has been measured is in the table: the next call goes on from there
                raise


def _thread_settings() -> list[Any]:
    """What the caller's thread has set, as contexts for another; and what must not disturb measuring."""
    config = jax.config
    return [
        jax.default_matmul_precision(config.jax_default_matmul_precision),
        jax.default_device(config.jax_default_device),
        jax.enable_x64(config.jax_enable_x64),
        jax.debug_nans(False),
    ]
