"""What may crash is run in a process of its own first (`helper`), and only what came through may run here.

A form (a convolution through a lowering in some layouts) that takes its process down, hangs, gives another result each
time or reads memory that is not its own is a record like any other failure. What came through is a record, too, of this
machine alone: in a file beside the table's, which is never exported, imported or merged.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import logging
import os
import pathlib
import platform
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from jaxlayout.convs.candidates import Candidate
from jaxlayout.convs.lowering import lowering_named, may_crash, not_importable
from jaxlayout.convs.signature import ConvSignature
from jaxlayout.measure.compiled import CompilerOptions
from jaxlayout.measure.environment import current_environment, settings
from jaxlayout.measure.jobs import candidate_id
from jaxlayout.measure.trials import available_memory
from jaxlayout.runtime.process import OfProcess
from jaxlayout.runtime.threads import default_device
from jaxlayout.table.measurement import Measurement, failed
from jaxlayout.table.table import CostTable

START_SECONDS = 120.0
"""Longest that the helper may take to import JAX, or a module with lowerings."""
FORM_SECONDS, SLOWEST = 30.0, 1e8
"""Longest that a form may take: so many seconds, and one more for so many multiply-adds."""
IDLE_SECONDS = 60.0
"""A helper that nobody asks anything for so long ends."""
POLL_SECONDS = 0.1
LAST_LINES, LAST_BYTES = 8, 1200
"""What is kept of what a process said before it died."""

ALIKE = ("jax", "jaxlib", "xla", "platform_version", "cpu_features", "cores", "variables", "config")
"""Fields of an `Environment` in which a helper has to be like this process."""
ALONE = ("JAX_COORDINATOR", "JAX_CPU_COLLECTIVES", "JAX_LOCAL_", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "OMPI_", "PMI")
"""How the variables begin that a helper does without: they make a process one of many."""

Stop = Callable[[], bool]
"""Asked now and then whether to give up."""

logger = logging.getLogger("jaxlayout")


class NoHelper(RuntimeError):
    """No helper process can be had here, and why."""


class Died(Exception):
    """A helper has gone, or had to be ended, without an answer: how, and its last words."""


def never() -> bool:
    """Do not give up."""
    return False


@dataclass(frozen=True, slots=True)
class Proofs:
    """Says of a form what came of it in a process of its own: from a table, or by running it there."""

    table: CostTable
    environment: str
    device: Any
    compiler_options: CompilerOptions
    relax: float
    stop: Stop

    @classmethod
    def of(
        cls, table: CostTable, device: Any, compiler_options: CompilerOptions, relax: float = 1.0, stop: Stop = never
    ) -> Proofs:
        """`table`: of this machine's proofs. `relax`: multiplies the error allowed."""
        versions = {"compiler_options": json.dumps(compiler_options or "", sort_keys=True), "machine": this_machine()}
        environment = f"{current_environment(device, versions).fingerprint}-{relax:g}"
        return cls(table, environment, device, compiler_options, relax, stop)

    def offers(self, name: str) -> bool:
        """Whether the forms of a lowering that may crash can be run in a process of their own here. One that may not
        crash has no need of that."""
        if not may_crash(name):
            return True
        if self.device.platform != "cpu":
            return False
        try:
            with process_helpers.value.one(self.device, self.stop) as helper:
                return not helper.refusal(name, self.stop)
        except NoHelper:  # it is in the log
            return False

    def __call__(self, conv: ConvSignature, candidate: Candidate) -> Measurement:
        """What came of a form; where that is "ok" it may run here. NoHelper where it cannot be known."""
        conv = replace(conv, context="entry")  # it is run in both
        name = candidate_id(candidate)
        found = self.table.measurements(self.environment, conv.key).get(name)
        if found is None:
            found = self._run(conv, candidate)
            self.table.record(self.environment, conv.key, name, found)
        return found

    def objection(self, conv: ConvSignature, candidate: Candidate) -> str:
        """Why a form must not run here; '' if it may."""
        if not may_crash(candidate.lowering):
            return ""
        try:
            found = self(conv, candidate)
        except NoHelper as error:
            return str(error)
        return "" if found.status == "ok" else found.detail

    def _run(self, conv: ConvSignature, candidate: Candidate) -> Measurement:
        try:
            what = {"conv": conv.to_json(), "candidate": str(candidate)}
        except ValueError as error:
            return failed("failed", f"it cannot be run in a process of its own: {error}")
        how = {"compiler_options": self.compiler_options, "relax": self.relax}
        limits = {"memory": available_memory(self.device), "seconds": FORM_SECONDS + conv.macs / SLOWEST}
        with process_helpers.value.one(self.device, self.stop) as helper:
            if why := helper.refusal(candidate.lowering, self.stop):
                raise NoHelper(why)
            try:
                answer = helper.ask(what | how | limits, self.stop)
            except Died as error:
                return failed("failed", f"in a process of its own it {error}")
            if answer["spent"]:
                helper.close()
            return Measurement.from_json(answer["measurement"])


class Helper:
    """A helper process, asked one thing at a time."""

    def __init__(self, device: Any, config: Mapping[str, Any], stop: Stop = never):
        """Start it, with JAX set as `config` says. NoHelper where that cannot be."""
        self.config, self.closed = config, False
        self._refused: dict[str, str] = {}
        name = pathlib.Path(sys.executable or "").name.lower()
        if os.name != "posix" or not ("python" in name or "pypy" in name):
            raise NoHelper(f"there is no Python to start: sys.executable is {sys.executable!r}, on {os.name}")
        command = [sys.executable, "-P", "-m", "jaxlayout.measure.helper", str(IDLE_SECONDS)]
        with contextlib.ExitStack() as stack:
            try:
                self._errors = stack.enter_context(tempfile.TemporaryFile())
                self.process = subprocess.Popen(
                    command,
                    bufsize=0,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._errors,
                    env=environment_alone(os.environ),
                    start_new_session=True,
                )
            except OSError as error:
                raise NoHelper(f"{' '.join(command)} cannot be started: {error}") from error
            stack.pop_all()
        try:
            found = self.ask({"config": config, "seconds": START_SECONDS}, stop)["environment"]
        except Died as error:
            raise NoHelper(f"{' '.join(command)} {error}") from error
        ours = json.loads(json.dumps(current_environment(device).to_json()))
        if unlike := [f"{name} is {found[name]!r}, not {ours[name]!r}" for name in ALIKE if found[name] != ours[name]]:
            self.close()
            raise NoHelper(f"another process is unlike this one: {', '.join(unlike)}")

    def refusal(self, name: str, stop: Stop = never) -> str:
        """Why a lowering cannot be had there; '' if it can."""
        parts = {part: lowering_named(part) for part in name.split("/")}
        classes = {part: (type(one).__module__, type(one).__qualname__, one.version) for part, one in parts.items()}
        if (key := json.dumps(classes)) not in self._refused:
            why = next(filter(None, (not_importable(type(one)) for one in parts.values())), "")
            try:
                why = why or self.ask({"lowerings": classes, "seconds": START_SECONDS}, stop)["refused"]
            except Died as error:
                why = f"the process that was to import it {error}"
            if why:
                logger.warning("lowering %r is not offered: another process has to run it first, but %s", name, why)
            self._refused[key] = why
        return self._refused[key]

    def ask(self, request: Mapping[str, Any], stop: Stop = never) -> dict[str, Any]:
        """Its answer. Where none comes it is closed: Died after `request["seconds"]`, or when it is gone;
        KeyboardInterrupt where this is to give up."""
        before, deadline = self._errors.seek(0, os.SEEK_END), time.monotonic() + request["seconds"]
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None
        ready, answer = select.poll(), b""  # `select` knows no descriptor beyond the first 1024
        ready.register(stdout)
        try:
            with contextlib.suppress(BrokenPipeError):  # then it is gone, see below
                stdin.write(json.dumps(request).encode() + b"\n")
            while not answer.endswith(b"\n"):
                gone = self.process.poll() is not None  # before reading on: it may have answered and ended since
                if ready.poll(0 if gone else 1e3 * POLL_SECONDS):
                    some = os.read(stdout.fileno(), 2**16)
                    answer += some
                    gone = not some
                if answer.endswith(b"\n"):
                    break
                if gone:  # a fork of it may hold the pipe open
                    raise Died(f"{self._end()}{self._said(before)}")
                if time.monotonic() > deadline:
                    raise Died(f"gave no answer within {request['seconds']:.0f} s{self._said(before)}")
                if stop():
                    raise KeyboardInterrupt("interrupted while a form was run in a process of its own")
        except BaseException:
            self.close()
            raise
        return json.loads(answer)

    def answers(self, stop: Stop = never) -> bool:
        """Whether it is still there: it may have ended by itself, or been killed by somebody, which is no form's fault.
        (A process of several threads may be dying without having ended yet.)"""
        try:
            return not self.closed and self.ask({"lowerings": {}, "seconds": START_SECONDS}, stop) == {"refused": ""}
        except Died:
            return False

    def close(self) -> None:
        """End it, and all that was started from it."""
        if self.closed:
            return
        self.closed = True
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for file in (self.process.stdin, self.process.stdout, self._errors):
            if file is not None:
                file.close()

    def _end(self) -> str:
        """How it ended, in words."""
        try:
            status = self.process.wait(5.0)
        except subprocess.TimeoutExpired:
            return "closed its output"
        return f"died by {_signal(-status)}" if status < 0 else f"ended with exit status {status}"

    def _said(self, before: int) -> str:
        """Its last lines since then, in words."""
        size = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(before, size - LAST_BYTES))
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        return f": {chr(10).join(lines[-LAST_LINES:])}" if lines else ""


def start_seconds() -> float:
    """How long it takes until a new helper is ready. NoHelper where none can be had."""
    start = time.monotonic()
    helper = Helper(default_device(), settings())
    helper.close()
    return time.monotonic() - start


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def environment_alone(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment variables for a helper: those of this process, but on CPUs, none of many processes, with nothing
    kept or written that is the user's, and finding the modules that are found here."""
    found = {name: value for name, value in environ.items() if not name.startswith(ALONE)}
    if flags := found.get("XLA_FLAGS"):
        found["XLA_FLAGS"] = " ".join(flag for flag in flags.split() if not flag.startswith("--xla_dump_"))
    ours = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false", "JAXLAYOUT_POLICY": "off"}
    paths = [os.fsdecode(path) for path in sys.path if isinstance(path, str | bytes | os.PathLike)]
    return found | ours | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in paths)}


@functools.cache
def this_machine() -> str:
    """What no other machine goes by."""
    try:
        known = pathlib.Path("/etc/machine-id").read_text().strip()
    except OSError:
        known = ""
    return f"{known or uuid.getnode()} {platform.node()}"


class Helpers:
    """This process's helper, while it has one."""

    def __init__(self) -> None:
        self.helper: Helper | None = None
        self.none: dict[str, str] = {}
        """By settings, why no helper can be had: it is not tried again."""
        self._turn = threading.Lock()

    @contextlib.contextmanager
    def one(self, device: Any, stop: Stop) -> Iterator[Helper]:
        """The helper, for one user at a time; started when there is none, or none that serves. NoHelper where none can
        be had."""
        config = settings()
        while not self._turn.acquire(timeout=POLL_SECONDS):
            if stop():
                raise KeyboardInterrupt("interrupted while another thread had a form run in a process of its own")
        try:
            if self.helper is not None and (self.helper.config != config or not self.helper.answers(stop)):
                self.close()
            if self.helper is None:
                self.helper = self._started(device, config, stop)
            yield self.helper
        finally:
            self._turn.release()

    def close(self) -> None:
        """End it, if there is one."""
        if self.helper is not None:
            self.helper.close()
            self.helper = None

    def _started(self, device: Any, config: Mapping[str, Any], stop: Stop) -> Helper:
        place = json.dumps(config, sort_keys=True)
        if place in self.none:
            raise NoHelper(self.none[place])
        try:
            return Helper(device, config, stop)
        except NoHelper as error:
            self.none[place] = str(error)
            logger.warning("lowerings that may crash are not offered: %s", error)
            raise


process_helpers = OfProcess(Helpers)
atexit.register(lambda: process_helpers.value.close())
