"""The guards: the rewritten function runs in the original's place only if its numbers agree, its memory is
within the limit, its devices exchange no more, and it is faster, all seen on the whole compiled functions."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlayout.measure.compiled import Compiled
from jaxlayout.measure.turns import NoTurn
from jaxlayout.runtime.malloc import amid, soiled_memory
from jaxlayout.runtime.plain_data import flag, integer, number, one_of, optional, shown, text
from jaxlayout.runtime.timing import WARM_NS, Paired, timed_call
from jaxlayout.verify.accuracy import Accuracy
from jaxlayout.verify.race import race

HOPELESS = 5.0
"""The rewritten function is not run a second time when its first run takes this many times the original's, and long."""
LITTLE = 2**28
"""Bytes. A share of what a smaller function needs would be next to nothing: it may need as much more as such a one."""
TIE_DRAWS = 3
CAUSES = ("time", "numbers", "memory", "collectives", "failure", "untried")
"""What a verdict can go by. Read where another plan is tried (`tuning.memory_search`, `tuning.pipeline`), where
something is frozen (`api.frozen`), and where it is said in words (`report.words`, `cli.tune`)."""
MAX_REASON = 4000
"""Longest reason kept, in characters: compiler errors can run to megabytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What was seen of the two whole functions. Times in nanoseconds, memory in bytes."""

    kept: bool
    """Whether the rewritten function runs."""
    reason: str
    cause: str = "time"
    """What decided, one of CAUSES."""
    original_ns: float | None = None
    tuned_ns: float | None = None
    ratio: float | None = None
    """Median of the paired ratios original / tuned: above 1, the rewritten one is faster."""
    spread: float | None = None
    """Half the interquartile range of the ratios."""
    pairs: int = 0
    difference: float | None = None
    """The largest difference between outputs of the two, relative to the output's rms; without those of `noise`."""
    noise: tuple[int, ...] = ()
    """Outputs that differ by more than that, and no more than the original itself moves them where its arguments are
    rounded differently: rounding noise."""
    original_temp: int | None = None
    """Bytes of temporary memory that the original needs."""
    tuned_temp: int | None = None
    """Bytes that the rewritten one needs: likewise, and what its arguments take more than the original's, where
    they are prepared."""

    def __post_init__(self) -> None:
        if len(self.reason) > MAX_REASON:
            object.__setattr__(self, "reason", self.reason[: MAX_REASON - 4] + " ...")

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"noise": list(self.noise)}

    @classmethod
    def from_json(cls, data: Any) -> Verdict:
        """The inverse of `to_json`; ValueError, saying why, for anything else."""
        names = {field.name for field in fields(cls)}
        if not isinstance(data, dict) or data.keys() | {"noise"} != names:  # which verdicts have not always told
            raise ValueError(f"not a verdict: {shown(data)}")
        difference, noise = data["difference"], data.get("noise", ())
        if not isinstance(noise, list | tuple):
            raise ValueError(f"noise is {shown(noise)}, not a list")
        return cls(
            kept=flag("kept", data["kept"]),
            reason=text("reason", data["reason"], MAX_REASON),
            cause=one_of("cause", data["cause"], CAUSES),
            pairs=integer("pairs", data["pairs"], 10**9),
            difference=difference if difference in (None, math.inf) else number("difference", difference),
            noise=tuple(integer("noise", output, 2**31) for output in noise),
            **{name: optional(number, name, data[name]) for name in ("original_ns", "tuned_ns", "ratio", "spread")},
            **{name: optional(integer, name, data[name], 2**60) for name in ("original_temp", "tuned_temp")},
        )


def accept(
    before: Compiled,
    after: Compiled,
    args: Sequence[Any] | None,
    *,
    accuracy: Sequence[Accuracy],
    memory_limit: float,
    timed: bool = True,
    rival: tuple[Compiled, float] | None = None,
    relax: float = 1.0,
    stop: threading.Event | None = None,
    turn: Callable[[], AbstractContextManager[Any]] = nullcontext,
    first_run: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Verdict:
    """Compare what the original and the rewritten function, compiled, give for `args`, and time them in turn.

    `args`: None where they must not be run; only memory and collectives are compared then.
    `accuracy`: how accurate each output can be. `memory_limit`: what it may need in memory, arguments and results
    included, relative to the original. `rival`: what it is raced against in place of the original, and how many times
    faster than that it is. `relax`: multiplies the error allowed. `stop`: once it is set, timing ends with
    NoTurn. `turn`: entered while the two are timed, and at no other time. `first_run`: entered for the first run of the
    rewritten function.
    """
    seen, too_much = _memory(before, after, memory_limit)
    if too_much:
        return Verdict(kept=False, cause="memory", reason=too_much, **seen)
    if reason := more_collectives(before.program, after.program):
        return Verdict(kept=False, cause="collectives", reason=reason, **seen)
    if args is None:
        return Verdict(kept=True, cause="untried", reason="not run", **seen)
    expected, original_ns = timed_call(partial(before, *args))
    try:
        with first_run():
            found, tuned_ns = timed_call(partial(after, *args))
    except Exception as error:
        return Verdict(kept=False, cause="failure", reason=f"the rewritten function failed: {error!r}", **seen)
    compared = compare(before, args, expected, found, accuracy, relax)
    seen |= {"difference": compared.difference, "noise": compared.noise}
    if compared.reason:
        return Verdict(kept=False, cause="numbers", reason=compared.reason, **seen)
    if not timed:
        return Verdict(kept=True, cause="untried", reason="timing was not asked for", **seen)
    if tuned_ns > max(WARM_NS, HOPELESS * original_ns) and tuned_ns > HOPELESS * timed_call(partial(before, *args))[1]:
        reason = f"its first run took {tuned_ns / original_ns:.1f} times the original's"
        return Verdict(kept=False, reason=reason, original_ns=original_ns, tuned_ns=tuned_ns, **seen)
    other, ahead = rival or (before, 1.0)

    def timed_run(program: Compiled) -> Any:
        if stop is not None and stop.is_set():
            raise NoTurn("interrupted while two programs were timed")
        return program(*args)

    with turn():
        faster, times = race(lambda: timed_run(other), lambda: timed_run(after))
    return _raced(faster, times, ahead, seen)


def _memory(before: Compiled, after: Compiled, memory_limit: float) -> tuple[dict[str, Any], str]:
    """What both need in temporary memory, as a verdict has it, as far as it is known; and why that is too much, if it
    is."""
    old, new = before.program.memory_analysis(), after.program.memory_analysis()
    if old is None or new is None:
        return {}, ""
    more = _held(new) - _held(old)  # of frozen arguments it takes what is prepared of them
    written, tuned = old.temp_size_in_bytes, max(0, new.temp_size_in_bytes + more)
    allowed = written + allowance(_held(old) + written, memory_limit)
    prepared = f", {more} of them for prepared arguments" if more > 0 else ""
    reason = f"it needs {tuned} bytes of temporary memory{prepared}, {allowed:.0f} are allowed"
    return {"original_temp": written, "tuned_temp": tuned}, reason if tuned > allowed else ""


def _raced(faster: bool, times: Paired, ahead: float, seen: Mapping[str, Any]) -> Verdict:
    """The verdict after a race against a program that is so many times faster than the original."""
    words = "faster" if faster else "not surely faster" if times.ratio > 1 else "not faster"
    ratio = ahead * times.ratio
    return Verdict(
        kept=faster,
        reason=f"{words}: {ratio:.2f}x over {times.pairs} pairs",
        original_ns=1e6 * ahead * times.first_ms,
        tuned_ns=1e6 * times.second_ms,
        ratio=ratio,
        spread=ahead * times.spread,
        pairs=times.pairs,
        **seen,
    )


def allowance(whole: float, memory_limit: float) -> float:
    """Bytes that may be needed beyond those that a function needs as a whole."""
    return (memory_limit - 1) * max(whole, LITTLE)


def _held(memory: Any) -> int:
    """Bytes of arguments and results."""
    return memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes


_COLLECTIVES = (
    "all-gather|all-reduce|all-to-all|collective-broadcast|collective-permute|ragged-all-to-all|reduce-scatter"
)
_COLLECTIVE = re.compile(rf"= (.*?) ({_COLLECTIVES})(?:-start)?\(")
_SHAPE = re.compile(r"\b[a-z]+(\d*)[a-z0-9]*\[([\d,]*)\]")


def collectives(program: Any) -> dict[str, tuple[int, int]]:
    """What the devices of a compiled program exchange: for each kind of collective, how many there are (one may take
    several arrays), and how many bits come of them on each device."""
    found: dict[str, tuple[int, int]] = {}
    for shapes, kind in _COLLECTIVE.findall(program.as_text() or ""):
        arrays = _SHAPE.findall(shapes)
        bits = sum(int(width or 8) * math.prod(map(int, filter(None, sizes.split(",")))) for width, sizes in arrays)
        count, sum_ = found.get(kind, (0, 0))
        found[kind] = count + 1, sum_ + bits
    return found


def more_collectives(before: Any, after: Any) -> str:
    """What a compiled program exchanges that another does not; '' if nothing."""
    if len(before.runtime_executable().local_devices()) == 1:
        return ""
    old, new = collectives(before), collectives(after)
    for kind, (count, bits) in new.items():
        had, of = old.get(kind, (0, 0))
        if count > had or bits > of:
            return f"it has {count} {kind} of {bits // 8} bytes in all, the original {had} of {of // 8}"
    return ""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What was seen of the outputs of two functions: see `Verdict`."""

    difference: float
    noise: tuple[int, ...] = ()
    reason: str = ""
    """Why they do not agree; '' if they do."""


def compare(
    original: Callable[..., Sequence[Any]],
    args: Sequence[Any],
    expected: Sequence[Any],
    found: Sequence[Any],
    accuracy: Sequence[Accuracy],
    relax: float = 1.0,
) -> Comparison:
    """Whether two functions agree in what they give for some arguments.

    Floating-point outputs agree within the tolerance of their rms that goes with their accuracy, or within what the
    original itself moves by when its inputs are rounded differently (four times the largest of three draws), and have
    NaN and Inf in the same places. Other outputs are equal, except where the original's own answer changes under such
    draws: an argmax on a tie has no one answer. Arguments coarser than an output can be are not moved for it. Where the
    original gives something else each time that it is run, what it moves by says nothing, and nothing agrees with it.
    """
    draws: dict[float, list[Sequence[Any]]] = {}

    def moved(i: int) -> list[Any]:
        eps = accuracy[i].eps
        if eps not in draws:
            draws[eps] = [original(*rounded) for seed in range(TIE_DRAWS) if (rounded := _rounded(args, eps, seed))]
        return [draw[i] for draw in draws[eps]]

    again = cache(lambda: _again(original, args))
    unsteady = "of the original itself is another in a second run on the same arguments"
    worst, noise = 0.0, []
    for i, (a, b) in enumerate(zip(expected, found, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            why = f"output {i} is {b.dtype}{b.shape} instead of {a.dtype}{a.shape}"
            return Comparison(math.inf, tuple(noise), why)
        if not jnp.issubdtype(a.dtype, jnp.inexact):
            x, y = _plain(a), _plain(b)
            if np.array_equal(x, y):
                continue
            if not np.array_equal(x, _plain(again()[i])):
                return Comparison(math.inf, tuple(noise), f"output {i} ({a.dtype}) {unsteady}")
            tied = np.zeros(x.shape, bool)
            for draw in moved(i):
                tied |= _plain(draw) != x
            if np.any((x != y) & ~tied):
                why = f"output {i} ({a.dtype}) differs where the original has no tie"
                return Comparison(math.inf, tuple(noise), why)
            continue
        x, y = _wide(a), _wide(b)
        deviation, tolerance = _deviation(x, y), accuracy[i].tolerance(relax)
        if deviation <= tolerance:
            worst = max(worst, deviation)
        elif not (own := _deviation(x, _wide(again()[i]))) <= tolerance:
            return Comparison(max(worst, deviation), tuple(noise), f"output {i} {unsteady}, by {own:.2g} of its rms")
        elif deviation <= 4 * max((_deviation(x, _wide(draw)) for draw in moved(i)), default=0.0):
            noise.append(i)
        else:
            why = f"output {i} differs by {deviation:.2g} of its rms, {tolerance:.2g} is allowed"
            return Comparison(max(worst, deviation), tuple(noise), why)
    return Comparison(worst, tuple(noise))


def _deviation(x: np.ndarray, y: np.ndarray) -> float:
    """The largest difference relative to the rms of x; infinite where NaN or Inf are in other places, and where x is
    nothing but zeros and y is not."""
    finite = np.isfinite(x)
    if not np.array_equal(np.where(finite, 0, x), np.where(np.isfinite(y), 0, y), equal_nan=True):
        return math.inf
    x, y = x[finite], y[finite]
    largest = float(np.max(np.abs(x), initial=0.0)) or 1.0
    rms = largest * float(np.sqrt(np.mean(np.abs(x / largest) ** 2))) if x.size else 0.0  # whose squares may overflow
    most = float(np.max(np.abs(x - y), initial=0.0))
    return most / rms if rms else math.inf if most else 0.0


def _again(original: Callable[..., Sequence[Any]], args: Sequence[Any]) -> Sequence[Any]:
    """What a function gives for the same arguments elsewhere in memory, with no zeros around."""

    def elsewhere(x: Any) -> Any:
        plain = jnp.issubdtype(x.dtype, np.number)
        return jax.device_put(amid(np.asarray(x)), x.sharding) if plain else x

    moved = list(map(elsewhere, args))
    with soiled_memory():
        return jax.block_until_ready(original(*moved))


def _wide(array: Any) -> np.ndarray:
    kind = np.complex128 if jnp.issubdtype(array.dtype, jnp.complexfloating) else np.float64
    return np.asarray(array).astype(kind)


def _plain(array: Any) -> np.ndarray:
    keys = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(array) if keys else array)


def _rounded(args: Sequence[Any], eps: float, seed: int) -> list[Any] | None:
    """The arguments, every floating-point number moved by a last place up or down at random, where that is no more than
    `eps`; None where it is more in all of them."""
    rng = np.random.default_rng(seed)

    def fine(x: Any) -> bool:
        return bool(jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).eps <= eps)

    def one(x: Any) -> Any:
        array = np.asarray(x)
        own = float(jnp.finfo(x.dtype).eps)
        moved = array.astype(np.float64) * (1 + own * rng.choice((-1.0, 1.0), array.shape))
        return jax.device_put(moved.astype(array.dtype), x.sharding)

    return [one(x) if fine(x) else x for x in args] if any(map(fine, args)) else None


def liveliest(run: Callable[..., Sequence[Any]], arguments: Iterable[Sequence[Any]]) -> Sequence[Any]:
    """Those arguments under which most outputs are alive, the first that do it for all. A dead output (constant,
    or with NaN and Inf in it) proves nothing about how it was computed."""
    best: Sequence[Any] = ()
    most = -1
    for args in arguments:
        alive = [_is_alive(out) for out in run(*args)]
        if sum(alive) > most:
            best, most = args, sum(alive)
        if all(alive):
            break
    return best


def _is_alive(out: Any) -> bool:
    if not jnp.issubdtype(out.dtype, jnp.inexact) or out.size == 0:
        return True
    values = np.abs(_wide(out))
    return bool(np.isfinite(values).all() and (np.ptp(values) if out.size > 1 else values.sum()) > 0)


def draws(shapes: Sequence[Any]) -> Iterator[list[Any]]:
    """Made-up arguments of given shapes, dtypes and shardings, one set for each way of drawing numbers."""
    for draw in (_weights, _normal, _positive):
        rng = np.random.default_rng(0)
        yield [jax.device_put(_argument(rng, x, draw), getattr(x, "sharding", None)) for x in shapes]


def _weights(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """As a network has them: vectors (scales, variances) near 1, arrays that keep the size of what they meet."""
    if len(shape) < 2:
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    return rng.standard_normal(shape, np.float32) / math.prod(shape[:-1]) ** 0.5


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


def _positive(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """For logarithms, square roots and the like."""
    return rng.uniform(0.5, 1.5, shape).astype(np.float32)


def _argument(rng: np.random.Generator, like: Any, draw: Callable[..., np.ndarray]) -> Any:
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        kinds: list[Any] = []
        jax.eval_shape(lambda key: kinds.append(jax.random.key_impl(key)), like)  # which wants an array, or a tracer
        count = math.prod(like.shape)
        keys = jax.random.split(jax.random.key(0, impl=kinds[0]), max(1, count))
        return keys[:count].reshape(like.shape)
    if jnp.issubdtype(like.dtype, jnp.inexact):
        return draw(rng, like.shape).astype(like.dtype)
    return rng.integers(0, 2, like.shape).astype(like.dtype)
