"""The measurement engine: candidates of one job are compiled in parallel, checked against a float64
reference, and timed one after another in interleaved rounds; what cannot win is dropped early, or never
compiled. A candidate that fails is a record, never an exception.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from jaxlayout.convs.candidates import Candidate
from jaxlayout.convs.signature import Context, ConvSignature
from jaxlayout.measure.compiled import CompilerOptions, compile_in, program_hash
from jaxlayout.measure.jobs import Job
from jaxlayout.measure.peaks import Peaks
from jaxlayout.measure.turns import NoTurn, Turns
from jaxlayout.runtime.limits import memory_left
from jaxlayout.runtime.malloc import amid, soiled_memory
from jaxlayout.runtime.threads import Workers
from jaxlayout.runtime.timing import WARM_NS, lasting, timed_call
from jaxlayout.table.measurement import Measurement, Status, failed

logger = logging.getLogger("jaxlayout")

ROUNDS, MIN_ROUNDS = 9, 3
CANDIDATE_SECONDS = 0.35
"""Time spent on repeating one candidate, beyond MIN_ROUNDS."""
SLOW = 1.5
"""A candidate this many times slower than the best after MIN_ROUNDS is dropped, twice this after one."""
MARGIN = 1.2
"""A candidate that would gain no more than this on another in the same layouts, were it at the peaks, is not tried."""
MIN_SAMPLE_NS = 200_000
"""A sample repeats the call until it lasts this long, so that the clock and the dispatch do not matter."""
CHUNK = 6
"""Jobs compiled together, before any of them is timed: compiling beside timing would disturb it."""

Prove = Callable[[ConvSignature, Candidate], Measurement]
"""What came of a form that may crash in a process of its own; where that is "ok" it may run here."""


@dataclass(slots=True)
class Trial:
    """A candidate under way."""

    run: Callable[[], Any]
    temp_bytes: int | None
    program: str
    samples: list[float] = field(default_factory=list)
    error: float | None = None
    inner: int = 1
    """Calls in a sample."""
    warming: float = 0.0
    """What the first run took, in nanoseconds."""
    status: Any = "ok"
    detail: str = ""

    def failed(self, status: Status, detail: str) -> Measurement:
        """The record of it where it does not get to be timed."""
        return failed(status, detail, error=self.error, temp_bytes=self.temp_bytes, program=self.program)

    def warm_up(self) -> Any:
        out, self.warming = timed_call(self.run)
        return out

    def first(self) -> float:
        """A sample; the first run itself where warming up does not count."""
        return self.warming if self.warming >= WARM_NS else self.sample()

    def sample(self) -> float:
        ns, self.inner = lasting(self.run, MIN_SAMPLE_NS, self.inner)
        return ns

    def measurement(self) -> Measurement:
        timed = self.samples
        half = statistics.quantiles(timed, n=4) if len(timed) > 1 else None
        return Measurement(
            status=self.status,
            median_ns=statistics.median(timed) if timed else None,
            spread_ns=(half[2] - half[0]) / 2 if half else None,
            runs=len(timed),
            error=self.error,
            temp_bytes=self.temp_bytes,
            program=self.program,
            detail=self.detail,
        )


def measure(
    jobs: Sequence[Job],
    *,
    device: Any,
    memory_bytes: int | None = None,
    relax: float = 1.0,
    compiler_options: CompilerOptions = None,
    peaks: Peaks | None = None,
    turns: Turns | None = None,
    learned: Callable[[Job], bool] = lambda job: False,
    prove: Prove | None = None,
) -> Generator[tuple[Job, dict[str, Measurement]]]:
    """Compile, check and time the alternatives of jobs on `device`, giving each job's records as it is done.

    Takes about a tenth of a second to compile an alternative and half a second to time one that stays in the
    race. `memory_bytes`: a candidate with more temporary memory is not run. `relax`: multiplies the error allowed.
    `peaks`: the machine's; without, all are compiled. `turns`: how it stands in line to time; what is given is given in
    its turn. `learned`: whether somebody else has measured a job by now: there are no records of that. `prove`: asked
    of what may crash; without, none of it is run. Raises NoTurn.
    """
    turns = turns or Turns()
    with Workers(2) as pool:
        for start in range(0, len(jobs), CHUNK):
            chunk = jobs[start : start + CHUNK]
            left = [job for job in chunk if not learned(job)]
            trials = {job.key: _Trials(job, device, memory_bytes, relax, peaks, turns) for job in left}
            for wave in (_Trials.first_wave, _Trials.second_wave):
                under_way = [(t, t.compile(t.proved(wave(t), prove), pool, compiler_options)) for t in trials.values()]
                for _, futures in under_way:
                    wait(futures.values())
                for t, futures in under_way:
                    t.enter(futures)
            for job in chunk:
                with turns.timing():
                    yield job, {} if job.key not in trials or learned(job) else trials[job.key].time()


class _Trials:
    """The alternatives of a job: inputs drawn for it, those compiled so far, and what became of the others."""

    def __init__(
        self, job: Job, device: Any, memory_bytes: int | None, relax: float, peaks: Peaks | None, turns: Turns
    ):
        turns.pause()
        self.job, self.device, self.memory_bytes, self.relax, self.turns = job, device, memory_bytes, relax, turns
        self.peaks = peaks if job.dims is not None else None
        self.arrays, self.error_of = job.inputs()
        self.on_device: dict[tuple[Any, ...], Any] = {}
        self.running: dict[str, Trial] = {}
        self.settled: dict[str, Measurement] = {}
        self.same: dict[str, str] = {}
        self.programs: dict[str, str] = {}
        self.allowed = relax * job.bound(0.0)

    def args(self, name: str) -> tuple[Any, ...]:
        """The inputs of an alternative; equal arrays are put on the device once."""
        return tuple(self._put(i, array) for i, array in enumerate(self.arrays(name)))

    def _put(self, place: int, array: np.ndarray) -> Any:
        key = place, array.shape, array.strides
        if key not in self.on_device:
            self.on_device[key] = jax.device_put(amid(array), self.device)
        return self.on_device[key]

    def proved(self, names: Iterable[str], prove: Prove | None) -> Iterator[str]:
        """The alternatives that may run here."""
        for name in names:
            if (form := self.job.form(name)) is not None:
                self.turns.pause()
                found = prove(*form) if prove else failed("failed", "it may crash, and nobody tries it first")
                if found.status != "ok":
                    self.settled[name] = found
                    continue
            yield name

    def compile(self, names: Iterable[str], pool: Executor, options: CompilerOptions) -> dict[str, Future[Trial]]:
        """Start compiling some alternatives."""
        alternatives, context = self.job.alternatives, self.job.context

        def work(name: str) -> Trial:
            self.turns.pause()
            return _compile(alternatives[name], self.args(name), context, options)

        return {name: pool.submit(work, name) for name in names}

    def enter(self, futures: Mapping[str, Future[Trial]]) -> None:
        """Check what was compiled."""
        for name, future in futures.items():
            self.turns.pause()
            trial = None
            try:
                trial = future.result()
                if self.memory_bytes is not None and (trial.temp_bytes or 0) > self.memory_bytes:
                    needs = f"needs {trial.temp_bytes} bytes of temporary memory, {self.memory_bytes} are allowed"
                    self.settled[name] = trial.failed("memory", needs)
                    continue
                if trial.program in self.programs:
                    self.same[name] = self.programs[trial.program]
                    continue
                out = trial.warm_up()
                if self.error_of is not None:
                    trial.error = self.error_of(name, out)
                    del out
                    if trial.warming < WARM_NS:
                        self.look_again(name, trial)
            except NoTurn:
                raise
            except Exception as error:  # whatever a lowering, the compiler or the device raises is its result
                self.settled[name] = (trial.failed if trial else failed)("failed", repr(error))
                continue
            if name == next(iter(self.job.alternatives)) and trial.error is not None:
                self.allowed = self.relax * self.job.bound(trial.error)
            self.programs[trial.program] = name
            if wrong := self.wrong(trial):
                self.settled[name] = trial.failed("wrong", wrong)
            else:
                self.running[name] = trial

    def look_again(self, name: str, trial: Trial) -> None:
        """Check one more run, in memory that is not zero: what reads where nobody wrote may have been right by luck."""
        if self.error_of is not None and trial.error is not None:
            with soiled_memory():
                out = jax.block_until_ready(trial.run())
            trial.error = max(trial.error, self.error_of(name, out))

    def wrong(self, trial: Trial) -> str:
        """What is wrong with the numbers; '' if nothing is."""
        if trial.error is None or trial.error <= self.allowed:
            return ""
        return f"error {trial.error:.3g}, allowed {self.allowed:.3g}"

    def first_wave(self) -> Iterable[str]:
        """What to compile first: the alternative written, and of each other layouts one."""
        alternatives, dims = list(self.job.alternatives), self.job.dims
        if self.peaks is None or dims is None:
            return alternatives
        each = {dims(name): name for name in reversed(alternatives)}
        return [name for name in alternatives if each[dims(name)] == name]

    def second_wave(self) -> Iterable[str]:
        """The others that may still win against the first, which are timed once; those that cannot are settled, as
        pruned."""
        left = [name for name in self.job.alternatives if name not in {*self.running, *self.settled, *self.same}]
        if not left or self.peaks is None or self.job.dims is None:
            return left
        with self.turns.timing():
            self.peaks.look()
            seen = {self.job.dims(name): trial.first() for name, trial in self.running.items()}
        for name in left:
            least, best = self.peaks.least_ns(*self.job.least_work(name)), seen.get(self.job.dims(name), np.inf)
            if best < MARGIN * least:
                why = f"takes {least / 1e6:.3g} ms at least, another in the same layouts {best / 1e6:.3g}"
                self.settled[name] = failed("pruned", why)
        return [name for name in left if name not in self.settled]

    def time(self) -> dict[str, Measurement]:
        """Time what runs against each other, and give what became of all."""
        time_in_rounds(list(self.running.values()))
        for name, trial in self.running.items():
            if trial.status == "ok" and trial.warming >= WARM_NS:  # long: not run once more to lose the race
                self.look_again(name, trial)
                if wrong := self.wrong(trial):
                    trial.status, trial.detail = "wrong", wrong
        found = self.settled | {name: trial.measurement() for name, trial in self.running.items()}
        found |= {name: found[other] for name, other in self.same.items()}
        written = next(iter(self.job.alternatives))
        if found[written].status == "wrong":
            logger.warning("XLA is wrong here: %s as %s: %s", self.job.key, written, found[written].detail)
        return {name: found[name] for name in self.job.alternatives}


def time_in_rounds(trials: list[Trial]) -> None:
    """Interleaved rounds; the order turns from round to round, losers drop out."""
    running = trials
    for round_ in range(ROUNDS):
        for trial in running if round_ % 2 == 0 else running[::-1]:
            if round_ < MIN_ROUNDS or sum(trial.samples) * trial.inner < CANDIDATE_SECONDS * 1e9:
                trial.samples.append(trial.sample() if round_ else trial.first())
        if round_ in (0, MIN_ROUNDS - 1):
            best = min((min(trial.samples) for trial in running), default=0.0)
            margin = 2 * SLOW if round_ == 0 else SLOW
            for trial in running:
                if min(trial.samples) > margin * best:
                    trial.status, trial.detail = (
                        "slow",
                        f"over {margin} times the best after {round_ + 1} rounds",
                    )
            running = [trial for trial in running if trial.status == "ok"]


def _compile(
    function: Callable[..., Any], args: Sequence[Any], context: Context, compiler_options: CompilerOptions
) -> Trial:
    compiled = compile_in(context, function, args, compiler_options)
    memory = compiled.program.memory_analysis()
    return Trial(
        run=lambda: compiled(*args),
        temp_bytes=getattr(memory, "temp_size_in_bytes", None),
        program=program_hash(compiled.program),
    )


def available_memory(device: Any) -> int | None:
    """Bytes that a candidate may take: half of what the device, or the host where it is the device, has left; None
    where that is not known."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    left = stats["bytes_limit"] - stats.get("bytes_in_use", 0) if stats and "bytes_limit" in stats else memory_left()
    return None if left is None else left // 2
