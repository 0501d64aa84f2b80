"""Who times: one thread of one process of a machine, first come, first served."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT, depthwise

from jaxlayout import auto_layout
from jaxlayout.measure import turns
from jaxlayout.measure.turns import NoTurn, Turns

needs_fcntl = pytest.mark.skipif(turns.fcntl is None, reason="needs fcntl")


@pytest.fixture(autouse=True)
def told_soon(monkeypatch):
    monkeypatch.setattr(turns, "TELL_SECONDS", 0.1)
    monkeypatch.setattr(turns.process_line, "value", turns.Line())


def started(script: str) -> subprocess.Popen[str]:
    """Another process, once it has said something."""
    command = [sys.executable, "-c", f"import os, sys, time\nfrom jaxlayout.measure.turns import Turns\n{script}"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)
    assert process.stdout and process.stdout.readline() == f"{process.pid}\n"
    return process


def timing(inside: str = "pass", after: str = "") -> subprocess.Popen[str]:
    """Another process, timing until it gets a line."""
    return started(f"""
with Turns().timing():
    print(os.getpid(), flush=True)
    {inside}
    sys.stdin.readline()
{after}
""")


@contextlib.contextmanager
def soon(act) -> Iterator[None]:
    timer = threading.Timer(0.3, act)
    timer.start()
    yield
    timer.join()


def go_on(process: subprocess.Popen[str]) -> None:
    process.communicate("\n", timeout=60)


@needs_fcntl
def test_one_process_times_at_a_time():
    other, told = timing(), []
    with pytest.raises(NoTurn, match=f"process {other.pid} was still timing"), Turns(0.4, tell=told.append).timing():
        pass
    assert len(told) == 1 and f"process {other.pid} is timing" in told[0]
    begun = []
    with soon(lambda: (begun.append(time.monotonic()), go_on(other))), Turns(60, tell=told.append).timing():
        assert begun
    with Turns(0, tell=told.append).timing():
        pass
    assert len(told) == 2


@needs_fcntl
def test_waiting_counts_from_turn_to_turn():
    told: list[str] = []
    turns = Turns(60, tell=told.append)
    for _ in range(2):
        other = timing()
        with soon(lambda: go_on(other)), turns.timing():  # noqa: B023
            pass
    assert turns.waited > 0.5 and len(told) == 1
    turns.timeout = 0.5
    other = timing()
    with pytest.raises(NoTurn, match=r"after 0\.5 s of waiting"):
        turns.pause()
    assert len(told) == 1
    go_on(other)


@needs_fcntl
def test_nobody_waits_again_for_what_has_just_been_waited_for_in_vain():
    """As would one derived convolution after another."""
    other, start = timing(), time.monotonic()
    assert "after 1 s of waiting" in refused(Turns(1.0).pause)
    waited = time.monotonic() - start
    refused(Turns(0).pause)  # which says nothing
    for timeout in (0.5, 1.0):
        assert "in vain" in refused(Turns(timeout).pause) and "in vain" in refused(Turns(timeout).timing().__enter__)
    assert time.monotonic() - start < waited + 0.9
    with soon(lambda: go_on(other)), Turns(60).timing():  # who has more patience does
        pass
    other, start = timing(), time.monotonic()
    assert "after 0.3 s of waiting" in refused(Turns(0.3).pause)  # and now it is another who times
    assert time.monotonic() - start > 0.2
    go_on(other)


@needs_fcntl
def test_what_a_call_has_waited_counts_for_all_of_it():
    """For another thread, and under compiler options on trial."""
    other, start = timing(), time.monotonic()
    assert "after 2 s of waiting" in refused(Turns(2.0, waited=1.8).pause)
    assert time.monotonic() - start < 1.5
    go_on(other)


def test_without_a_place_for_the_file_threads_alone_are_excluded(monkeypatch, caplog):
    def nowhere():
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    for _ in range(2):
        Turns(0).pause()
        with Turns(0).timing():
            raised = []
            thread = threading.Thread(target=lambda: raised.append(refused(Turns(0.1).pause)))  # noqa: B023
            thread.start()
            thread.join()
        assert "another thread" in raised[0]
    assert caplog.text.count("No usable temporary directory found") == (turns.fcntl is not None)


@needs_fcntl
def test_who_does_not_time_pauses_meanwhile():
    Turns(0).pause()
    other = timing()
    with pytest.raises(NoTurn, match=f"process {other.pid} was still timing"):
        Turns(0.2).pause()
    begun = []
    with soon(lambda: (begun.append(1), go_on(other))):
        Turns(60).pause()
        assert begun
    with Turns().timing():
        Turns(0).pause()  # the thread that times does not wait for itself
        raised = []
        thread = threading.Thread(target=lambda: raised.append(refused(Turns(0.1).pause)))
        thread.start()
        thread.join()
    assert "another thread" in raised[0]


def refused(call) -> str:
    with pytest.raises(NoTurn) as raised:
        call()
    return str(raised.value)


@needs_fcntl
def test_first_come_first_served():
    """Who comes back at once stands behind those who wait."""
    order = []
    waiter = """
print(os.getpid(), flush=True)
with Turns().timing():
    print("timing", flush=True)
    sys.stdin.readline()
"""
    waiters = []
    with Turns().timing():
        for count in (1, 2, 3):
            waiters.append(started(waiter))
            while waiting_in_line() < count + 1:
                time.sleep(0.01)

    def wait(i: int) -> None:
        assert waiters[i].stdout.readline() == "timing\n"
        order.append(i)
        go_on(waiters[i])

    threads = [threading.Thread(target=wait, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    with Turns(60).timing():
        order.append("back")
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2, "back"]


def waiting_in_line() -> int:
    """How many tickets have been drawn."""
    return int.from_bytes(turns.timing_lock_path().read_bytes()[:8], "little")


@needs_fcntl
def test_a_killed_process_holds_nothing_and_stands_in_nobodys_way():
    other = timing()
    waiting = started("print(os.getpid(), flush=True)\nwith Turns().timing(): pass")
    while waiting_in_line() < 2:
        time.sleep(0.01)
    for process in (waiting, other):
        process.kill()
        process.communicate()
    with Turns(5).timing():
        pass


@pytest.mark.skipif(turns.fcntl is None or not hasattr(os, "fork"), reason="needs fcntl and fork")
def test_a_forked_child_holds_nothing():
    """Neither while its parent does, nor does it keep the turn when the parent is done."""
    inside = """
    child = os.fork()
    if child == 0:
        try:
            with Turns(0.2).timing(): print("inside", flush=True)
        except TimeoutError:
            print("outside", flush=True)
        time.sleep(60)
    """
    other = timing(inside, after="sys.stdin.readline(); os.kill(child, 9)")
    assert other.stdout and other.stdin and other.stdout.readline() == "outside\n"
    other.stdin.write("\n")
    other.stdin.flush()
    with Turns(10).timing():
        pass
    go_on(other)


def test_threads_stand_in_line_too_and_one_may_come_again():
    order = []

    def other(name: str) -> None:
        with Turns(30).timing():
            order.append(name)

    threads = [threading.Thread(target=other, args=(name,)) for name in "abc"]
    with Turns().timing():
        with Turns(0).timing():
            order.append("nested")
        assert "another thread" in in_a_thread(lambda: refused(lambda: Turns(0.1).timing().__enter__()))
        for count, thread in enumerate(threads, 2):
            thread.start()
            while len(turns.process_line.value.queue) < count:
                time.sleep(0.01)
        order.append("first")
    for thread in threads:
        thread.join()
    assert order == ["nested", "first", "a", "b", "c"]


def in_a_thread(call):
    found = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]


@needs_fcntl
def test_ctrl_c_while_waiting_and_while_timing():
    other = timing()
    with (
        pytest.raises(KeyboardInterrupt),
        soon(lambda: os.kill(os.getpid(), signal.SIGINT)),
        Turns().timing(),
    ):
        pass
    go_on(other)
    with pytest.raises(KeyboardInterrupt), Turns(5).timing():
        raise KeyboardInterrupt
    go_on(timing())  # another process can have it too
    with Turns(5).timing():
        pass


@needs_fcntl
def test_waiting_ends_where_it_is_told_to():
    other, stop = timing(), threading.Event()
    with soon(stop.set), pytest.raises(NoTurn, match="interrupted"), Turns(stop=stop).timing():
        pass
    go_on(other)


def test_time_spent_waiting_can_be_told_from_time_spent():
    spans = []

    @contextlib.contextmanager
    def waiting():
        start = time.monotonic()
        try:
            yield
        finally:
            spans.append(time.monotonic() - start)

    def others() -> Turns:
        return Turns(timeout, waiting=waiting)

    timeout = 0.2
    others().pause()
    with Turns().timing():
        in_a_thread(lambda: refused(others().pause))
        timeout = 0.3
        in_a_thread(lambda: refused(lambda: others().timing().__enter__()))
    assert len(spans) == 2 and min(spans) > 0.1


def test_where_files_cannot_be_locked_it_goes_on_and_says_so(monkeypatch, tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "file").touch()
    monkeypatch.setattr(turns, "timing_lock_path", lambda: tmp_path / "file" / "lock")
    with Turns(0).timing():
        assert "not locked against other processes" in caplog.text
    Turns(0).pause()
    monkeypatch.setattr("jaxlayout.runtime.lock.fcntl", None)
    caplog.clear()
    with Turns(0).timing():
        assert "no fcntl" in caplog.text


def test_the_file_is_the_users():
    assert turns.timing_lock_path().name == f"jaxlayout-turns-{os.getuid() if hasattr(os, 'getuid') else 'user'}.lock"


# What a call does without a turn


ARGS = jnp.ones((1, 8, 8, 8)), jnp.ones((3, 3, 1, 8))


@needs_fcntl
@pytest.mark.parametrize("freeze", [False, True])
def test_a_call_without_a_turn_goes_on_and_the_next_tries_again(freeze, caplog):
    tuned = auto_layout(depthwise, lock_timeout=0.1, verdict=False)
    x, k = ARGS
    f, args = (tuned.freeze(k=k), (x,)) if freeze else (tuned, (x, k))
    other = timing()
    for _ in range(2):
        caplog.clear()
        np.testing.assert_allclose(f(*args), depthwise(x, k))
        assert f"depthwise is not tuned this time, and the next call tries again: process {other.pid}" in caplog.text
    verdict = f.outcome(*args).verdict
    assert verdict.reason.startswith(f"not tuned this time: process {other.pid} ") and verdict.cause == "failure"
    assert f.trace(*args) is not None
    caplog.clear()
    np.testing.assert_allclose(jax.jit(f)(*args), depthwise(x, k))  # traced: it stays so
    np.testing.assert_allclose(jax.grad(lambda k: f(*args).sum() * k)(1.0), depthwise(x, k).sum())
    go_on(other)
    caplog.clear()
    np.testing.assert_allclose(f(*args), depthwise(x, k), rtol=1e-6)
    assert f.outcome(*args).source in ("measured", "stored") and "not tuned" not in caplog.text


@needs_fcntl
def test_ctrl_c_while_a_call_waits_for_its_turn():
    other = timing()
    with soon(lambda: os.kill(os.getpid(), signal.SIGINT)), pytest.raises(KeyboardInterrupt, match="tuning depthwise"):
        auto_layout(depthwise)(*ARGS)
    go_on(other)


@needs_fcntl
def test_processes_that_start_at_once_share_the_jobs():
    """What one has measured the other has not."""
    script = """
import os, sys, logging
import jax.numpy as jnp
from jax import lax
from jaxlayout import auto_layout
from jaxlayout.tuning import pipeline
def network(x, *kernels):
    for k in kernels:
        dims = ("NHWC", "HWIO", "NHWC")
        x = lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=dims, feature_group_count=8)
    return x
real, keys = pipeline.measure, []
def measure(jobs, **more):
    for job, found in real(jobs, **more):
        keys.extend([job.key] if found else [])
        yield job, found
pipeline.measure = measure
print(os.getpid(), flush=True)
sys.stdin.readline()
kernels = [jnp.ones((n, n, 1, 8)) for n in (1, 2, 3, 4, 5)]
tuned = auto_layout(network, verdict=False)
assert tuned(jnp.ones((1, 8, 8, 8)), *kernels).shape == (1, 8, 8, 8)
print(*(key.replace(" ", "_") for key in keys))
"""
    both = [started(script) for _ in range(2)]
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    measured = [process.communicate(timeout=120)[0].split() for process in both]
    assert sum(map(len, measured)) == len({key for keys in measured for key in keys}) >= 5
