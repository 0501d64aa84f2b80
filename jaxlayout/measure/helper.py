"""The helper process: it runs forms that may take a process down, and says what came of them. `contained` starts it.

    python -m jaxlayout.measure.helper SECONDS

A request a line on standard input, an answer a line on standard output, both JSON. What a form prints goes to standard
error. It ends with who started it, or when nobody has asked anything for SECONDS, and what a form has left running with
it.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import resource
import select
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from jaxlayout.convs.candidates import Candidate
from jaxlayout.convs.lowering import lowering_named, lowerings, register_lowering
from jaxlayout.convs.signature import ConvSignature
from jaxlayout.layout import ConvDimensionNumbers
from jaxlayout.measure.compiled import CompilerOptions, compile_in, program_hash
from jaxlayout.measure.environment import current_environment, settings
from jaxlayout.measure.jobs import candidate_id, conv_job
from jaxlayout.runtime.malloc import NANS, amid, keep_freed_memory
from jaxlayout.runtime.timing import timed_call
from jaxlayout.table.measurement import Measurement, failed

CROWD = 4
"""So many in the entry computation and so many in a branch run at the same time, from two threads."""
ZEROS = 0x00
"""Bytes of any dtype's zeros."""


def main() -> None:
    """Answer until there is nobody to answer to."""
    requests, send = _channels()
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    keep_freed_memory()  # so that what is freed is what is handed out next, with our bytes in it
    while (request := _next(requests)) is not None:
        signal.alarm(int(2 * request["seconds"]) + 10)  # the last resort, where what hangs lets no thread of ours run
        send(_answer(request))
        signal.alarm(0)
    _end()


def _channels() -> tuple[queue.Queue[dict[str, Any] | None], Callable[[Any], None]]:
    """Requests (None: no more will come) and how to answer them, over descriptors that no form knows of."""
    asked, answers = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    requests: queue.Queue[dict[str, Any] | None] = queue.Queue()
    parent = os.getppid()

    def read() -> None:
        pending = b""
        while os.getppid() == parent:  # a fork of it may hold the pipe open when it is gone
            if not select.select([asked], [], [], 1.0)[0]:
                continue
            if not (some := os.read(asked, 2**16)):
                break
            *lines, pending = (pending + some).split(b"\n")
            for line in lines:
                requests.put(json.loads(line))
        _end()

    threading.Thread(target=read, daemon=True).start()

    def send(answer: Any) -> None:
        with open(answers, "wb", closefd=False) as file:
            file.write(json.dumps(answer).encode() + b"\n")

    return requests, send


def _next(requests: queue.Queue[dict[str, Any] | None]) -> dict[str, Any] | None:
    try:
        return requests.get(timeout=float(sys.argv[1]))
    except queue.Empty:
        return None


def _end() -> None:
    """The end of this process and of all that it has started."""
    os.killpg(0, signal.SIGKILL)


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """What came of a request, by its kind. `spent`: whether this process should not be asked anything more."""
    if "config" in request:
        return {"environment": _settled(request["config"])}
    if "lowerings" in request:
        reasons = (_loaded(name, *place) for name, place in request["lowerings"].items())
        return {"refused": next(filter(None, reasons), "")}
    conv, candidate = ConvSignature.from_json(request["conv"]), Candidate.parse(request["candidate"])
    try:
        found = prove(conv, candidate, request["compiler_options"], request["relax"], request["memory"])
    except BaseException as error:  # whatever it raises is its result
        found = failed("failed", repr(error))
    if left := _left_running():
        found = failed("failed", "it leaves a process behind")
    return {"measurement": found.to_json(), "spent": left or found.status == "wrong"}


def _settled(config: Mapping[str, Any]) -> dict[str, Any]:
    """Set JAX as it is set there; what it is like here."""
    for name, value in config.items():
        if settings().get(name) != value:
            jax.config.update(name, value)
    return current_environment(jax.local_devices()[0]).to_json()


def _loaded(name: str, module: str, qualname: str, version: int) -> str:
    """Have the lowering of that name; its module may register it. Why that cannot be, or ''."""
    try:
        cls = attrgetter(qualname)(importlib.import_module(module))
        found = lowerings().get(name) or register_lowering(cls())
    except BaseException as error:
        return f"{module}.{qualname} cannot be imported in another process: {error!r}"
    if type(found) is not cls or found.version != version:
        return f"another process finds version {found.version} of {type(found)} there, not {version} of {cls}"
    return ""


def _left_running() -> bool:
    """Whether any process that was started from here still runs."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def prove(
    conv: ConvSignature, candidate: Candidate, compiler_options: CompilerOptions, relax: float, memory_bytes: int | None
) -> Measurement:
    """Run a form as it may have to run: in an entry computation, with zeros and with NaNs in the memory around its
    operands; its kernel prepared before; several at once, in a branch too, from two threads. "ok" where each result is
    right and the same program gave the same one each time.

    `relax`: multiplies the error allowed. `memory_bytes`: what it may take beside its operands, None for any.
    """
    usual = Candidate("xla", ConvDimensionNumbers.channels_last(conv.rank))
    job = conv_job(conv, [usual, candidate])
    name, base = candidate_id(candidate), candidate_id(usual)
    arrays, error_of = job.inputs()
    assert error_of is not None
    form, operands = job.alternatives[name], arrays(name)
    nested = conv_job(replace(conv, context="nested"), [candidate]).alternatives[name]
    quiet, noisy = ([jax.device_put(amid(array, fill), may_alias=True) for array in operands] for fill in (ZEROS, NANS))
    with _memory_limit(memory_bytes):
        alone = compile_in("entry", form, quiet, compiler_options)
        temp = alone.program.memory_analysis().temp_size_in_bytes
        if memory_bytes is not None and temp > memory_bytes:
            return failed("memory", f"needs {temp} bytes of temporary memory, {memory_bytes} are allowed")
        outs, ns = [], 0.0
        for fill, args in ((ZEROS, quiet), (ZEROS, quiet), (NANS, noisy)):
            _scribble(fill, (*(array.nbytes for array in operands), temp, *(out.nbytes for out in outs[:1])))
            out, ns = timed_call(partial(alone, *args))
            outs.append(np.array(out))
        if not _same(outs[0], outs[1]):
            return failed("wrong", "it gives another result each time")
        if not _same(outs[0], outs[2]):
            return failed("wrong", "its result depends on memory that is not its own")
        prepared = [] if conv.is_empty else [_prepared_before(conv, candidate, *noisy)]
        each = 2 * (temp + outs[0].nbytes) + 1
        few = CROWD if memory_bytes is None else max(1, min(CROWD, memory_bytes // each))
        crowd = _crowded(form, nested, noisy, few, compiler_options)
        with ThreadPoolExecutor(2) as threads:
            ran = [run.result() for run in [threads.submit(lambda: jax.block_until_ready(crowd())) for _ in range(2)]]
        if not all(map(_same, *ran)):
            return failed("wrong", "it gives another result each time, with others at the same time")
    worst, allowed = max(error_of(name, out) for out in (outs[0], *prepared, *ran[0])), relax * job.bound(0.0)
    if worst > allowed:  # by itself: then what XLA's own does counts, too
        own = compile_in("entry", job.alternatives[base], arrays(base), compiler_options)
        allowed = relax * job.bound(error_of(base, own(*arrays(base))))
    if worst > allowed:
        return failed("wrong", f"error {worst:.3g}, allowed {allowed:.3g}", error=worst)
    return Measurement(
        status="ok",
        median_ns=ns,
        spread_ns=None,
        runs=len(outs),
        error=worst,
        temp_bytes=temp,
        program=program_hash(alone.program),
    )


def _prepared_before(conv: ConvSignature, candidate: Candidate, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """The result of a form whose kernel is prepared in a program of its own, as where it is frozen."""
    lowering = lowering_named(candidate.lowering)
    prepared = jax.jit(lambda rhs: lowering.prepare(conv, candidate.dims, rhs))(rhs)
    apply = jax.jit(lambda lhs, prepared: lowering.apply(conv, candidate.dims, lhs, prepared))
    return jax.block_until_ready(apply(lhs, prepared))


def _crowded(
    entry: Callable[..., Any],
    nested: Callable[..., Any],
    operands: Sequence[Any],
    few: int,
    options: CompilerOptions,
) -> Callable[[], Any]:
    """A program of so many of one form in the entry computation and so many in a branch."""

    def crowd(flag: Any, *pairs: Any) -> list[Any]:  # as many arguments as convolutions, or they would be one
        def some(form: Callable[..., Any], *pairs: Any) -> list[Any]:
            return [form(*pairs[i : i + 2]) for i in range(0, len(pairs), 2)]

        def none(*pairs: Any) -> list[Any]:
            return [jnp.zeros(out.shape, out.dtype) for out in jax.eval_shape(inside, *pairs)]

        inside = partial(some, nested)
        return some(entry, *pairs[: 2 * few]) + lax.cond(flag, inside, none, *pairs[2 * few :])

    args = (jnp.array(True), *(2 * few) * tuple(operands))
    compiled = jax.jit(crowd, keep_unused=True).lower(*args).compile(options)
    return lambda: compiled(*args)


def _scribble(fill: int, sizes: Sequence[int]) -> None:
    """Leave some byte in the memory that is handed out next."""
    held = [np.full(size + 64, fill, np.uint8) for size in sizes for _ in range(2)]
    del held


def _same(one: Any, other: Any) -> bool:
    """To the bit, NaN or not."""
    one, other = (np.ascontiguousarray(out).reshape(-1).view(np.uint8) for out in (one, other))
    return np.array_equal(one, other)


class _memory_limit:
    """For the length of a `with` block this process may have so many bytes more than it has (on Linux; None: any)."""

    def __init__(self, more: int | None):
        self.more = more

    def __enter__(self) -> None:
        self.before = resource.getrlimit(resource.RLIMIT_DATA)
        lines = Path("/proc/self/status").read_text().splitlines() if Path("/proc/self/status").exists() else []
        held = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:")]
        if held and self.more is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (held[0] + self.more, self.before[1]))

    def __exit__(self, *exception: object) -> None:
        resource.setrlimit(resource.RLIMIT_DATA, self.before)


if __name__ == "__main__":
    main()
