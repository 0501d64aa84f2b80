"""`Verifier`: the program under a plan held against the original, both as a whole."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import jax

from jaxlayout.graph.plan import Plan
from jaxlayout.graph.program import needs_real_arguments
from jaxlayout.measure.compiled import Compiled, CompilerOptions, compile_in
from jaxlayout.measure.marker import Marker
from jaxlayout.measure.turns import Turns
from jaxlayout.rewrite.retrace import retrace
from jaxlayout.rewrite.split import Split, flattened
from jaxlayout.runtime._compat import eval_equations
from jaxlayout.runtime.threads import Workers
from jaxlayout.tuning.request import TuningRequest
from jaxlayout.verify.accept import Verdict, accept, draws, liveliest
from jaxlayout.verify.accuracy import Accuracy, accuracies


class Verifier:
    """Compiles and runs the original of a request once, and each program that it is held against."""

    def __init__(self, request: TuningRequest, compiler_options: CompilerOptions, turns: Turns, marker: Marker):
        """`compiler_options`: of the programs under a plan; the original has the user's. `turns`: how it
        stands in line to time. `marker`: is there while a program under a plan is tried for the first time."""
        self.request, self.compiler_options, self.turns, self.marker = request, compiler_options, turns, marker
        self.best: tuple[Compiled, float] | None = None
        """The program that was kept, and how many times faster than the original it is."""
        self.rival: tuple[Compiled, float] | None = None
        """Such a one of another verifier: to be kept is to be faster than that."""

    def under(self, compiler_options: CompilerOptions) -> Verifier:
        """One for programs with other compiler options, which are raced against what was kept by this one."""
        other = Verifier(self.request, compiler_options, self.turns, self.marker)
        other.original, other.trial_arguments, other.rival = self.original, self.trial_arguments, self.best
        return other

    def verdict(self, plan: Plan, *, all_measured: bool) -> Verdict:
        """Rewritten against original. `all_measured`: whether all that the plan may have chosen has been measured."""
        request, unfit = self.request, self.request.not_to_be_run
        if plan.trivial and not request.folded:
            return Verdict(kept=False, reason="nothing is to be gained", cause="untried")
        if request.spans:  # to compile it may need the others, too
            return self._untried(plan, unfit, all_measured)
        request.progress.stage("judging")
        self.turns.pause()
        with Workers(1) as pool:  # beside the original, the first time
            compiling = pool.submit(self._rewritten, plan)
            try:
                before = self.original
            except NameError as error:  # of an axis bound outside: in a shard_map, in a vmap with a named axis
                return self._untried(plan, f"it cannot stand alone: {error}", all_measured)
        try:
            after, split = compiling.result()
        except Exception as error:
            return Verdict(kept=False, cause="failure", reason=f"the rewritten function fails: {error!r}")
        trial = None if unfit else self.trial_arguments
        if split is not None and trial is not None:
            with self.marker.on("preparing what depends on frozen arguments alone"):
                prepared = jax.block_until_ready(split.prepare(split.sides(trial)[0]))
            after = replace(after, first=(*after.first, *prepared))
        verdict = accept(
            before,
            after,
            trial,
            accuracy=self.accuracy,
            memory_limit=request.options.memory_limit,
            timed=request.options.verdict,
            rival=self.rival,
            stop=request.stop,
            relax=request.options.relax,
            turn=self.turns.timing,
            first_run=partial(self.marker.on, "run for the first time"),
        )
        self.best = (after, verdict.ratio or 1.0) if verdict.kept else None
        return self._untried(plan, unfit, all_measured) if unfit and verdict.kept else verdict

    @cached_property
    def accuracy(self) -> Sequence[Accuracy]:
        """How accurate each result can be."""
        return accuracies(self.request.jaxpr)

    @cached_property
    def original(self) -> Compiled:
        """The original, compiled with the user's options."""
        request = self.request

        def replay(*flat: Any) -> list[Any]:
            return eval_equations(request.original, flat)  # frozen or not, every time all of it

        return compile_in(request.context, replay, request.shapes, request.compiler_options)

    @cached_property
    def trial_arguments(self) -> Sequence[Any]:
        """What the two functions are compared on: the caller's own arguments where they tell something, or made-up
        ones."""
        given = [] if self.request.args is None else [self.request.args]
        drawn = () if needs_real_arguments(self.request.jaxpr) else draws(self.request.shapes)
        return liveliest(self.original, itertools.chain(given, drawn))

    def _rewritten(self, plan: Plan) -> tuple[Compiled, Split | None]:
        """The program under a plan, compiled; where arguments are frozen the part that each call runs, which wants
        what the other part prepares before its arguments."""
        with self.marker.on("compiled"):
            return self._compiled(plan)

    def _compiled(self, plan: Plan) -> tuple[Compiled, Split | None]:
        request, function, shapes = self.request, retrace(self.request.jaxpr, plan), self.request.shapes
        if not any(request.frozen):
            return compile_in(request.context, function, shapes, self.compiler_options), None
        split = Split.of(flattened(function, shapes, expand=request.context == "entry"), request.frozen)
        held, rest = split.sides(shapes)
        unreal = request.args is None or request.not_to_be_run
        kept = jax.eval_shape(split.prepare, held) if unreal else split.prepare(held)
        compiled = compile_in(request.context, split.run, (*kept, *rest), self.compiler_options)
        return replace(compiled, takes=tuple(i for i, held in enumerate(request.frozen) if not held)), split

    def _untried(self, plan: Plan, why: str, all_measured: bool) -> Verdict:
        """The verdict where the function is not run: the model alone decides, if all that the plan may have chosen has
        been seen to be right by itself."""
        all_measured = all_measured or plan.trivial
        kept = all_measured and (plan.predicted_ns < plan.written_ns or self.request.folded)
        reason = f"not run on trial: {why}" + ("" if all_measured else ", and not all of it has been measured")
        return Verdict(kept=kept, reason=reason, cause="untried")
