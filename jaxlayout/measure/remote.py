"""Measuring elsewhere: jobs go to the workers of any `concurrent.futures.Executor`, in processes and on machines that
are in all that matters like this one, and their records come back."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass, field
from typing import Any

import jax

from jaxlayout.measure.compiled import CompilerOptions
from jaxlayout.measure.contained import Proofs
from jaxlayout.measure.environment import Environment, current_environment
from jaxlayout.measure.jobs import Job
from jaxlayout.measure.trials import available_memory, measure
from jaxlayout.runtime.settings import for_tuning, under
from jaxlayout.table.measurement import Measurement
from jaxlayout.table.table import CostTable

logger = logging.getLogger("jaxlayout")

Records = dict[str, Measurement]

_proofs = CostTable(":memory:")
"""What has been seen to run in a process of its own on the machine of this worker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A job as it travels, with the environment in which its records will be believed."""

    make: Callable[[], Job]
    environment: Environment
    compiler_options: CompilerOptions
    relax: float
    """See `measure`."""
    settings: Mapping[str, Any] = field(default_factory=for_tuning)
    """JAX's, those of the thread that asks."""

    def __call__(self) -> Reply:
        """In the worker: measure, where it is like the place that asks."""
        start = time.monotonic()
        worker = f"{socket.gethostname()}:{os.getpid()}"
        with under(self.settings):
            device = jax.local_devices()[0]
            if unlike := _differences(self.environment, current_environment(device, dict(self.environment.versions))):
                return Reply(worker, {}, unlike, time.monotonic() - start)
            [(_, found)] = measure(
                [self.make()],
                device=device,
                memory_bytes=available_memory(device),
                relax=self.relax,
                compiler_options=self.compiler_options,
                prove=Proofs.of(_proofs, device, self.compiler_options, self.relax),
            )
        return Reply(worker, found, "", time.monotonic() - start)


@dataclass(frozen=True, slots=True)
class Reply:
    """What a worker says to a request."""

    worker: str
    """Its host and process."""
    records: Records
    refused: str
    """In what it is unlike the place that asked; '' if in nothing."""
    seconds: float


def measure_elsewhere(
    jobs: Sequence[Job],
    executor: Executor,
    request: Callable[[Callable[[], Job]], Request],
    stop: Callable[[], bool],
) -> Generator[tuple[Job, Records]]:
    """The records of jobs as they come in. One whose worker dies, or is unlike this place, is sent once more; what
    still has no records then is left out. Jobs that cannot travel are left out too. `stop`: asked now and then."""
    pending: dict[Future[Reply], _Sent] = {}

    def send(job: Job, make: Callable[[], Job], again: bool = False) -> None:
        try:
            pending[executor.submit(request(make))] = _Sent(job, make, again)
        except Exception as error:  # a pool that is broken, or closed
            logger.warning("%s cannot be sent: %r", job.key, error)

    for job in jobs:
        if job.make is not None:
            send(job, job.make)
    try:
        while pending and not stop():
            done, _ = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in done:
                sent = pending.pop(future)
                try:
                    reply = future.result()
                except Exception as error:
                    failure = f"its worker failed: {error!r}"
                else:
                    failure = reply.refused and f"worker {reply.worker} is unlike this place: {reply.refused}"
                    if not failure:
                        yield sent.job, reply.records
                        continue
                logger.warning("%s: %s%s", sent.job.key, failure, "" if sent.again else "; sent once more")
                if not sent.again:
                    send(sent.job, sent.make, again=True)
    finally:
        for future in pending:
            future.cancel()


@dataclass(frozen=True, slots=True)
class _Sent:
    job: Job
    make: Callable[[], Job]
    again: bool


def _differences(wanted: Environment, found: Environment) -> str:
    ours, theirs = wanted.to_json(), found.to_json()
    return ", ".join(f"{name} is {theirs[name]!r}, not {ours[name]!r}" for name in ours if ours[name] != theirs[name])
