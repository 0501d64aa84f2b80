"""Every test has a cost table, a measuring budget and options of its own."""

from __future__ import annotations

import os
import tempfile

import pytest

from jaxlayout import tune
from jaxlayout.costs.measurement import Measurement


@pytest.fixture(autouse=True)
def own_table(tmp_path, monkeypatch):
    for name in os.environ:
        if name.startswith("JAXLAYOUT_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("JAXLAYOUT_TABLE", str(tmp_path / "table.sqlite"))
    # The lock of those who time on this machine: tests need not wait for them, nor they for tests.
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tune, "_tables", {})
    monkeypatch.setattr(tune, "process_budget", tune.Budget())


@pytest.fixture
def forced(monkeypatch):
    """Costs under which every convolution changes, and no verdict by timing or memory: the rewritten function runs
    wherever its numbers agree. Gives the keys of the jobs that were asked for, and takes about no time."""
    asked = []

    def measure(jobs, **_):
        for job in jobs:
            asked.append(job.key)
            times = [1e9 if i == 0 and len(job.alternatives) > 1 else 1e3 + i for i in range(len(job.alternatives))]
            yield job, {name: measurement(ns) for name, ns in zip(job.alternatives, times, strict=True)}

    monkeypatch.setattr(tune, "measure", measure)
    monkeypatch.setenv("JAXLAYOUT_VERDICT", "0")
    monkeypatch.setenv("JAXLAYOUT_MEMORY_LIMIT", "1000")
    return asked


def measurement(ns: float) -> Measurement:
    return Measurement(status="ok", median_ns=ns, spread_ns=0.0, runs=9, error=0.0, temp_bytes=0, program="made up")
