"""The fingerprint that keys the cost table, and the lock that keeps timing to one process of a machine."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import pytest

from jaxlayout.costs import environment, lock
from jaxlayout.costs.environment import current_environment
from jaxlayout.costs.lock import timing_lock

ROOT = Path(__file__).parents[1]


def run(script: str, **variables: str) -> str:
    command = [sys.executable, "-W", "error", "-c", script]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | variables, check=True, capture_output=True, text=True, timeout=120
    ).stdout.strip()


# The environment


def test_the_fingerprint_is_the_same_in_every_process():
    here = current_environment(versions={"dot": 1, "im2col": 2})
    assert current_environment(versions={"im2col": 2, "dot": 1}) == here
    assert len(here.fingerprint) == 16 and int(here.fingerprint, 16) >= 0
    script = """
from jaxlayout.costs.environment import current_environment
print(current_environment(versions={"dot": 1, "im2col": 2}).fingerprint)
"""
    assert run(script, PYTHONHASHSEED="1") == here.fingerprint


def test_it_says_what_it_stands_on():
    shown = json.loads(json.dumps(current_environment(versions={"dot": 1}).to_json()))
    assert shown["jax"] == jax.__version__
    assert shown["platform"] == jax.local_devices()[0].platform
    assert shown["versions"] == {"dot": "1"}
    assert shown["cores"] >= 1
    assert shown["config"]["jax_enable_x64"] in ("True", "False")
    assert "jax_disable_most_optimizations" in shown["config"]  # an option that is no attribute of jax.config


def test_every_field_counts():
    here = current_environment()
    for field in dataclasses.fields(here):
        value = getattr(here, field.name)
        other = (("a", "b"),) if isinstance(value, tuple) else value + type(value)(1)
        assert dataclasses.replace(here, **{field.name: other}).fingerprint != here.fingerprint


def test_options_are_read_as_the_calling_thread_sees_them():
    here = current_environment().fingerprint
    with jax.default_matmul_precision("float32"):
        precise = current_environment().fingerprint
    with jax.enable_x64(not jax.config.jax_enable_x64):
        wide = current_environment().fingerprint
    assert len({here, precise, wide}) == 3
    assert current_environment().fingerprint == here


def test_compiler_flags_count_but_not_how_they_are_written(monkeypatch, tmp_path):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.delenv("NPROC", raising=False)
    plain = current_environment().fingerprint

    def with_flags(flags: str) -> str:
        monkeypatch.setenv("XLA_FLAGS", flags)
        return current_environment().fingerprint

    one = with_flags("--xla_a=1 --xla_b")
    assert one != plain
    assert with_flags("--xla_b   --xla_a=2 --xla_dump_to=/tmp/somewhere --xla_a=1") == one
    assert with_flags("--xla_b --xla_a=2") != one
    assert with_flags("--xla_b=false --xla_a=1") != one
    assert with_flags(" ") == plain
    (tmp_path / "flags").write_text("--xla_b\n--xla_a=1\n")
    assert with_flags(str(tmp_path / "flags")) == one
    assert with_flags(str(tmp_path / "absent")) != plain
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.setenv("NPROC", "1")
    assert current_environment().fingerprint != plain


def test_the_default_device_is_jaxs(monkeypatch):
    device = jax.local_devices(backend="cpu")[-1]
    with jax.default_device(device):
        assert current_environment() == current_environment(device)
    assert current_environment(device).platform == "cpu"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs sched_setaffinity")
def test_cores_are_those_that_the_process_may_use():
    mine = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(mine)})
        assert environment._cores() == 1
    finally:
        os.sched_setaffinity(0, mine)


def test_importing_touches_no_device():
    script = """
import jax
from jaxlayout.costs import environment
jax.config.update("jax_platforms", "no_such_platform")  # has no effect once a backend is up
try:
    environment.current_environment()
except RuntimeError as error:
    assert "no_such_platform" in str(error)
    print("as it should be")
"""
    assert run(script) == "as it should be"


# The lock


@pytest.fixture(autouse=True)
def own_lock_file(monkeypatch, tmp_path):
    """The tests do not wait for someone who really is timing."""
    monkeypatch.setattr(lock, "timing_lock_path", lambda: tmp_path / "timing.lock")


def holder(path: Path, inside: str = "", after: str = "") -> subprocess.Popen[str]:
    """Another process, timing until it gets a line."""
    script = f"""
import os, sys, time
from jaxlayout.costs import lock
lock.timing_lock_path = lambda: {str(path)!r}
with lock.timing_lock():
    print(os.getpid(), flush=True)
    {inside}
    sys.stdin.readline()
{after}
"""
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdin=pipe, stdout=pipe, text=True)
    assert process.stdout and process.stdout.readline() == f"{process.pid}\n"
    return process


def test_the_lock_file_is_the_users():
    assert run("from jaxlayout.costs import lock; print(lock.timing_lock_path())", TMPDIR="/tmp").endswith(
        f"jaxlayout-timing-{os.getuid() if hasattr(os, 'getuid') else 'user'}.lock"
    )


@pytest.mark.skipif(lock.fcntl is None, reason="needs fcntl")
def test_one_process_times_at_a_time(tmp_path):
    other, told = holder(tmp_path / "timing.lock"), []
    with (
        pytest.raises(TimeoutError, match=f"process {other.pid} was still timing"),
        timing_lock(0.3, told.append),
    ):
        pass
    assert len(told) == 1 and f"process {other.pid} is timing" in told[0]
    threading.Timer(0.3, lambda: other.communicate("\n")).start()
    start = time.monotonic()
    with timing_lock(60):
        assert time.monotonic() - start > 0.2
    other.wait(60)


@pytest.mark.skipif(lock.fcntl is None, reason="needs fcntl")
def test_a_killed_process_holds_nothing(tmp_path):
    other = holder(tmp_path / "timing.lock")
    other.kill()
    other.communicate()
    with timing_lock(5):
        pass


@pytest.mark.skipif(lock.fcntl is None or not hasattr(os, "fork"), reason="needs fcntl and fork")
def test_a_forked_child_holds_nothing(tmp_path):
    """Neither while its parent does, nor does it keep the lock when the parent is done."""
    inside = """
    child = os.fork()
    if child == 0:
        with lock._threads:
            assert lock._holder is None
        try:
            with lock.timing_lock(0.2): print("inside", flush=True)
        except TimeoutError:
            print("outside", flush=True)
        time.sleep(60)
    """
    other = holder(tmp_path / "timing.lock", inside, after="sys.stdin.readline(); os.kill(child, 9)")
    assert other.stdout and other.stdin and other.stdout.readline() == "outside\n"
    other.stdin.write("\n")
    other.stdin.flush()
    with timing_lock(10):
        pass
    other.communicate("\n")


def test_the_lock_is_re_entrant_within_a_thread_and_excludes_others():
    order = []

    def other() -> None:
        with pytest.raises(TimeoutError, match="another thread"), timing_lock(0.1):
            order.append("never")
        with timing_lock(30, lambda message: order.append("waiting")):
            order.append("other")

    thread = threading.Thread(target=other)
    with timing_lock():
        with timing_lock(0):
            order.append("nested")
        thread.start()
        while "waiting" not in order:
            time.sleep(0.01)
        order.append("first")
    thread.join()
    assert order == ["nested", "waiting", "first", "other"]


@pytest.mark.skipif(lock.fcntl is None, reason="needs fcntl")
def test_ctrl_c_while_waiting_and_while_timing(tmp_path):
    other = holder(tmp_path / "timing.lock")
    interrupt = threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt), timing_lock():
        pass
    other.communicate("\n")
    with pytest.raises(KeyboardInterrupt), timing_lock(5):
        raise KeyboardInterrupt
    with timing_lock(5):
        assert lock._holder == os.getpid()
    assert lock._holder is None
    again = holder(tmp_path / "timing.lock")  # another process can have it too
    again.communicate("\n")


def test_where_files_cannot_be_locked_it_goes_on_and_says_so(monkeypatch, tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "file").touch()
    monkeypatch.setattr(lock, "timing_lock_path", lambda: tmp_path / "file" / "lock")
    with timing_lock(0):
        assert "not locked against other processes" in caplog.text
    monkeypatch.setattr(lock, "fcntl", None)
    caplog.clear()
    with timing_lock(0):
        assert "no fcntl" in caplog.text
