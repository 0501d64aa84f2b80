"""Measuring by workers: jobs a second against their number, and what a job costs beyond its measuring.

    pip install 'jaxlayout[bench]'
    python -m bench.remote

A job is a small convolution in its usual orders, or (cases `transpose`) a tiny transpose: compiled, drawn, timed. It is
measured here, and by workers of a process pool (and Dask's, where it is installed) on this machine. All of one machine
time in turn, so here more workers gain what can be done beside timing, and no more: starting, tracing, the way there
and back. What a job costs beyond the seconds that its worker spent on it (waiting for the others' timing included) is
the overhead: the wall-clock time of all, times workers, less those seconds, for each job.

The cases `asleep` are NO measurements: workers sleep for 50 ms instead, each with a lock of its own as on a machine of
its own. They show how fast jobs are handed out to many, and nothing else.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bench.rows import Row, write_rows
from bench.timing import machine
from jaxlayout.convs.candidates import Candidate, candidates
from jaxlayout.convs.signature import ConvSignature
from jaxlayout.measure.environment import current_environment
from jaxlayout.measure.jobs import Job, conv_job, transpose_job
from jaxlayout.measure.remote import Reply, Request, measure_elsewhere
from jaxlayout.measure.trials import measure
from jaxlayout.measure.turns import Turns
from jaxlayout.runtime.threads import default_device

ASLEEP = 0.05
DIMS = "NCHW,OIHW->NCHW"


def convolution(features: int) -> Job:
    """A small one, in the two usual orders."""

    def conv(x: Any, k: Any) -> Any:
        return lax.conv_general_dilated(x, k, (1, 1), "SAME")

    x, k = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, features, 8, 8), (4, features, 3, 3)))
    signature = ConvSignature.of(x, k, jax.make_jaxpr(conv)(x, k).eqns[0].params)
    found = candidates(signature, Candidate.parse(f"xla:{DIMS}"))
    return conv_job(signature, [candidate for candidate in found if candidate.lowering == "xla"])


def convolutions(count: int) -> list[Job]:
    """All different."""
    return [convolution(features) for features in range(1, count + 1)]


def transposes(count: int) -> list[Job]:
    """Of a few numbers, all different."""
    return [transpose_job((2, n), np.dtype("float32"), (1, 0), "entry") for n in range(2, count + 2)]


@dataclass(frozen=True, slots=True)
class Asleep:
    """In the place of a `Request`: has the turn to time on its machine for a while."""

    def __call__(self) -> Reply:
        start = time.monotonic()
        with Turns().timing():
            time.sleep(ASLEEP)
        return Reply("asleep", {}, "", time.monotonic() - start)


def ready() -> str:
    """Run first in each worker."""
    time.sleep(1.0)  # so that each of the others takes one too
    return str(jax.local_devices()[0])


def alone() -> None:
    """Makes a worker take no other's lock."""
    tempfile.tempdir = tempfile.mkdtemp()


class Told(Executor):
    """Another executor, with the replies that come back."""

    def __init__(self, executor: Executor):
        self.executor = executor
        self.futures: list[Future[Reply]] = []

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.futures.append(future := self.executor.submit(fn, *args, **kwargs))
        return future


@contextmanager
def pool(workers: int, *, apart: bool = False) -> Iterator[Executor]:
    """Processes, started and with JAX imported. `apart`: each with a timing lock of its own."""
    context = multiprocessing.get_context("spawn")  # JAX has threads: a fork of them may hang
    with ProcessPoolExecutor(workers, context, initializer=alone if apart else None) as executor:
        wait([executor.submit(ready) for _ in range(workers)])
        yield executor


@contextmanager
def dask(workers: int) -> Iterator[Executor]:
    """Dask's, as processes of this machine."""
    import distributed

    with (
        tempfile.TemporaryDirectory() as folder,
        distributed.LocalCluster(
            n_workers=workers, threads_per_worker=1, processes=True, dashboard_address=None, local_directory=folder
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        executor = client.get_executor(pure=False)
        wait([executor.submit(ready) for _ in range(workers)])
        yield executor


def here(jobs: Sequence[Job]) -> Row:
    """Measured in this process."""
    start = time.monotonic()
    found = list(measure(jobs, device=default_device()))
    assert len(found) == len(jobs)
    seconds = time.monotonic() - start
    return {"workers": 0, "jobs": len(jobs), "seconds": seconds, "jobs_per_s": len(jobs) / seconds}


def elsewhere(
    jobs: Sequence[Job], started: Callable[..., Any], workers: int, request: Callable[[Any], Any], **keywords: Any
) -> Row:
    """Measured by workers."""
    with started(workers, **keywords) as executor:
        told = Told(executor)
        start = time.monotonic()
        found = list(measure_elsewhere(jobs, told, request, lambda: False))
        seconds = time.monotonic() - start
        inside = sum(future.result().seconds for future in told.futures)
    assert len(found) == len(jobs) == len(told.futures), "a worker failed"
    return {
        "workers": workers,
        "jobs": len(jobs),
        "seconds": seconds,
        "jobs_per_s": len(jobs) / seconds,
        "in_worker_ms": 1e3 * inside / len(jobs),
        "overhead_ms": 1e3 * (min(workers, len(jobs)) * seconds - inside) / len(jobs),
    }


def asked(make: Callable[[], Job]) -> Request:
    """As `tune` asks."""
    return Request(make=make, environment=current_environment(), compiler_options=None, relax=1.0)


def asleep(make: Any) -> Asleep:
    """Nothing to measure."""
    return Asleep()


def cases(small: bool) -> dict[str, Callable[[], Row]]:
    """By name."""
    convs, tiny, sleeping = (3, 3, 6) if small else (48, 200, 400)
    counts, many = ((1, 2), (1, 2)) if small else ((1, 2, 4), (1, 2, 4, 8, 16))
    found: dict[str, Callable[[], Row]] = {}
    for name, jobs in (("convolution", partial(convolutions, convs)), ("transpose", partial(transposes, tiny))):
        found[f"{name}, here"] = lambda jobs=jobs: here(jobs())
        for n in counts:
            found[f"{name}, pool of {n}"] = lambda jobs=jobs, n=n: elsewhere(jobs(), pool, n, asked)
        if importlib.util.find_spec("distributed") and not small:
            for n in counts[:2]:
                found[f"{name}, Dask with {n}"] = lambda jobs=jobs, n=n: elsewhere(jobs(), dask, n, asked)
    for n in many:
        found[f"asleep, pool of {n}"] = lambda n=n: elsewhere(transposes(sleeping), pool, n, asleep, apart=True)
    return found


def markdown(rows: list[Row]) -> str:
    """The table."""

    def cell(value: Any, form: str) -> str:
        return " " if value is None else format(value, form)

    head = (
        "| case | workers | jobs | jobs a second | ms in the worker | overhead ms a job |\n|---|---|---|---|---|---|\n"
    )
    lines = [
        f"| {r['case']} | {r['workers'] or ' '} | {r['jobs']} | {r['jobs_per_s']:.1f} "
        f"| {cell(r.get('in_worker_ms'), '.1f')} | {cell(r.get('overhead_ms'), '.1f')} |"
        for r in rows
    ]
    told = (
        "All workers are of one machine and time in turn. Those asleep measure nothing: each sleeps for "
        f"{1e3 * ASLEEP:.0f} ms a job, under a lock of its own."
    )
    return f"{machine()}, `python -m bench.remote`. {told}\n\n{head}" + "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Run the cases and write the table, after each case anew."""
    parser = ArgumentParser(prog="python -m bench.remote", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="few jobs: to see that it works")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    given = parser.parse_args(argv)
    every = cases(given.small)

    def run(name: str) -> Row:
        return {"case": name, **every[name]()}

    write_rows(given.out / f"remote-jax{jax.__version__}{'-small' * given.small}", (), every, run, markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
