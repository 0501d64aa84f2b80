"""Every test has a cost table, a measuring budget and options of its own."""

from __future__ import annotations

import gc
import os
import signal
import tempfile
from pathlib import Path

# Most of the suite's time is XLA's, which compiles programs that run once. So it optimises nothing, and what one test
# or run of the suite has compiled is there for all others. `make fuzz` has programs compiled as users have them.
# Before all imports: XLA reads its flags when the first array is made.
if "FUZZ" not in os.environ:
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 " + os.environ.get("XLA_FLAGS", "")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parents[1] / ".pytest_cache" / "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import pytest
from made_up import made_up
from tables import as_another_process

from jaxlayout.measure.peaks import Peaks
from jaxlayout.runtime import lock
from jaxlayout.tuning import pipeline
from jaxlayout.tuning.budget import Budget
from jaxlayout.verify.accept import Verdict

# A shell that starts the tests in the background has them, and all that they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish():
    """What has been imported stays: whoever collects garbage, JAX in each trace where it looks for leaks, need not go
    through all of it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def own_table(tmp_path, monkeypatch):
    for name in os.environ:
        if name.startswith("JAXLAYOUT_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("JAXLAYOUT_TABLE", str(tmp_path / "table.sqlite"))
    # The lock of those who time on this machine: tests need not wait for them, nor they for tests.
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    as_another_process(monkeypatch)
    monkeypatch.setattr(pipeline.process_budget, "value", Budget())
    monkeypatch.setattr(lock, "told", set())


@pytest.fixture(autouse=True)
def no_peaks(monkeypatch):
    """To look for those of the machine takes a third of a second. Where none are known, nothing is pruned."""
    monkeypatch.setattr(Peaks, "look", lambda peaks: None)


@pytest.fixture(autouse=True)
def no_hidden_failure(caplog):
    """What goes wrong in tuning leaves the user's program as it is, with a line in the log: a failed test here."""
    yield
    assert not [r for r in caplog.get_records("call") if r.name == "jaxlayout" and r.exc_info]


@pytest.fixture
def costs(monkeypatch):
    """Costs under which every convolution changes its order, and no verdict by timing or memory: the rewritten
    function runs wherever its numbers agree. Gives the keys of the jobs that were asked for."""
    asked: list[str] = []
    ns = lambda name, i: (1e3 if name.startswith("xla@") else 1e4) + i  # noqa: E731
    monkeypatch.setattr(pipeline, "measure", made_up(ns, asked=asked))
    monkeypatch.setenv("JAXLAYOUT_VERDICT", "0")
    monkeypatch.setenv("JAXLAYOUT_MEMORY_LIMIT", "1000")
    return asked


@pytest.fixture
def forced(costs, monkeypatch):
    """`costs`, and every rewritten function runs unseen: for tests that compare results themselves."""
    kept = Verdict(kept=True, reason="forced", cause="untried")
    monkeypatch.setattr(pipeline.Pipeline, "judge", lambda pipeline, plan: kept)
    return costs


@pytest.fixture
def with_options(forced, monkeypatch):
    """`forced`, and every plan wants compiler options, which is known only once its function has been traced: it is
    traced again."""
    wanted = {"xla_cpu_experimental_ynn_fusion_type": ""}

    def judge(pipeline, plan):
        ratio = 1.5 + bool(plan.compiler_options)
        return Verdict(kept=True, reason="forced", ratio=ratio)

    monkeypatch.setattr(pipeline, "COMPILER_OPTION_SETS", {"cpu": (wanted,)})
    monkeypatch.setattr(pipeline.Pipeline, "judge", judge)
    monkeypatch.setenv("JAXLAYOUT_VERDICT", "1")
    return wanted


@pytest.fixture
def judged(forced, monkeypatch):
    """`forced`, but for the judge, who is the real one again."""
    monkeypatch.setattr(pipeline.Pipeline, "judge", _judge)


_judge = pipeline.Pipeline.judge


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a table may be that is not the one of `own_table`; its folder is not there yet."""
    return tmp_path / "cache" / "table.sqlite"
