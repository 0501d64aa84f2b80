"""The measurement engine: candidates of one job are compiled in parallel, checked against a float64
reference, and timed one after another in interleaved rounds; what cannot win is dropped early, or never
compiled. A candidate that fails is a record, never an exception.

It knows nothing of graphs and plans. A job is one thing to compute, with its alternatives: a convolution, a transpose,
or another equation in several orders (`tuning.work`).
"""

from __future__ import annotations

import hashlib
import logging
import re
import statistics
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxlayout.convs.candidates import Candidate
from jaxlayout.convs.lowering import evaluate, lowering_named, may_crash, versioned
from jaxlayout.convs.signature import Context, ConvSignature
from jaxlayout.layout import ConvDimensionNumbers, ConvLayout, KernelLayout, Order
from jaxlayout.measure.peaks import Peaks
from jaxlayout.measure.reference import reference
from jaxlayout.measure.turns import NoTurn, Turns
from jaxlayout.runtime.limits import memory_left
from jaxlayout.runtime.malloc import amid, soiled_memory
from jaxlayout.runtime.threads import Workers, default_device
from jaxlayout.runtime.timing import lasting, timed_call
from jaxlayout.table.measurement import Measurement, Status, failed

logger = logging.getLogger("jaxlayout")

TOLERANCE = 3.0
"""c of the accuracy bound c*eps*sqrt(K). Rounding after each of K additions is a random walk with standard
deviation 0.35*eps*sqrt(K) of the result's rms; five of those, the largest among a million outputs, are
1.8*eps*sqrt(K); rounding an output as large as five rms adds 2.5*eps. Together, in square, about 3."""

UNEXPLAINED = 10.0
"""An error of the form written that is more than so many times c*eps*sqrt(K) is no rounding: the form is wrong here,
and what is allowed to others does not go by it."""
COARSE = 2.0**-6
"""What rounding to bfloat16 can come to, as a share of the rms: on devices that round the operands of products so, no
less is called wrong, and on none is more called rounding, unless the dtype of out is so coarse itself."""

REFERENCE_MACS = 5 * 10**9
"""The reference is computed for as many images as this many multiply-adds allow (about a quarter of a second)."""

ROUNDS, MIN_ROUNDS = 9, 3
CANDIDATE_SECONDS = 0.35
"""Time spent on repeating one candidate, beyond MIN_ROUNDS."""
SLOW = 1.5
"""A candidate this many times slower than the best after MIN_ROUNDS is dropped, twice this after one."""
MARGIN = 1.2
"""A candidate that would gain no more than this on another in the same orders, were it at the peaks, is not tried."""
WARM_NS = 1e8
"""A run that takes so long takes as long the first time."""
MIN_SAMPLE_NS = 200_000
"""A sample repeats the call until it lasts this long, so that the clock and the dispatch do not matter."""

CompilerOptions = dict[str, Any] | None
"""Compiler options as `jax.jit` takes them."""
Prove = Callable[[ConvSignature, Candidate], Measurement]
"""What came of a form that may crash in a process of its own; where that is "ok" it may run here."""


@dataclass(frozen=True, slots=True)
class Job:
    """Alternatives to be timed against each other: functions of the same arrays, in orders of their own."""

    key: str
    """What is computed, the key in the table."""
    alternatives: Mapping[str, Callable[..., Any]]
    """By id, the first is the one written in the program; physical arrays in, one array out."""
    inputs: Callable[[], tuple[Callable[[str], tuple[np.ndarray, ...]], Callable[[str, Any], float] | None]]
    """Draws the inputs: gives the arrays for an alternative, and the error of its output (or None)."""
    bound: Callable[[float], float] = lambda written: np.inf
    """The error allowed, given that of the one written, which may be wrong itself."""
    context: Context = "entry"
    orders: Callable[[str], Any] | None = None
    """The orders of an alternative, where what it does is known. What was measured in them stands for any other."""
    work: Callable[[str], tuple[int, int]] = lambda name: (0, 0)
    """The least that an alternative does: multiply-adds in float32, and bytes."""
    form: Callable[[str], tuple[ConvSignature, Candidate] | None] = lambda name: None
    """The form of an alternative that may crash: what has to be seen to run elsewhere before it is compiled here."""
    make: Callable[[], Job] | None = None
    """Makes the same job in another process; None where that cannot be."""


def with_options(given: CompilerOptions, more: Mapping[str, Any] | None) -> CompilerOptions:
    """Compiler options and some more, which win."""
    return {**(given or {}), **(more or {})} or None


def candidate_id(candidate: Candidate) -> str:
    """The key of a candidate in the table: with its lowering's version, so that a changed one is timed anew."""
    return f"{versioned(candidate.lowering)}:{candidate.dims}"


def conv_job(conv: ConvSignature, candidates: Sequence[Candidate]) -> Job:
    """The job of timing the candidates of a convolution."""

    def alternative(candidate: Candidate) -> Callable[..., Any]:
        return lambda lhs, rhs: evaluate(candidate.lowering, conv, candidate.dims, lhs, rhs)

    named = {candidate_id(candidate): candidate for candidate in candidates}
    dims = {name: candidate.dims for name, candidate in named.items()}
    last = ConvDimensionNumbers(
        ConvLayout.channels_last(conv.rank),
        KernelLayout.io_last(conv.rank),
        ConvLayout.channels_last(conv.rank),
    )

    def inputs() -> Any:
        rng = np.random.default_rng(0)
        lhs = random_array(rng, conv.lhs_shape(last.lhs), conv.lhs_dtype)
        rhs = random_array(rng, conv.rhs_shape(last.rhs), conv.rhs_dtype)
        images = max(1, REFERENCE_MACS * conv.batch // max(1, conv.macs)) if conv.batch_groups == 1 else conv.batch
        some = replace(conv, batch=min(conv.batch, images))
        expected = reference(some, lhs[: some.batch], rhs)
        rms = float(np.sqrt(np.mean(np.abs(expected) ** 2))) if expected.size else 0.0

        def arrays(name: str) -> tuple[np.ndarray, ...]:
            d = dims[name]
            return (
                np.transpose(lhs, d.lhs.permutation_from(last.lhs)),
                np.transpose(rhs, d.rhs.permutation_from(last.rhs)),
            )

        def error(name: str, out: Any) -> float:
            found = np.transpose(np.asarray(out), last.out.permutation_from(dims[name].out))
            if found.shape[1:] != expected.shape[1:] or found.dtype != conv.out_dtype:
                return np.inf
            wide = found[: expected.shape[0]].astype(expected.dtype)
            worst = float(np.max(np.abs(wide - expected), initial=0.0))
            return worst / (rms or 1.0) if np.isfinite(worst) else np.inf

        return arrays, error

    def work(name: str) -> tuple[int, int]:
        macs, nbytes = lowering_named(named[name].lowering).work(conv, dims[name])
        # Half precision and integers may have arithmetic of their own that is faster.
        return macs if min(conv.lhs_dtype.itemsize, conv.rhs_dtype.itemsize) >= 4 else 0, nbytes

    eps = float(jnp.finfo(conv.out_dtype).eps) if jnp.issubdtype(conv.out_dtype, jnp.inexact) else 0.0
    allowed = TOLERANCE * eps * max(1, conv.contraction) ** 0.5
    rounds_more = eps and default_device().platform != "cpu"
    explained = max(allowed, COARSE if rounds_more else min(UNEXPLAINED * allowed, COARSE))
    return Job(
        conv.key,
        {name: alternative(candidate) for name, candidate in named.items()},
        inputs,
        lambda written: max(2 * written if written <= explained else 0.0, allowed),
        conv.context,
        lambda name: dims[name],
        work,
        lambda name: (conv, named[name]) if may_crash(named[name].lowering) else None,
        partial(conv_job, conv, candidates),
    )


def transpose_job(shape: Sequence[int], dtype: Any, permutation: Order, context: Context) -> Job:
    """The job of timing one transpose of a physical array."""

    def inputs() -> Any:
        array = random_array(np.random.default_rng(0), tuple(shape), dtype)
        return lambda name: (array,), None

    return Job(
        transpose_key(shape, dtype, permutation, context),
        {"transpose": lambda x: lax.transpose(x, permutation)},
        inputs,
        context=context,
        make=partial(transpose_job, shape, dtype, permutation, context),
    )


def transpose_key(shape: Sequence[int], dtype: Any, permutation: Order, context: Context) -> str:
    """The key of a transpose in the table."""
    return f"transpose={list(shape)}{dtype} by={list(permutation)} in={context}"


def coalesced(shape: Sequence[int], permutation: Order) -> tuple[tuple[int, ...], Order]:
    """The same transpose with unit axes dropped and axes that stay neighbours merged: one key for many."""
    groups: list[list[int]] = []
    for axis in (a for a in permutation if shape[a] != 1):
        between = range(groups[-1][-1] + 1, axis) if groups else ()
        if groups and axis > groups[-1][-1] and all(shape[b] == 1 for b in between):
            groups[-1].append(axis)
        else:
            groups.append([axis])
    ranked = sorted(groups)
    sizes = tuple(int(np.prod([shape[a] for a in group])) for group in ranked)
    return sizes, tuple(ranked.index(group) for group in groups)


def random_array(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Ordinary numbers of a dtype; small ones where it is an integer, so that sums stay exact."""
    if jnp.issubdtype(dtype, jnp.integer) or dtype == np.bool_:
        return rng.integers(0 if dtype.kind in "ub" else -3, 4, shape).astype(dtype)
    out = rng.standard_normal(shape, np.float32)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        out = out + 1j * rng.standard_normal(shape, np.float32)
    return out.astype(dtype)


@dataclass(slots=True)
class _Trial:
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


CHUNK = 6
"""Jobs compiled together, before any of them is timed: compiling beside timing would disturb it."""


def measure(
    jobs: Sequence[Job],
    *,
    device: Any,
    memory_bytes: int | None = None,
    relax: float = 1.0,
    compiler_options: CompilerOptions = None,
    peaks: Peaks | None = None,
    turns: Turns | None = None,
    known: Callable[[Job], bool] = lambda job: False,
    prove: Prove | None = None,
) -> Generator[tuple[Job, dict[str, Measurement]]]:
    """Compile, check and time the alternatives of jobs on `device`, giving each job's records as it is done.

    Takes about a tenth of a second to compile an alternative and half a second to time one that stays in the
    race. `memory_bytes`: a candidate with more temporary memory is not run. `relax`: multiplies the error allowed.
    `peaks`: the machine's; without, all are compiled. `turns`: how it stands in line to time; what is given is given in
    its turn. `known`: whether somebody else has measured a job by now: there are no records of that. `prove`: asked of
    what may crash; without, none of it is run. Raises NoTurn.
    """
    turns = turns or Turns()
    with Workers(2) as pool:
        for start in range(0, len(jobs), CHUNK):
            chunk = jobs[start : start + CHUNK]
            left = [job for job in chunk if not known(job)]
            trials = {job.key: _Trials(job, device, memory_bytes, relax, peaks, turns) for job in left}
            for wave in (_Trials.firsts, _Trials.left):
                under_way = [(t, t.compile(t.proved(wave(t), prove), pool, compiler_options)) for t in trials.values()]
                for _, futures in under_way:
                    wait(futures.values())
                for t, futures in under_way:
                    t.enter(futures)
            for job in chunk:
                with turns.timing():
                    yield job, {} if job.key not in trials or known(job) else trials[job.key].records()


class _Trials:
    """The alternatives of a job: inputs drawn for it, those compiled so far, and what became of the others."""

    def __init__(
        self, job: Job, device: Any, memory_bytes: int | None, relax: float, peaks: Peaks | None, turns: Turns
    ):
        turns.pause()
        self.job, self.device, self.memory_bytes, self.relax, self.turns = job, device, memory_bytes, relax, turns
        self.peaks = peaks if job.orders is not None else None
        self.arrays, self.error_of = job.inputs()
        self.on_device: dict[tuple[Any, ...], Any] = {}
        self.running: dict[str, _Trial] = {}
        self.known: dict[str, Measurement] = {}
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
                    self.known[name] = found
                    continue
            yield name

    def compile(self, names: Iterable[str], pool: Executor, options: CompilerOptions) -> dict[str, Future[_Trial]]:
        """Start compiling some alternatives."""
        alternatives, context = self.job.alternatives, self.job.context

        def work(name: str) -> _Trial:
            self.turns.pause()
            return _compile(alternatives[name], self.args(name), context, options)

        return {name: pool.submit(work, name) for name in names}

    def enter(self, futures: Mapping[str, Future[_Trial]]) -> None:
        """Check what was compiled."""
        for name, future in futures.items():
            self.turns.pause()
            trial = None
            try:
                trial = future.result()
                if self.memory_bytes is not None and (trial.temp_bytes or 0) > self.memory_bytes:
                    needs = f"needs {trial.temp_bytes} bytes of temporary memory, {self.memory_bytes} are allowed"
                    self.known[name] = trial.failed("memory", needs)
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
                self.known[name] = (trial.failed if trial else failed)("failed", repr(error))
                continue
            if name == next(iter(self.job.alternatives)) and trial.error is not None:
                self.allowed = self.relax * self.job.bound(trial.error)
            self.programs[trial.program] = name
            if wrong := self.wrong(trial):
                self.known[name] = trial.failed("wrong", wrong)
            else:
                self.running[name] = trial

    def look_again(self, name: str, trial: _Trial) -> None:
        """Check one more run, in memory that is not zero: what reads where nobody wrote may have been right by luck."""
        if self.error_of is not None and trial.error is not None:
            with soiled_memory():
                out = jax.block_until_ready(trial.run())
            trial.error = max(trial.error, self.error_of(name, out))

    def wrong(self, trial: _Trial) -> str:
        """What is wrong with the numbers; '' if nothing is."""
        if trial.error is None or trial.error <= self.allowed:
            return ""
        return f"error {trial.error:.3g}, allowed {self.allowed:.3g}"

    def firsts(self) -> Iterable[str]:
        """What to compile first: the alternative written, and of each other orders one."""
        alternatives, orders = list(self.job.alternatives), self.job.orders
        if self.peaks is None or orders is None:
            return alternatives
        each = {orders(name): name for name in reversed(alternatives)}
        return [name for name in alternatives if each[orders(name)] == name]

    def left(self) -> Iterable[str]:
        """The others that may still win."""
        left = [name for name in self.job.alternatives if name not in {*self.running, *self.known, *self.same}]
        if not left or self.peaks is None or self.job.orders is None:
            return left
        with self.turns.timing():
            self.peaks.look()
            seen = {self.job.orders(name): trial.first() for name, trial in self.running.items()}
        for name in left:
            least, best = self.peaks.least_ns(*self.job.work(name)), seen.get(self.job.orders(name), np.inf)
            if best < MARGIN * least:
                why = f"takes {least / 1e6:.3g} ms at least, another in the same orders {best / 1e6:.3g}"
                self.known[name] = failed("pruned", why)
        return [name for name in left if name not in self.known]

    def records(self) -> dict[str, Measurement]:
        """Time what is left against each other."""
        _race(list(self.running.values()))
        for name, trial in self.running.items():
            if trial.status == "ok" and trial.warming >= WARM_NS:  # long: not run once more to lose the race
                self.look_again(name, trial)
                if wrong := self.wrong(trial):
                    trial.status, trial.detail = "wrong", wrong
        found = self.known | {name: trial.measurement() for name, trial in self.running.items()}
        found |= {name: found[other] for name, other in self.same.items()}
        written = next(iter(self.job.alternatives))
        if found[written].status == "wrong":
            logger.warning("XLA is wrong here: %s as %s: %s", self.job.key, written, found[written].detail)
        return {name: found[name] for name in self.job.alternatives}


def _race(trials: list[_Trial]) -> None:
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


@dataclass(frozen=True, slots=True)
class Compiled:
    """A function compiled for a context; called like the function."""

    program: Any
    first: tuple[Any, ...] = ()
    """What the program takes before the function's own arguments."""
    takes: tuple[int, ...] | None = None
    """Which of those arguments it takes; None for all."""

    def __call__(self, *args: Any) -> Any:
        return self.program(*self.first, *(args if self.takes is None else (args[i] for i in self.takes)))


def compile_in(
    context: Context, function: Callable[..., Any], args: Sequence[Any], compiler_options: CompilerOptions = None
) -> Compiled:
    """Compile a function of arrays for a context. The nested one is a branch that is always taken, which the
    compiler cannot know."""
    if context == "entry":
        return Compiled(jax.jit(function).lower(*args).compile(compiler_options))

    def branch(flag: Any, *args: Any) -> Any:
        shapes = jax.eval_shape(function, *args)
        return lax.cond(flag, function, lambda *_: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), *args)

    flag = jnp.array(True)
    return Compiled(jax.jit(branch).lower(flag, *args).compile(compiler_options), (flag,))


def _compile(
    function: Callable[..., Any], args: Sequence[Any], context: Context, compiler_options: CompilerOptions
) -> _Trial:
    compiled = compile_in(context, function, args, compiler_options)
    memory = compiled.program.memory_analysis()
    return _Trial(
        run=lambda: compiled(*args),
        temp_bytes=getattr(memory, "temp_size_in_bytes", None),
        program=program_hash(compiled.program),
    )


def program_hash(compiled: Any) -> str:
    """A hash of a compiled program without what does not matter: source lines, scope names, its own name."""
    text = compiled.as_text() or ""
    text = re.sub(r", metadata=\{[^{}]*\}", "", text)
    text = re.sub(r"(?m)^(HloModule|ENTRY) [^,\s]+", "", text)
    text = re.sub(r"(?ms)^FileNames$.*?(?=^(?:ENTRY|%))", "", text)
    return hashlib.sha256(text.encode()).hexdigest()[:16] if text else ""


def available_memory(device: Any) -> int | None:
    """Bytes that a candidate may take: half of what the device, or the host where it is the device, has left; None
    where that is not known."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    left = stats["bytes_limit"] - stats.get("bytes_in_use", 0) if stats and "bytes_limit" in stats else memory_left()
    return None if left is None else left // 2
