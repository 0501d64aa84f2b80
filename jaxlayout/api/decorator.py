"""`auto_layout`: the decorator, which runs the whole line of stages behind `jax.jit`.

The wrapper is `jax.jit` of a body that traces the user's function, tunes it (in a thread of its own, where the
tracing under way cannot reach) and evaluates it under the plan. A warm call is a jit call.
"""

from __future__ import annotations

import functools
import inspect
import logging
import threading
import types
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from typing import Any, Unpack, overload

import jax
from jax.core import Tracer

from jaxlayout.api.frozen import Frozen
from jaxlayout.api.keywords import Keywords
from jaxlayout.api.tuner import Tuner
from jaxlayout.api.wrapped import (
    NOT_NESTED,
    StandIn,
    forget,
    is_jitted,
    jit_settings,
    program_of,
    stated_shardings,
    take_after,
)
from jaxlayout.convs.elsewhere import known_elsewhere
from jaxlayout.convs.signature import Context
from jaxlayout.graph.plan import Plan
from jaxlayout.graph.shards import placement, placements
from jaxlayout.measure.compiled import with_options
from jaxlayout.measure.turns import NoTurn
from jaxlayout.report import Explanation
from jaxlayout.rewrite.retrace import retrace
from jaxlayout.runtime._compat import (
    am_i_under_a_jit,
    at_top_level,
    consts_as_arguments,
    consts_of,
    eval_equations,
)
from jaxlayout.runtime.settings import is_plain
from jaxlayout.runtime.threads import device_of, is_real, one_device
from jaxlayout.tuning.first_run import FirstRun
from jaxlayout.tuning.options import Options
from jaxlayout.tuning.outcome import Outcome, postponed

logger = logging.getLogger("jaxlayout")

_JIT_KEYWORDS = tuple(inspect.signature(jax.jit).parameters)[1:]
_OPTIONS = tuple(field.name for field in fields(Options))


@overload
def auto_layout(
    fun: Callable[..., Any], /, *, plan: Plan | None = None, **keywords: Unpack[Keywords]
) -> AutoLayout: ...
@overload
def auto_layout(
    *, plan: Plan | None = None, **keywords: Unpack[Keywords]
) -> Callable[[Callable[..., Any]], AutoLayout]: ...
def auto_layout(fun: Any = None, /, *, plan: Plan | None = None, **keywords: Any) -> Any:
    """Compile a function with `jax.jit`, its convolutions in the layouts and forms that are fastest here.

    The first call with arguments of new shapes tunes the function: measures what the cost table does not know,
    plans, compares the rewritten function with the original in numbers, memory and time, and keeps the better.

    That is `policy='auto'`. Under 'channels_last' every convolution is put channels last, through XLA and without any
    measuring or comparing: cheap, alike on every machine, and not guaranteed to be no slower than what was written. A
    program with more than 100 other equations for each convolution is left alone. Under 'off' the function is compiled
    as it is.

    Args:
      fun: a function, or one already compiled by `jax.jit` or `auto_layout`, which keeps its keywords.
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
    if not callable(fun):
        raise TypeError(f"auto_layout: {fun!r} is not a function")
    given = {k: v for k, v in keywords.items() if k in _OPTIONS}
    jit = {k: v for k, v in keywords.items() if k in _JIT_KEYWORDS}
    if jit and (isinstance(fun, AutoLayout) or is_jitted(fun)):
        raise TypeError(f"auto_layout: {fun!r} is jitted already; give {', '.join(jit)} to the jit that is inside")
    if isinstance(fun, AutoLayout):
        return AutoLayout(fun.__wrapped__, replace(fun.options, **given), plan or fun.pinned, fun.jit)
    return AutoLayout(fun, Options.from_environment(**given), plan, jit)


_Look = tuple[Any, Outcome, Sequence[Any] | None, Sequence[Any] | None]
"""A program, its outcome, the arguments where they are real, and their shardings."""


@dataclass(slots=True)
class _Call:
    """A call, to be entered for as long as it is under way: the body sees it where the shapes are new. It cannot be
    handed over, as jit calls the body."""

    calls: threading.local
    """Where the body looks for it."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    executor: Executor | None = None
    run: bool = True
    """Whether the arguments are for the verifier, and the function runs."""
    first: FirstRun | None = None
    """The record of its first run, where that may take the process down."""
    outer: _Call | None = field(init=False)
    """The one that this one is made in."""

    def __enter__(self) -> _Call:
        self.outer = getattr(self.calls, "under_way", None)
        self.calls.under_way = self
        return self

    def __exit__(self, *exception: object) -> None:
        if self.first is not None:
            self.first.over()
        self.calls.under_way = self.outer

    def given(self, tree: Any, places: Sequence[int]) -> list[Any] | None:
        """The leaves at some places of the arguments, arrays or mere shapes; None where it is of another structure, or
        some are traced (under grad and vmap)."""
        leaves, found_tree = jax.tree.flatten((self.args, self.kwargs))
        if found_tree != tree:
            return None
        found = [leaves[i] for i in places]
        return None if any(isinstance(x, Tracer) for x in found) else found


class AutoLayout:
    """A function under `auto_layout`. Called like the function that it wraps."""

    def __init__(self, fun: Callable[..., Any], options: Options, pinned: Plan | None, jit: dict[str, Any]):
        bare, jit_keywords = (fun.__wrapped__, jit_settings(fun)) if is_jitted(fun) else (fun, jit)
        weakref.ref(bare)  # so JAX knows functions; of one that cannot be known so it takes the process down
        theirs = getattr(bare, "__dict__", {}).items()  # first: what is ours wins
        self.__dict__.update({name: value for name, value in theirs if not hasattr(AutoLayout, name)})
        self._tuner = Tuner(bare, jit_keywords, options, pinned)
        take_after(self, self._tuner.source)
        self.__wrapped__: Callable[..., Any] = fun
        self.options: Options = options
        """How it is tuned."""
        self.pinned: Plan | None = pinned
        """The plan that it was given, for all calls."""
        self.jit: dict[str, Any] = jit
        """The keywords of `jax.jit` that it was given."""
        self._calls = threading.local()
        """Has the call under way in each thread, as `under_way`."""
        self._compile_with(None if pinned is None or options.policy == "off" else pinned.compiler_options)
        self._traced: Any = jax.jit(self._body("entry"), **jit_keywords)
        """Calls that are traced by another transformation: grad, vmap."""
        self._nested: Any = jax.jit(
            self._body("nested"), **{k: v for k, v in jit_keywords.items() if k not in NOT_NESTED}
        )
        """Calls inside another jit."""
        self._plain: Any = jax.jit(bare, **jit_keywords)
        """Calls that there was no turn to tune for."""

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        if not at_top_level():
            known_elsewhere()
            return (self._nested if am_i_under_a_jit() else self._traced)(*args, **kwargs)
        with _Call(self._calls, args, kwargs) as call:
            out = self._decided(lambda jitted: jitted(*args, **kwargs), args, kwargs)
            if call.first is not None:
                jax.block_until_ready(out)
                call.first.returned()
            return out

    def _entry_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What such a call runs. JAX traces anew for other shapes, not for arrays that lie otherwise among devices."""
        if one_device():
            return self._entry
        key = tuple(map(placement, jax.tree.leaves((args, kwargs))))
        if not any(key):
            return self._entry
        if key not in self._placed:
            self._placed[key] = self._jitted()
        return self._placed[key]

    def _compile_with(self, options: Mapping[str, str] | None) -> None:
        """Make what calls run, with some compiler options beside the user's (None: not decided yet).

        One jit serves all shapes, for the sake of its fast calls. So the first program that is planned decides, and one
        that would rather do without decides against them for good.
        """
        self._extra_options = options
        self._entry: Any = self._jitted()
        self._placed: dict[Any, Any] = {}  # others, by the placements of the arguments

    def _jitted(self) -> Any:
        jit_keywords = dict(self._tuner.jit_keywords)
        if self._extra_options:
            given = jit_keywords.get("compiler_options")
            jit_keywords["compiler_options"] = with_options(given, self._extra_options)
        return jax.jit(self._body("entry", decides=True), **jit_keywords)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)

    def __copy__(self) -> AutoLayout:
        return self

    def __deepcopy__(self, memo: Any) -> AutoLayout:
        return self  # as a function is

    def __reduce__(self) -> Any:
        tuner, is_jit = self._tuner, is_jitted(self.__wrapped__)  # which loses its keywords where it is pickled
        return _again, (tuner.fun, tuner.jit_keywords if is_jit else None, self.options, self.pinned, self.jit)

    def __repr__(self) -> str:
        return f"auto_layout({self.__wrapped__!r})"

    def freeze(self, /, *args: Any, **kwargs: Any) -> Frozen:
        """The function of the rest of its arguments. What depends on those given here alone (a network's weights, in
        inference) is computed once, when the shapes of the rest are first seen: converted and packed kernels, a batch
        normalisation's scale and shift, folded into the kernel before it. The arguments are copied: what becomes of the
        caller's own, donated ones too, does not matter any more.

        Raises:
          TypeError: for arguments that the function does not take, and, when called, for a frozen one given again.
          ValueError: for a donated argument, and where the function was given `in_shardings`.
        """
        return Frozen(self, self._tuner, args, kwargs)

    def trace(self, /, *args: Any, **kwargs: Any) -> Any:
        """As `jax.jit(f).trace`: the tuned function, traced. Arrays or `jax.ShapeDtypeStruct`."""
        with _Call(self._calls, args, kwargs, run=False):
            return self._decided(lambda jitted: jitted.trace(*args, **kwargs), args, kwargs)

    def lower(self, /, *args: Any, **kwargs: Any) -> Any:
        """As `jax.jit(f).lower`: the tuned function, lowered."""
        with _Call(self._calls, args, kwargs, run=False):
            return self._decided(lambda jitted: jitted.lower(*args, **kwargs), args, kwargs)

    def _decided(self, run: Callable[[Any], Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `run` gives of the jit for such a call, once the compiler options are settled; of plain `jax.jit` where
        there was no turn to measure."""
        while True:
            try:
                return run(self._entry_for(args, kwargs))
            except _CompileWith as wanted:
                self._compile_with(wanted.options)
            except NoTurn as late:
                postponed(self._tuner.name, late)
                with self._tuner.as_one():  # as it has been traced
                    return run(self._plain)

    def eval_shape(self, /, *args: Any, **kwargs: Any) -> Any:
        """As `jax.jit(f).eval_shape`: the shapes of the results, without tuning."""
        with self._tuner.as_one():
            return type(self._plain).eval_shape(self._plain, *args, **kwargs)

    def clear_cache(self) -> None:
        """As `jax.jit(f).clear_cache`: forget what was compiled. The plans stay in the table."""
        every = (self._entry, *self._placed.values(), self._traced, self._nested, self._plain, self._tuner.source)
        for jitted in every:
            forget(jitted)

    def outcome(self, /, *args: Any, **kwargs: Any) -> Outcome:
        """The plan for these arguments, the verdict on it and where it came from, tuning if need be."""
        return self._looked_at(args, kwargs)[1]

    def plan(self, /, *args: Any, **kwargs: Any) -> Plan:
        """The plan for these arguments, to be shown, saved, loaded and pinned."""
        return self.outcome(*args, **kwargs).plan

    def explain(self, /, *args: Any, **kwargs: Any) -> Explanation:
        """What was chosen for these arguments and why: a value that a terminal shows as tables and a notebook as HTML,
        with `to_json` and plots."""
        jaxpr, outcome, arrays, shardings = self._looked_at(args, kwargs)
        return self._tuner.explained(jaxpr, outcome, device_of(arrays or ()), shardings=shardings)

    def _looked_at(self, args: tuple[Any, ...], kwargs: dict[str, Any], executor: Executor | None = None) -> _Look:
        """Run the body once more (its plan is in the table by now, or gets there) and look at what comes of it."""
        seen: list[_Look] = []
        with _Call(self._calls, args, kwargs, executor), jax.disable_jit(False):
            jax.jit(self._body("entry", seen.append), **self._tuner.jit_keywords).trace(*args, **kwargs)
        return seen[0]

    def _body(
        self, context: Context, look: Callable[[_Look], None] | None = None, *, decides: bool = False
    ) -> Callable[..., Any]:
        """What is jitted: the user's function traced, tuned, and evaluated under its plan. `decides`: the plan may want
        compiler options, and `_CompileWith` is raised where they are not those of this jit. `look`: called with what
        came of it. It is only looked at then: as a program by itself wherever it is called, and never run."""
        tuner = self._tuner
        fun = tuner.fun

        def body(*args: Any, **kwargs: Any) -> Any:
            if is_plain() or not am_i_under_a_jit():  # to be stepped through, searched for a NaN
                return fun(*args, **kwargs)
            leaves, tree = jax.tree.flatten((args, kwargs))
            places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tracer)]
            part = look is None and tuner.is_part()
            with nullcontext() if part else tuner.as_one():
                jaxpr, arrays, out_tree = program_of(tuner.source, args, kwargs, places)
            if part:
                return jax.tree.unflatten(out_tree, eval_equations(jaxpr, arrays))
            call: _Call | None = getattr(self._calls, "under_way", None) if context == "entry" else None
            given = None if call is None else call.given(tree, places)
            shardings = None
            if given is not None:
                shardings = placements(given, stated_shardings(fun, tuner.jit_keywords, args, kwargs))
            real = call is not None and given is not None and call.run and all(map(is_real, given))
            concrete = given if real else None
            if any(isinstance(const, Tracer) for const in consts_of(jaxpr)):
                # The function closes over values of an outer trace, which is none of the tuning thread's business.
                outer = consts_of(jaxpr)
                jaxpr, arrays = consts_as_arguments(jaxpr, arrays), [*outer, *arrays]
                concrete = shardings = None
            choose = (decides or look is not None) and self._extra_options != {}
            try:
                executor = None if call is None else call.executor
                outcome = tuner.tuned(
                    jaxpr, concrete, shardings, context, choose_compiler_options=choose, executor=executor
                )
            except NoTurn as late:
                if decides:
                    raise
                outcome = postponed(tuner.name, late)
            if decides and outcome.plan.compiler_options != (self._extra_options or {}):
                raise _CompileWith(outcome.plan.compiler_options if self._extra_options is None else {})
            if decides or look is not None:
                outcome, first = tuner.not_fatal(jaxpr, outcome)
                if first is not None and look is None and call is not None and call.run:
                    first.begin()
                    call.first = first
            if look is not None:
                look((jaxpr, outcome, concrete, shardings))
            selector = None if decides else tuner.selector_for(outcome)  # under a transformation others may be derived
            return jax.tree.unflatten(out_tree, retrace(jaxpr, outcome.applied, selector)(*arrays))

        return fun if look is None and self.options.policy == "off" else StandIn(body, tuner.source)


def tune(fun: Callable[..., Any], /, *args: Any, executor: Executor | None = None, **kwargs: Any) -> Outcome:
    """Tune a function for some arguments, arrays or `jax.ShapeDtypeStruct`, ahead of its first call.

    Args:
      fun: a function, or one under `auto_layout`, which keeps its options.
      executor: any `concurrent.futures.Executor` whose workers can import jaxlayout: a process pool, Dask's
        `client.get_executor()`. Convolutions and conversions are measured there, one job each; those of workers whose
        environment differs from this one are refused, and what is lost twice is measured here. Whole functions are
        compared here.
      args: those of the function.
      kwargs: those of the function by keyword.
    """
    tuned = fun if isinstance(fun, AutoLayout) else auto_layout(fun)
    return tuned._looked_at(args, kwargs, executor)[1]


def _again(
    fun: Callable[..., Any],
    jit_keywords: dict[str, Any] | None,
    options: Options,
    pinned: Plan | None,
    jit: dict[str, Any],
) -> AutoLayout:
    """A function under `auto_layout` that has been pickled. `jit_keywords`: of its jit, where it was jitted already."""
    return AutoLayout(fun if jit_keywords is None else jax.jit(fun, **jit_keywords), options, pinned, jit)


class _CompileWith(Exception):
    """Leaves a trace that is under way in a jit with other compiler options."""

    def __init__(self, options: Mapping[str, str]):
        super().__init__(options)
        self.options = options
