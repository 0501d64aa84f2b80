"""`Frozen`: a function under `auto_layout` some of whose arguments are given once and for all."""

from __future__ import annotations

import inspect
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxlayout.api.tuner import Tuner
from jaxlayout.api.wrapped import NOT_NESTED, forget, jit_settings, program_of
from jaxlayout.convs.elsewhere import known_elsewhere
from jaxlayout.convs.signature import Context
from jaxlayout.graph.plan import Plan
from jaxlayout.graph.shards import placement, placements, spans_processes
from jaxlayout.measure.compiled import with_options
from jaxlayout.measure.turns import NoTurn
from jaxlayout.report import Explanation
from jaxlayout.rewrite.fold import fold
from jaxlayout.rewrite.retrace import retrace
from jaxlayout.rewrite.split import Split, flattened
from jaxlayout.runtime._compat import (
    Surroundings,
    am_i_under_a_jit,
    consts_as_arguments,
    consts_of,
    eval_equations,
    is_array,
    surroundings,
)
from jaxlayout.runtime.nesting import inside
from jaxlayout.runtime.settings import is_plain
from jaxlayout.runtime.threads import Workers, device_of, is_real
from jaxlayout.tuning.first_run import FirstRun
from jaxlayout.tuning.outcome import Outcome, postponed
from jaxlayout.verify.accept import allowance


class Decorated(Protocol):
    """The function of all its arguments, under `auto_layout`: what a frozen one falls back on."""

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """A call."""
        ...

    def trace(self, /, *args: Any, **kwargs: Any) -> Any:
        """Traced."""
        ...

    def outcome(self, /, *args: Any, **kwargs: Any) -> Outcome:
        """What tuning came to."""
        ...

    def explain(self, /, *args: Any, **kwargs: Any) -> Explanation:
        """And why."""
        ...

    def freeze(self, /, *args: Any, **kwargs: Any) -> Frozen:
        """Frozen."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    """What has been made for arguments of some shapes."""

    run: Any
    """The jitted part that depends on the other arguments: what was kept, then their leaves."""
    kept: tuple[jax.Array, ...]
    outcome: Outcome
    first: FirstRun | None
    """The record of its first run, where that may take the process down."""
    explanation: Callable[[], Explanation]
    final: bool
    """Whether that serves later calls, too: not where there was no turn to measure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Traced:
    """A function traced for arguments of some shapes: a program of flat arguments, the frozen ones among them."""

    jaxpr: Any
    arrays: Sequence[Any]
    """The arguments; first what the function closes over."""
    frozen: Sequence[bool]
    """Which of them are."""
    closed_over: Sequence[Any]
    out_tree: Any
    shardings: Sequence[Any] | None
    """Of the arguments; None inside another transformation."""
    concrete: Sequence[Any] | None
    """The arguments where it may be run on them."""


class Frozen:
    """`auto_layout(f).freeze(...)`: called with the arguments that were not given there.

    For each new set of shapes of those the function is planned, and what depends on frozen arguments alone is computed,
    once; the arrays that come of it are arguments of the function that calls run, so the compiler sees no constants.
    Where they would take more memory than the limit allows nothing is prepared. Inside another transformation of JAX
    they are prepared just so, but each convolution stays one, with a convolution's derivative and batch. Where a frozen
    argument is being traced itself nothing is prepared.

    What is frozen is what it is now, in arrays of its own: the caller's may be changed or donated.
    """

    def __init__(self, layout: Decorated, tuner: Tuner, args: tuple[Any, ...], kwargs: dict[str, Any]):
        """TypeError and ValueError as of `AutoLayout.freeze`. `tuner`: of the function."""
        self._layout, self._tuner = layout, tuner
        self._jit_keywords = jit_settings(
            jax.jit(tuner.fun, **tuner.jit_keywords)
        )  # all there are, as jit understands them
        try:
            self._signature = inspect.signature(tuner.fun)
        except (TypeError, ValueError):  # of what is not written in Python
            self._signature = None
        self._count, self._keywords = len(args), frozenset(kwargs)
        self._refuse_options()
        if self._signature is not None:
            self._signature.bind_partial(*args, **kwargs)
        leaves, self._tree = jax.tree.flatten((args, kwargs))
        with Workers(1) as workers:  # where no trace is under way
            copies = workers.submit(lambda: {id(x): _copied(x) for x in leaves}).result()
        self._leaves = [copies[id(x)] for x in leaves]
        self._is_traced = any(isinstance(leaf, Tracer) for leaf in leaves)
        self._static: dict[Any, tuple[bool, ...]] = {}
        self._prepared: MutableMapping[Surroundings, dict[Any, _Prepared]] = WeakKeyDictionary()

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        found, rest = self._found(args, kwargs)
        if found is None:
            full, named = self._joined(args, kwargs)
            return self._layout(*full, **named)
        if found.first is None or not found.first.awaited:
            return found.run(found.kept, *rest)
        found.first.begin()
        try:
            out = jax.block_until_ready(found.run(found.kept, *rest))
            found.first.returned()
            return out
        finally:
            found.first.over()

    def __repr__(self) -> str:
        return f"{self._layout!r}.freeze(...)"

    def __reduce__(self) -> Any:
        return _again, (self._layout, *jax.tree.unflatten(self._tree, self._leaves))  # prepared anew elsewhere

    def trace(self, /, *args: Any, **kwargs: Any) -> Any:
        """As `jax.jit(f).trace`, of the part that each call runs. Arrays or `jax.ShapeDtypeStruct`."""
        found, rest = self._found(args, kwargs)
        if found is None:
            full, named = self._joined(args, kwargs)
            return self._layout.trace(*full, **named)
        return found.run.trace(found.kept, *rest)

    def lower(self, /, *args: Any, **kwargs: Any) -> Any:
        """As `jax.jit(f).lower`, of the part that each call runs. Arrays or `jax.ShapeDtypeStruct`."""
        return self.trace(*args, **kwargs).lower()

    def outcome(self, /, *args: Any, **kwargs: Any) -> Outcome:
        """The plan for these arguments, the verdict on it and where it came from."""
        found, _ = self._found(args, kwargs)
        if found is None:
            full, named = self._joined(args, kwargs)
            return self._layout.outcome(*full, **named)
        return found.outcome

    def plan(self, /, *args: Any, **kwargs: Any) -> Plan:
        """The plan for these arguments; given to `auto_layout` it fits the function frozen in the same way."""
        return self.outcome(*args, **kwargs).plan

    def explain(self, /, *args: Any, **kwargs: Any) -> Explanation:
        """As of `AutoLayout`: what was chosen for these arguments and why."""
        found, _ = self._found(args, kwargs)
        if found is None:
            full, named = self._joined(args, kwargs)
            return self._layout.explain(*full, **named)
        return found.explanation()

    def clear_cache(self) -> None:
        """Forget what was prepared and compiled. The plans stay in the table."""
        self._prepared.clear()
        forget(self._tuner.source)

    def _found(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[_Prepared | None, list[Any]]:
        """What is prepared for such arguments, made if need be, and their leaves; None where nothing can be."""
        leaves, tree = jax.tree.flatten((args, kwargs))
        if tree not in self._static:
            self._refuse_again(len(args), kwargs)
            self._static[tree] = self._marked("static", args, kwargs, self._count)
        static = self._static[tree]
        plain = is_plain() or self._tuner.options.policy == "off" or inside() == "tuning"
        if self._is_traced or plain:
            return None, []
        rest = [leaf for leaf, fixed in zip(leaves, static, strict=True) if not fixed]
        nested = am_i_under_a_jit()
        inside_another = nested or any(isinstance(leaf, Tracer) for leaf in rest)
        if inside_another:
            known_elsewhere()
        kinds = [
            (type(leaf), leaf) if fixed else (jax.typeof(leaf), placement(leaf))
            for leaf, fixed in zip(leaves, static, strict=True)
        ]
        prepared = self._prepared.setdefault(surroundings(), {})
        key = (tree, nested, inside_another, *kinds)
        if key not in prepared:
            made = self._prepare(args, kwargs, "nested" if nested else "entry", inside_another)
            if made is None:
                return None, []
            if not made.final:
                return made, rest
            prepared[key] = made
        return prepared[key], rest

    def _prepare(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], context: Context, inside_another: bool
    ) -> _Prepared | None:
        """Trace the function, plan it, and compute what is invariant. `inside_another`: called inside another
        transformation of JAX, for which convolutions stay convolutions.
        None where the function closes over values that are being traced."""
        traced = self._traced(args, kwargs, context)
        if traced is None:
            return None
        choose = context == "entry" and not inside_another
        program, outcome, final = self._planned(traced, context, choose)
        outcome, first = self._tuner.not_fatal(program, outcome) if choose else (outcome, None)
        split = self._split(traced, program, outcome, inside_another)

        def run(kept: Sequence[Any], *rest: Any) -> Any:
            return jax.tree.unflatten(traced.out_tree, split.run(*kept, *rest))

        run.__name__ = run.__qualname__ = self._tuner.name
        wanted = ("out_shardings", *(NOT_NESTED if context == "entry" else ()))
        keywords = {name: self._jit_keywords[name] for name in wanted if name in self._jit_keywords}
        if choose and outcome.plan.compiler_options:
            keywords["compiler_options"] = with_options(keywords.get("compiler_options"), outcome.plan.compiler_options)
        marks = (self._marked(what, args, kwargs, self._count) for what in ("donate", "static"))
        moving = (gone for gone, fixed in zip(*marks, strict=True) if not fixed)
        run = jax.jit(run, donate_argnums=[1 + i for i, gone in enumerate(moving) if gone], **keywords)
        seen = device_of(traced.concrete or ()), context, traced.frozen, traced.shardings
        explanation = partial(self._tuner.explained, program, outcome, *seen)
        with Workers(1, device_of(traced.arrays)) as workers:  # where no trace is under way
            kept = workers.submit(lambda: _kept(split, traced)).result()
        return _Prepared(run=run, kept=kept, outcome=outcome, first=first, explanation=explanation, final=final)

    def _traced(self, args: tuple[Any, ...], kwargs: dict[str, Any], context: Context) -> _Traced | None:
        """The function as a program of all its arguments; None where it closes over values that are being traced."""
        full, named = self._joined(args, kwargs)
        static = self._marked("static", full, named)
        places = [i for i, fixed in enumerate(static) if not fixed]
        own = tuple(i < self._count for i in range(len(full))), {name: name in self._keywords for name in named}
        held = jax.tree.leaves(jax.tree.broadcast(own, (full, named)))
        frozen = [held[i] for i in places]
        with self._tuner.as_one():
            source, arrays, out_tree = program_of(self._tuner.source, full, named, places)
        jaxpr = flattened(lambda *flat: eval_equations(source, flat), arrays)
        if outer := list(consts_of(jaxpr)):
            if any(isinstance(const, Tracer) for const in outer):
                return None
            jaxpr, arrays = consts_as_arguments(jaxpr, arrays), [*outer, *arrays]
            frozen = [True] * len(outer) + frozen
        inside_another = context == "nested" or any(isinstance(x, Tracer) for x in arrays)
        return _Traced(
            jaxpr=jaxpr,
            arrays=arrays,
            frozen=frozen,
            closed_over=outer,
            out_tree=out_tree,
            shardings=None if inside_another else placements(arrays, ()),
            concrete=arrays if not inside_another and all(map(is_real, arrays)) else None,
        )

    def _planned(self, traced: _Traced, context: Context, choose: bool) -> tuple[Any, Outcome, bool]:
        """The program that was planned, what tuning came to, and whether that is so for good. `choose`: whether
        compiler options may be."""
        jaxpr, tuned = traced.jaxpr, partial(self._tuner.tuned, choose_compiler_options=choose, frozen=traced.frozen)
        given = traced.concrete, traced.shardings, context
        # Folding rounds kernels anew: only where numbers are compared.
        judged = self._tuner.options.policy == "auto" and not spans_processes(traced.shardings or ())
        program = fold(jaxpr, traced.frozen, traced.arrays) if judged else jaxpr
        try:
            outcome = tuned(program, *given, original=jaxpr)
            if outcome.verdict.cause == "numbers" and program is not jaxpr:  # then without what rounds the kernels anew
                program, outcome = jaxpr, tuned(jaxpr, *given)
            return program, outcome, True
        except NoTurn as late:
            return program, postponed(self._tuner.name, late), False

    def _split(self, traced: _Traced, program: Any, outcome: Outcome, inside_another: bool) -> Split:
        """The program under its plan, in what is done once and the rest."""
        selector = self._tuner.selector_for(outcome) if inside_another else None  # for what is derived
        chosen = retrace(program if outcome.kept else traced.jaxpr, outcome.applied, selector)
        expanded = flattened(chosen, traced.arrays, expand=not inside_another)
        split = Split.of(expanded, traced.frozen)
        if outcome.kept and outcome.verdict.tuned_temp is not None:  # the verifier has seen what it needs
            return split
        given, kept = split.nbytes
        fits = kept - given <= allowance(given, self._tuner.options.memory_limit)
        return split if fits else Split.unprepared(expanded, traced.frozen)

    def _joined(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        held, named = jax.tree.unflatten(self._tree, self._leaves)
        return (*held, *args), named | kwargs

    def _marked(self, what: str, args: tuple[Any, ...], kwargs: dict[str, Any], before: int = 0) -> tuple[bool, ...]:
        """Of each leaf of some arguments, whether its jit has the argument as static, or to be
        donated. `before`: how many positional arguments stand before them."""
        count = before + len(args)
        numbers = {n % max(1, count) if n < 0 else n for n in self._jit_keywords[f"{what}_argnums"]}
        names = self._jit_keywords[f"{what}_argnames"]
        marks = tuple(before + i in numbers for i in range(len(args))), {name: name in names for name in kwargs}
        return tuple(jax.tree.leaves(jax.tree.broadcast(marks, (args, kwargs))))

    def _frozen_names(self) -> dict[str, None]:
        """The names of the frozen arguments, as far as the function's signature tells them."""
        return dict.fromkeys((*self._positional()[: self._count], *self._keywords))

    def _positional(self) -> list[str]:
        """The names of what can be given by position."""
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = () if self._signature is None else self._signature.parameters.values()
        return [parameter.name for parameter in parameters if parameter.kind in kinds]

    def _refuse_options(self) -> None:
        """What cannot be had together with freezing."""
        positional = self._positional()
        numbers = {n % len(positional) if n < 0 and positional else n for n in self._jit_keywords["donate_argnums"]}
        again = [name for name in self._keywords if name in self._jit_keywords["donate_argnames"]]
        again += [positional[n] if n < len(positional) else f"number {n}" for n in numbers if n in range(self._count)]
        if again:
            raise ValueError(f"freeze: argument {again[0]} is donated; frozen, it is needed again in every call")
        if "in_shardings" in self._jit_keywords:
            raise ValueError("freeze: of a function with in_shardings; put the arrays where they belong instead")

    def _refuse_again(self, count: int, kwargs: dict[str, Any]) -> None:
        """TypeError where a call gives what is frozen, or too much."""
        positional = self._positional()
        given = (*positional[self._count : self._count + count], *kwargs)
        if again := [name for name in self._frozen_names() if name in given]:
            raise TypeError(f"argument {again[0]} is frozen and cannot be given again")
        if self._signature is None:
            return
        kinds = [parameter.kind for parameter in self._signature.parameters.values()]
        left = len(positional) - self._count
        if inspect.Parameter.VAR_POSITIONAL not in kinds and count > left:
            raise TypeError(f"{count} positional arguments given, {max(0, left)} expected: {self._count} are frozen")


def _again(layout: Decorated, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Frozen:
    """One that has been pickled."""
    return layout.freeze(*args, **kwargs)


def _kept(split: Split, traced: _Traced) -> tuple[jax.Array, ...]:
    """What is computed once, in arrays that nobody else holds."""
    own, _ = split.sides(traced.arrays)
    is_made = [isinstance(x, jax.Array) or not is_array(jax.typeof(x)) for x in own]  # or a reference
    kept = split.prepare([x if made else jnp.asarray(x) for x, made in zip(own, is_made, strict=True)])
    closed_over = {id(x) for x in traced.closed_over}
    return tuple(_copied(x) if id(x) in closed_over else x for x in kept)


def _copied(x: Any) -> Any:
    """An array that nobody else can change, donate or delete, in the place of one."""
    if isinstance(x, np.ndarray):
        return x.copy()
    if isinstance(x, Tracer) or not isinstance(x, jax.Array):
        return x
    return jax.device_put(x, x.sharding if x.committed else None, may_alias=False)
