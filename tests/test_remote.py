"""Measuring elsewhere: real process pools, Dask's real scheduler and workers, and executors that misbehave."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import distributed
import jax
import numpy as np
import pytest
from helpers import conv
from toys import offer

import jaxlayout
from bench.remote import convolution
from jaxlayout import CostTable, auto_layout
from jaxlayout.measure.environment import current_environment
from jaxlayout.measure.jobs import Job, transpose_job
from jaxlayout.measure.remote import Reply, Request, measure_elsewhere


def jobs(*features: int) -> list[Job]:
    """Convolutions of so many features, each in the two usual orders."""
    return [convolution(count) for count in features]


def request(make: Any) -> Request:
    return Request(make=make, environment=current_environment(), compiler_options=None, relax=1.0)


def elsewhere(executor: Executor, work: list[Job], asked: Any = request) -> dict[str, Any]:
    return {job.key: records for job, records in measure_elsewhere(work, executor, asked, lambda: False)}


class Here(Executor):
    """Runs what it is given at once; `trouble` says, by number, what to do instead."""

    def __init__(self, trouble: dict[int, Any] | None = None):
        self.given: list[Request] = []
        self.trouble = trouble or {}

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.given.append(fn)
        future: Future[Any] = Future()
        try:
            future.set_result(self.trouble.get(len(self.given), fn)(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def dies() -> Any:
    raise ConnectionError("the worker is gone")


def test_records_of_a_worker_are_those_of_this_place():
    work = [*jobs(3), transpose_job((8, 9, 10), np.dtype("float32"), (2, 0, 1), "entry")]
    found = elsewhere(Here(), work)
    assert found.keys() == {job.key for job in work}
    for job in work:
        assert found[job.key].keys() == job.alternatives.keys()
        assert all(record.status in ("ok", "slow") and record.median_ns for record in found[job.key].values())


def test_a_worker_that_dies_costs_its_job_only_which_is_sent_once_more(caplog):
    executor = Here({2: dies})
    with caplog.at_level(logging.WARNING, "jaxlayout"):
        found = elsewhere(executor, jobs(1, 2, 3))
    assert len(executor.given) == 4 and len(found) == 3
    assert "the worker is gone" in caplog.text and "sent once more" in caplog.text


def test_what_fails_twice_is_left_out():
    executor = Here({2: dies, 4: dies})
    found = elsewhere(executor, jobs(1, 2, 3))
    assert len(executor.given) == 4 and [job.key in found for job in jobs(1, 2, 3)] == [True, False, True]


def test_a_pool_that_takes_nothing():
    class Closed(Executor):
        def submit(self, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("cannot schedule new futures after shutdown")

    assert elsewhere(Closed(), jobs(1)) == {}


@pytest.mark.parametrize("name, value", [("jaxlib", "0.0.1"), ("cores", 1000), ("cpu", "abacus")])
def test_a_worker_unlike_this_place_is_refused_by_name(caplog, name, value):
    def asked(make: Any) -> Request:
        return replace(request(make), environment=replace(current_environment(), **{name: value}))

    executor = Here()
    with caplog.at_level(logging.WARNING, "jaxlayout"):
        assert elsewhere(executor, jobs(1), asked) == {}
    assert len(executor.given) == 2
    assert f":{os.getpid()} is unlike this place: {name} is " in caplog.text and f"not {value!r}" in caplog.text


def test_a_job_is_made_with_the_settings_of_this_place():
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        asked = request(jobs(1)[0].make)
    assert asked().refused == ""  # it sets them itself


def test_stopping_leaves_the_rest():
    asked = iter([False, True])
    found = list(measure_elsewhere(jobs(1, 2), Never(), request, lambda: next(asked)))
    assert found == []


class Never(Executor):
    def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
        return Future()


def network(x: Any, kernels: Any) -> Any:
    for kernel in kernels:
        x = jax.nn.relu(conv(x, kernel))
    return x


def arguments() -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 12, 10), np.float32)
    kernels = [rng.standard_normal((8, c, 3, 3), np.float32) for c in (3, 8)]
    return x, kernels


@pytest.fixture
def few(monkeypatch):
    """Little is measured, and no two programs are timed: what is done where does not depend on it."""
    offer(monkeypatch, "xla")
    monkeypatch.setenv("JAXLAYOUT_VERDICT", "0")


def test_a_process_pool_measures_for_tune(few, monkeypatch):
    x, kernels = arguments()
    tuned = auto_layout(network)
    context = multiprocessing.get_context("spawn")  # JAX has threads: a fork of them may hang
    monkeypatch.setattr("jaxlayout.tuning.pipeline.measure", only_nothing)
    with ProcessPoolExecutor(2, context) as pool:
        outcome = jaxlayout.tune(tuned, x, kernels, executor=pool)
    assert outcome.source == "measured"
    records = CostTable(os.environ["JAXLAYOUT_TABLE"])
    assert records.counts()["measurements"] > 4
    monkeypatch.undo()
    np.testing.assert_allclose(tuned(x, kernels), network(x, kernels), rtol=1e-4, atol=1e-4)


def only_nothing(jobs: Any, **_: Any) -> Any:
    assert not jobs, "measured here"
    yield from ()


def test_what_no_worker_measures_is_measured_here(few):
    x, kernels = arguments()
    broken = Here({n: dies for n in range(1, 100)})
    outcome = jaxlayout.tune(auto_layout(network), x, kernels, executor=broken)
    assert outcome.source == "measured" and broken.given


def test_tune_takes_a_plain_function_and_keywords(few):
    x, kernels = arguments()
    outcome = jaxlayout.tune(network, x, kernels=kernels)
    assert outcome.source == "measured"
    assert jaxlayout.tune(network, x, kernels=kernels).source == "stored"


# Dask


def dies_once(flag: str, request: Request) -> Reply:
    """Kills its worker, once."""
    if not Path(flag).exists():
        Path(flag).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return request()


def test_dask_workers_one_of_which_is_killed(tmp_path):
    flag = str(tmp_path / "killed")
    work = jobs(1, 2, 3)
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, local_directory=str(tmp_path)
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        executor = client.get_executor(retries=0, pure=False)
        submit = executor.submit
        executor.submit = lambda fn: submit(partial(dies_once, flag), fn)
        found = elsewhere(executor, work)
    assert Path(flag).exists()
    assert found.keys() == {job.key for job in work}
    assert all(record.median_ns for records in found.values() for record in records.values())
