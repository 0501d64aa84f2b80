"""The stages, run once for one program: graph, measure, solve, retrace, accept."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import jax

from jaxlayout import __version__
from jaxlayout.convs.candidates import Candidate
from jaxlayout.convs.lowering import lowerings, may_crash
from jaxlayout.convs.lowerings.materialised import is_materialised
from jaxlayout.convs.primitive import CONVOLUTIONS
from jaxlayout.convs.signature import Context, ConvSignature
from jaxlayout.graph.build import LayoutGraph, build_graph
from jaxlayout.graph.plan import Plan
from jaxlayout.graph.program import ProgramKey, equations, program_key
from jaxlayout.graph.rules.base import rule_names
from jaxlayout.graph.shards import of_arguments
from jaxlayout.graph.solve import solve
from jaxlayout.graph.validate import check_plan
from jaxlayout.layout import LayoutPolicy
from jaxlayout.measure.compiled import CompilerOptions, with_options
from jaxlayout.measure.contained import Proofs
from jaxlayout.measure.environment import LOWERED, Environment, config_values, current_environment
from jaxlayout.measure.jobs import Job, candidate_id
from jaxlayout.measure.marker import Marker
from jaxlayout.measure.remote import Request, measure_elsewhere
from jaxlayout.measure.trials import available_memory, measure
from jaxlayout.measure.turns import NoTurn, Turns
from jaxlayout.rewrite.invariant import invariant_values
from jaxlayout.rewrite.retrace import retrace
from jaxlayout.runtime._compat import open_jaxpr
from jaxlayout.runtime.progress import Progress
from jaxlayout.runtime.threads import default_device
from jaxlayout.table.measurement import Measurement
from jaxlayout.tuning.budget import process_budget
from jaxlayout.tuning.forced import force
from jaxlayout.tuning.memory_search import within_memory
from jaxlayout.tuning.model import CostModel, compiled_with, cost_model
from jaxlayout.tuning.options import Options, that_decide
from jaxlayout.tuning.outcome import Outcome, untouched
from jaxlayout.tuning.proofs import check_runs
from jaxlayout.tuning.request import TuningRequest
from jaxlayout.tuning.stores import PlanStore, open_table, proofs_of
from jaxlayout.tuning.verifier import Verifier
from jaxlayout.verify.accept import Verdict, allowance

logger = logging.getLogger("jaxlayout")

COMPILER_OPTION_SETS: dict[str, tuple[dict[str, str], ...]] = {"cpu": ({"xla_cpu_experimental_ynn_fusion_type": ""},)}
"""Compiler options, by platform, that may do a whole program good. The one for CPU turns YNNPACK's fusions off: jaxlib
0.10 has them compute convolutions and matrix products, up to twice slower than Eigen does."""

FORGET = "`jaxlayout table prune --plans` forgets that, with all other plans, and keeps what was measured"
"""What to do about a program that is not tried again without its fault."""


class TableMiss(LookupError):
    """The table does not know a convolution, and `on_miss='error'` forbids to measure it."""


def decide(request: TuningRequest) -> Outcome:
    """Find the plan of a program, from the table or by measuring, and judge it.

    A program that spans several processes is neither compiled nor run here. Raises TableMiss if asked to, ValueError
    for a pinned plan that does not fit, NoTurn where others timed for too long; whatever else goes wrong leaves the
    program as it is, with the reason. Under the policy 'channels_last' nothing is measured, judged, or asked of the
    table; 'off' wins over a pinned plan.
    """
    start, jaxpr, options, pinned = time.monotonic(), request.jaxpr, request.options, request.pinned
    if options.policy == "off":
        return untouched("it is switched off: policy 'off'")
    if any(not isinstance(size, int) for v in open_jaxpr(jaxpr).invars for size in getattr(v.aval, "shape", ())):
        return untouched("its shapes are symbolic")
    if pinned is not None:
        check_plan(jaxpr, pinned)
        _check_compiler_options(pinned, itertools.chain(*COMPILER_OPTION_SETS.values()))
        extra = pinned.compiler_options
        check_runs(jaxpr, pinned, lambda: proofs_of(options, request.compiler_options, extra, request.stop))
        verdict = Verdict(kept=True, reason="pinned", cause="untried")
        return Outcome(plan=pinned, verdict=verdict, source="pinned", folded=request.folded)
    if not any(eqn.primitive in CONVOLUTIONS for eqn in equations(jaxpr)):
        return untouched("it has no convolution")
    try:
        if options.policy == "channels_last":
            return force(jaxpr, LayoutPolicy.for_device(), request.context, _invariant(jaxpr, request.frozen))
        pipeline = Pipeline(request)
        if (stored := pipeline.stored()) is not None:
            return stored
        if died := pipeline.marker.left():
            outcome = untouched(f"{died}: it is not tried again", "failure")
            logger.warning("a program stays as it is: %s; if it was ended from outside, %s", died, FORGET)
            pipeline.plans.store(outcome)
            pipeline.marker.clear()
            return outcome
        outcome = pipeline.run()
        if outcome.source == "stored":
            return outcome
        for extra in pipeline.compiler_option_sets if pipeline.may_choose(outcome) else ():
            outcome = pipeline.under(extra, outcome)
        outcome = replace(outcome, seconds=time.monotonic() - start, folded=request.folded)
        if not request.stop.is_set():
            pipeline.plans.store(outcome)
        return outcome
    except (TableMiss, NoTurn, Warning):  # a warning is an exception where the user made it one
        raise
    except Exception as error:
        logger.warning("tuning failed, the program stays as it is", exc_info=True)
        return untouched(f"tuning failed: {error!r}", "failure")


def choose(jaxpr: Any, options: Options, progress: Progress, stop: threading.Event) -> Plan:
    """The plan of least cost for a closed jaxpr of one convolution that stands in some other program, from the table or
    by measuring, not judged, or as the policy has it; the empty one where that cannot be known. Raises TableMiss if
    asked to, and NoTurn."""
    if options.policy == "channels_last":
        return force(jaxpr, LayoutPolicy.for_device(), "nested").plan
    request = TuningRequest(
        jaxpr=jaxpr, original=jaxpr, options=options, context="nested", progress=progress, stop=stop
    )
    pipeline = Pipeline(request)
    graph = pipeline.graph()
    jobs = pipeline.model.missing_convolutions(graph)
    if pipeline.measure_into_table("convolutions", jobs) < len(jobs):
        return Plan()
    most: dict[str, float] = {}
    for node in graph.sites:  # nobody judges the whole: what it takes by itself stays within the limit
        if node.conv is not None and node.modes[0].candidate is not None:
            known = pipeline.model.measurement(node.conv, node.modes[0].candidate)
            written = (known and known.temp_bytes) or 0
            more = allowance(node.conv.nbytes + written, options.memory_limit)
            most[node.conv.key] = written + more
    return pipeline.solve_measured(graph, replace(pipeline.model, most=most))[0]


class Pipeline:
    """One run of the stages, and what several of them need. They stand in loops:

    run:                          under the compiler options given, then `under` others
      within_memory:              again with a price on memory, while the program takes more than it may
        solve_measured:           solve, have the conversions of the plan measured, until all of them have been
        judge:                    the program under the plan against the original
    """

    def __init__(
        self, request: TuningRequest, extra: Mapping[str, str] = MappingProxyType({}), without: Pipeline | None = None
    ):
        """`extra`: compiler options on trial; `without`: the pipeline without them."""
        self.request, self.extra, self.without = request, extra, without
        self.jaxpr, self.options = request.jaxpr, request.options
        self.context: Context = request.context
        self.frozen, self.progress, self.stop = request.frozen, request.progress, request.stop
        self.compiler_options: CompilerOptions = with_options(request.compiler_options, extra)
        self.complete = True
        """Whether all convolutions have been measured."""
        self.device = default_device()
        self.table = open_table(self.options.table)
        self.divided = of_arguments(self.jaxpr, request.placed)
        self.key: ProgramKey = program_key(self.jaxpr, self.frozen, self.divided)
        versions = {name: lowering.version for name, lowering in lowerings().items()}
        # Measurements outlive a release. What is planned from them, and judged, each release does anew.
        rules = {"jaxlayout": __version__, "rules": ",".join(rule_names())}
        compiled = compiled_with(self.compiler_options)
        choices = {"context": self.context, "options": COMPILER_OPTION_SETS if request.choose_compiler_options else ""}
        choices |= that_decide(self.options)
        choices |= {"spans": True} if request.spans else {}
        lowered = config_values(LOWERED)
        environment = current_environment(self.device, versions | rules | choices | compiled | lowered).fingerprint
        self.plans = PlanStore(self.table, environment, self.key, self.options)
        self.model = cost_model(self.options, self.device, self.context, self.compiler_options)
        self.marker = Marker.of(self.table.asked, environment, self.key.function)
        if without is None:
            self.spender = process_budget.value.spender()
            timeout, waiting = self.options.lock_timeout, self.spender.waiting
            self.turns = Turns(timeout, self.stop, waiting=waiting, waited=request.waited)
            self.verifier = Verifier(request, request.compiler_options, self.turns, self.marker)
        else:
            self.spender, self.turns = without.spender, without.turns
            self.verifier = without.verifier.under(self.compiler_options)

    def stored(self) -> Outcome | None:
        """What was decided before, if anything."""
        found = self.plans.load(self.check)
        return found and replace(found, folded=self.request.folded)

    def check(self, outcome: Outcome) -> None:
        """Raise ValueError where an outcome is not of this very program, or cannot be had here."""
        check_plan(self.jaxpr, outcome.plan, relaxed=self.options.relaxed)
        _check_compiler_options(outcome.plan, self.compiler_option_sets)
        check_runs(self.jaxpr, outcome.applied, lambda: self.proofs_under(outcome.plan.compiler_options))

    @property
    def compiler_option_sets(self) -> Sequence[Mapping[str, str]]:
        """The compiler options that a plan may ask for here."""
        return COMPILER_OPTION_SETS.get(self.device.platform, ()) if self.request.choose_compiler_options else ()

    def proofs_under(self, extra: Mapping[str, str]) -> Proofs:
        """`proofs_of`, under compiler options beside the user's."""
        return proofs_of(self.options, self.request.compiler_options, extra, self.stop)

    @cached_property
    def proofs(self) -> Proofs:
        """Of what is planned here."""
        return self.proofs_under(self.extra)

    def graph(self, near: Collection[Candidate] = ()) -> LayoutGraph:
        """The graph; of the candidates, what is worth timing beside those written. `near`: see `PlanStore.nearest`."""

        def enumerate_candidates(conv: ConvSignature, written: Candidate) -> Sequence[Candidate]:
            candidates = self.model.candidates(conv, written, relaxed=self.options.relaxed)
            return [one for one in candidates if one == written or (self.worth(conv, one, near) and self.offers(one))]

        invariant = _invariant(self.jaxpr, self.frozen)
        return build_graph(self.jaxpr, enumerate_candidates, self.context, invariant, self.divided)

    def offers(self, candidate: Candidate) -> bool:
        """Whether it can be seen first that a candidate runs, where that has to be."""
        return not may_crash(candidate.lowering) or self.proofs.offers(candidate.lowering)

    def worth(self, conv: ConvSignature, candidate: Candidate, near: Collection[Candidate]) -> bool:
        """Whether a candidate is worth timing: not where a nearest plan does without, or where it was far from the best
        without the compiler options now on trial."""
        if self.without is not None:
            before = self.without.model.measurement(conv, candidate)
            return before is not None and before.status == "ok"
        return not near or candidate in near

    def run(self) -> Outcome:
        """What comes of the stages under these compiler options: measured, solved, judged."""
        near = self.plans.nearest()
        graph = self.graph(near)
        missing = self.model.missing_convolutions(graph)
        timed = self.measure_into_table("convolutions", missing)
        self.complete = timed == len(missing)
        timed += self.measure_into_table("other equations", self.model.missing_works(graph))
        if timed and (stored := self.stored()) is not None:
            return stored  # another process was ahead with the same

        def planned(costs: CostModel) -> Outcome | None:
            nonlocal timed
            plan, more = self.solve_measured(graph, costs)
            timed += more
            if self.stop.is_set():
                return None
            source = "heuristic" if not self.complete else "nearest" if near else "measured"
            return Outcome(plan=plan, verdict=self.judge(plan), source=source, measured=timed)

        return within_memory(graph, self.model, planned, self.smaller) or untouched("tuning was interrupted")

    def smaller(self, outcome: Outcome) -> Outcome | None:
        """An outcome without the largest arrays that its plan has written out before convolutions that read them often;
        None where there are none."""
        convolutions = equations(jax.make_jaxpr(retrace(self.jaxpr, outcome.plan))(*self.request.shapes))
        found = [eqn for eqn in convolutions if is_materialised(str(eqn.params.get("lowering", "")))]
        if not found:
            return None
        largest = max(eqn.invars[0].aval.size * eqn.invars[0].aval.dtype.itemsize for eqn in found)
        plan = replace(outcome.plan, materialised_bytes=largest // 2)
        return replace(outcome, plan=plan, verdict=self.judge(plan))

    def may_choose(self, outcome: Outcome) -> bool:
        """Whether compiler options are worth a try: only where whole functions may be timed."""
        timed = self.options.verdict and self.options.on_miss == "measure" and not self.request.not_to_be_run
        sound = outcome.verdict.cause in ("time", "untried") and outcome.source != "none"
        return timed and sound and not self.out_of_time()

    def under(self, extra: Mapping[str, str], best: Outcome) -> Outcome:
        """The better of an outcome and what comes of the stages with some compiler options more. First the same plan is
        tried with them, and only where that is faster the program is planned for them."""
        pipeline = Pipeline(self.request, extra, self)
        plan = replace(best.plan if best.kept else Plan(), compiler_options=extra)
        try:
            check_runs(self.jaxpr, plan, lambda: pipeline.proofs)
        except ValueError:
            return best
        same = replace(best, plan=plan, verdict=pipeline.judge(plan))
        if not same.kept:
            return best
        anew = pipeline.run()
        return anew if anew.kept and (anew.verdict.ratio or 1.0) > (same.verdict.ratio or 1.0) else same

    def solve_measured(self, graph: LayoutGraph, costs: CostModel) -> tuple[Plan, int]:
        """Solve, measure the conversions in the plan, and solve again until all of them have been measured. Gives the
        plan, and how many were measured. Conversions that no plan wants never are."""
        measured = 0
        while True:
            self.progress.stage("solving")
            plan = solve(graph, costs.node_ns, costs.conversion_ns)
            plan = replace(plan, compiler_options=self.extra)
            done = self.measure_into_table("conversions", costs.missing_conversions(plan))
            if not done and not self.ruled_out(graph, plan):
                return plan, measured
            measured += done

    def ruled_out(self, graph: LayoutGraph, plan: Plan) -> int:
        """How many forms of a plan may not run here, by what has been entered into the table by now: they may have been
        measured elsewhere."""
        count = 0
        for node in graph.sites:
            mode = plan.choices.get(node.path, node.modes[0])
            conv, candidate = node.conv, mode.candidate
            if conv is None or candidate is None or mode == node.modes[0] or not may_crash(candidate.lowering):
                continue
            if (found := self.proofs(conv, candidate)).status != "ok":
                self.model.record(conv.key, {candidate_id(candidate): found})
                count += 1
        return count

    def measure_into_table(self, what: str, jobs: Sequence[Job]) -> int:
        """Time jobs, inside the budget, and enter them into the table. Gives how many were."""
        if not jobs or self.options.on_miss == "heuristic" or self.out_of_time():
            return 0
        if self.options.on_miss == "error":
            raise TableMiss(f"{self.table.path} lacks {len(jobs)} {what}, the first: {jobs[0].key}")
        self.progress.stage(f"measuring {what}", len(jobs))
        if self.request.executor is not None:  # its workers may be of this machine, and take the lock
            with self.spender.spending():
                self.keep(measure_elsewhere(jobs, self.request.executor, self.job_request, self.out_of_time))
        left = [job for job in jobs if not self.model.learned(job)]  # by others, or just now elsewhere
        with self.spender.spending():
            here = measure(
                left,
                device=self.device,
                memory_bytes=available_memory(self.device),
                relax=self.options.relax,
                compiler_options=self.compiler_options,
                prove=self.proofs,
                peaks=self.model.peaks(self.device, self.compiler_options),
                turns=self.turns,
                learned=self.model.learned,
            )
            done = len(jobs) - len(left) + self.keep(here)
        if done < len(jobs):
            logger.info("%d of %d %s measured, then stopped", done, len(jobs), what)
        return done

    def keep(self, measured: Generator[tuple[Job, dict[str, Measurement]]]) -> int:
        """Enter what is measured into the table, until time is up. Gives how many jobs were."""
        done = 0
        with closing(measured):  # which may hold the turn to time
            while not self.out_of_time() and (one := next(measured, None)) is not None:
                self.model.record(one[0].key, one[1])
                self.progress.step()
                done += 1
        return done

    @cached_property
    def here(self) -> Environment:
        """What a worker has to be like."""
        return current_environment(self.device, compiled_with(self.compiler_options))

    def job_request(self, make: Callable[[], Job]) -> Request:
        """A job for the workers of an executor."""
        return Request(
            make=make,
            environment=self.here,
            compiler_options=self.compiler_options,
            relax=self.options.relax,
        )

    def out_of_time(self) -> bool:
        return self.stop.is_set() or process_budget.value.spent() >= self.options.time_budget

    def judge(self, plan: Plan) -> Verdict:
        """What the verifier says of the program under a plan."""
        return self.verifier.verdict(plan, all_measured=self.complete)


def _check_compiler_options(plan: Plan, known: Iterable[Mapping[str, str]]) -> None:
    """Raise ValueError for compiler options that no plan of ours asks for: some write files, or say what to run."""
    if plan.compiler_options not in ({}, *known):
        raise ValueError(f"the plan asks for compiler options that are not among ours: {dict(plan.compiler_options)}")


def _invariant(jaxpr: Any, frozen: Sequence[bool]) -> Collection[Any]:
    """The variables that are computed once, where some arguments are frozen."""
    return invariant_values(jaxpr, frozen) if any(frozen) else ()
