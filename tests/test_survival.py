"""The table survives: processes that tune at once and are killed, and whatever else may happen to it, seen from where
the user is: the call gives the right numbers, raises nothing, and warns once at most.

Full disks, places that cannot be written and file systems without locks are imitated where SQLite meets the system: its
table of system calls is given ones that refuse. One full disk is a real one.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from disks import full_disk, read_only, without_locks
from helpers import ROOT, K, X, conv, normal
from jax import lax
from tables import as_another_process, close_tables
from toys import Toy, offer

from jaxlayout import CostTable, Outcome, Plan, TableWarning, auto_layout
from jaxlayout.convs.lowering import registered
from jaxlayout.table.measurement import Measurement
from jaxlayout.table.records import ENVIRONMENT, look
from jaxlayout.table.sqlite import checksum
from jaxlayout.tuning import pipeline, stores


def table_path() -> Path:
    return Path(os.environ["JAXLAYOUT_TABLE"])


# Many processes, some of them killed

CHILD = '''
import json, os, random, sys, time
from pathlib import Path

import jax
import numpy as np
from jax import lax

import jaxlayout
from jaxlayout import CostTable
from jaxlayout.verify import accept
from jaxlayout.tuning import pipeline
from jaxlayout.verify import race
from jaxlayout.convs import candidates, lowering
from jaxlayout.measure import trials
from jaxlayout.measure.peaks import Peaks

folder, name, role = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
found = lowering.lowerings()
candidates.lowerings = lambda: {"xla": found["xla"], "tap_dots": found["tap_dots"]}  # enough, and quick
trials.CANDIDATE_SECONDS = 0.01
race.MAX_PAIRS = 7
pipeline.COMPILER_OPTION_SETS = {}
Peaks.look = lambda peaks: None


def log(kind, *words):
    """Once this has returned, neither SIGKILL nor a crash takes it back."""
    with open(folder / f"{name}.{kind}", "a") as file:
        file.write(json.dumps(words) + "\\n")
        file.flush()
        os.fsync(file.fileno())


def timed(race):
    def wrapped(*args):
        log("timing", "from", time.monotonic())
        try:
            return race(*args)
        finally:
            log("timing", "to", time.monotonic())
    return wrapped


trials.time_in_rounds, accept.race = timed(trials.time_in_rounds), timed(accept.race)
record, store = CostTable.record_many, CostTable.store_plan


def record_many(table, env, signature, measurements):
    record(table, env, signature, measurements)
    log("committed", "measurements", *([env, signature, candidate] for candidate in measurements))


def store_plan(table, env, function, *rest):
    store(table, env, function, *rest)
    log("committed", "plans", [env, function])


CostTable.record_many, CostTable.store_plan = record_many, store_plan


def function(number):
    """Two convolutions, the second of which the next function has first."""
    rng = np.random.default_rng(number)
    x = [rng.standard_normal((1, 2 + c, 5, 6), np.float32) for c in (number, number + 1)]
    k = [rng.standard_normal((3, 2 + c, 3, 3), np.float32) for c in (number, number + 1)]

    def f(x, k):
        y, z = (lax.conv_general_dilated(a, b, (1, 1), "SAME") for a, b in zip(x, k))
        return jax.nn.relu(y) * z.mean(1, keepdims=True)

    return f, x, k


def check(tuned, f, x, k):
    np.testing.assert_allclose(tuned(x, k), jax.jit(f)(x, k), rtol=1e-4, atol=1e-4)


print("ready", flush=True)
sys.stdin.readline()
numbers = list(range(FUNCTIONS))
random.Random(name).shuffle(numbers)
if role == "late":
    for number in numbers:
        f, x, k = function(number)
        tuned = jaxlayout.auto_layout(f, on_miss="error")
        check(tuned, f, x, k)
        assert tuned.outcome(x, k).source == "stored", tuned.outcome(x, k)
elif role == "victim":
    numbers = (*numbers, *range(FUNCTIONS, 10**6))  # until it is killed
for number in numbers if role != "late" else ():
    f, x, k = function(number)
    tuned = jaxlayout.auto_layout(f)
    outcome = jaxlayout.tune(tuned, x, k)
    assert outcome.source in ("measured", "stored"), outcome
    check(tuned, f, x, k)
print("done", flush=True)
'''
FUNCTIONS = 4


def child(folder: Path, name: str, role: str) -> subprocess.Popen[str]:
    script = CHILD.replace("FUNCTIONS", str(FUNCTIONS))
    command = [sys.executable, "-W", "error", "-c", script, str(folder), name, role]
    own = {place: folder / place.lower() for place in ("HOME", "TMPDIR", "PWD")}
    for place in own.values():
        place.mkdir(exist_ok=True)
    variables = os.environ | {"PYTHONPATH": str(ROOT)} | {name: str(place) for name, place in own.items()}
    variables.pop("XDG_CACHE_HOME", None)
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=own["PWD"], env=variables, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def said(file: Path) -> list[Any]:
    """The lines of a log that are whole: the last one may have been cut by the kill."""
    lines = file.read_text().split("\n") if file.exists() else [""]
    return [json.loads(text) for text in lines[:-1]]


def test_eight_processes_tune_at_once_and_some_are_killed(tmp_path):
    draw = random.Random(8)
    roles = {f"process {n}": "victim" if n < 3 else "survivor" for n in range(8)}
    processes = {name: child(tmp_path, name, role) for name, role in roles.items()}
    killed: dict[str, float] = {}
    try:
        for process in processes.values():
            assert process.stdout and process.stdout.readline() == "ready\n", process.stderr and process.stderr.read()
        for process in processes.values():
            assert process.stdin
            process.stdin.write("\n")
            process.stdin.flush()
        start = time.monotonic()
        moments = sorted((draw.uniform(0.5, 5.0), name) for name, role in roles.items() if role == "victim")
        for moment, name in moments:
            time.sleep(max(0.0, start + moment - time.monotonic()))
            assert processes[name].poll() is None  # in the middle of it
            killed[name] = time.monotonic()
            processes[name].kill()
        for name, process in processes.items():
            out, err = process.communicate(timeout=300)
            if name in killed:
                assert process.returncode == -signal.SIGKILL
            else:
                assert (process.returncode, out, err) == (0, "done\n", "")
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()

    rows, refused = look(table_path())
    assert refused == [] and not list(table_path().parent.glob("*.damaged-*"))
    kept = {"measurements": {row[:3] for row in rows["measurements"]}, "plans": {row[:2] for row in rows["plans"]}}
    committed = 0
    for name in roles:
        for table, *keys in said(tmp_path / f"{name}.committed"):
            committed += len(keys)
            assert {tuple(key) for key in keys} <= kept[table], name
    assert committed > 20

    intervals = []
    for name in roles:
        times = said(tmp_path / f"{name}.timing")
        assert [what for what, _ in times] == (["from", "to"] * len(times))[: len(times)]  # one after another
        ends = [moment for what, moment in times if what == "to"]
        starts = [moment for what, moment in times if what == "from"]
        assert len(starts) == len(ends) or name in killed
        intervals += zip(starts, [*ends, killed.get(name, 0.0)], [name] * len(starts), strict=False)
    intervals.sort()
    assert len({name for _, _, name in intervals}) > 2
    for (_, end, one), (begin, _, other) in pairwise(intervals):
        assert end <= begin, (one, other)

    late = child(tmp_path, "late", "late")
    out, err = late.communicate("\n", timeout=120)
    assert (late.returncode, out, err) == (0, "ready\ndone\n", "")
    assert not (tmp_path / "late.timing").exists()
    written = {place: [file.name for file in (tmp_path / place).iterdir()] for place in ("home", "tmpdir", "pwd")}
    assert written == {"home": [], "tmpdir": [f"jaxlayout-turns-{os.getuid()}.lock"], "pwd": []}  # outside its folder


# What may happen to the file, as the user's call sees it


def network(x: Any, k: Any) -> Any:
    return jnp.tanh(conv(x, k)).mean((2, 3))


def other(x: Any, k: Any) -> Any:
    return network(x[:1], k) + 1


@contextlib.contextmanager
def truncated(path: Path) -> Iterator[None]:
    os.truncate(path, path.stat().st_size * 2 // 3)
    yield


@contextlib.contextmanager
def flipped(path: Path) -> Iterator[None]:
    """In the middle of a record."""
    data = path.read_bytes()
    assert data.count(b'"median_ns":1000.0') >= 1
    path.write_bytes(data.replace(b'"median_ns":1000.0', b'"median_ns":1000.1'))
    yield


@contextlib.contextmanager
def of_schema(path: Path, version: int) -> Iterator[None]:
    with contextlib.closing(sqlite3.connect(path)) as raw:
        raw.execute(f"PRAGMA user_version = {version}")
    yield


@contextlib.contextmanager
def older(path: Path) -> Iterator[None]:
    with of_schema(path, 0):
        yield


@contextlib.contextmanager
def newer(path: Path) -> Iterator[None]:
    with of_schema(path, 2):
        yield


@contextlib.contextmanager
def of_another_machine(path: Path) -> Iterator[None]:
    """Whose records, were they believed, would have another order for everything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxlayout.measure.environment.processor", lambda: ("abacus", "f00d"))
        yield


@contextlib.contextmanager
def handed_over_in_pieces(path: Path) -> Iterator[None]:
    """Garbage in the place of all records but their keys."""
    with contextlib.closing(sqlite3.connect(path)) as raw, raw:
        raw.execute("UPDATE measurements SET record = 'NaN'")
        raw.execute("UPDATE plans SET payload = x'ff00', sizes = 7")
    yield


TROUBLES: list[tuple[Any, str | None, bool | None, bool]] = [
    # what happens, the one warning, whether what was known is found (None: perhaps), whether what is new is kept
    (full_disk, "cannot be written", True, False),
    (read_only, "cannot be written", True, False),
    (without_locks, "cannot be locked", False, False),
    (truncated, "set aside", None, True),
    (flipped, None, True, True),
    (older, None, False, True),
    (newer, None, False, True),
    (of_another_machine, None, False, True),
    (handed_over_in_pieces, None, False, True),
]


@pytest.mark.parametrize(("trouble", "words", "known", "kept"), TROUBLES, ids=lambda x: getattr(x, "__name__", ""))
def test_whatever_happens_to_the_table_the_call_is_right(forced, monkeypatch, trouble, words, known, kept):
    assert auto_layout(network)(X, K).shape == (2, 4) and forced
    rows = {table: set(those) for table, those in look(table_path())[0].items()}
    close_tables()
    as_another_process(monkeypatch, CostTable(table_path(), timeout=0.2))
    with trouble(table_path()), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        forced.clear()
        tuned = auto_layout(network)
        np.testing.assert_allclose(tuned(X, K), network(X, K), rtol=1e-5, atol=1e-5)
        assert tuned.outcome(X, K).kept and known in (None, forced == [])
        new = auto_layout(other)
        np.testing.assert_allclose(new(X, K), other(X, K), rtol=1e-5, atol=1e-5)
        assert new.outcome(X, K).kept and new.outcome(X, K).source == "stored"  # at least this process remembers
        if kept:
            as_another_process(monkeypatch)
            assert auto_layout(other).outcome(X, K).source == "stored"
        close_tables()
    assert [warning.category for warning in caught] == [TableWarning] * (words is not None)
    assert words is None or words in str(caught[0].message)
    if trouble in (full_disk, read_only, without_locks, of_another_machine):  # then what was committed is still there
        after = {table: set(those) for table, those in look(table_path())[0].items()}
        assert all(rows[table] <= after[table] for table in rows)
    if trouble in (older, newer):  # left alone
        assert not list(table_path().parent.glob("*.damaged-*"))
        with contextlib.closing(sqlite3.connect(table_path())) as raw:
            assert raw.execute("SELECT count(*) FROM measurements").fetchone()[0] == len(rows["measurements"])


def test_whichever_byte_is_flipped_the_call_is_right(forced, monkeypatch):
    auto_layout(network)(X, K)
    expected, draw = network(X, K), random.Random(5)
    close_tables()
    data = table_path().read_bytes()
    for trial in range(10):
        path = table_path().with_name(f"{trial}.sqlite")
        broken = bytearray(data)
        broken[draw.randrange(draw.choice([110, 4096, len(data)]))] ^= 1 << draw.randrange(8)
        path.write_bytes(broken)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tuned = auto_layout(network, table=path)
            np.testing.assert_allclose(tuned(X, K), expected, rtol=1e-5, atol=1e-5)
            assert tuned.outcome(X, K).kept
        assert {warning.category for warning in caught} <= {TableWarning} and len(caught) <= 1


MOUNT = 'mount -t tmpfs -o size=400k tmpfs "$0" && exec "$@"'
FILL = """
import os, subprocess, sys, warnings
from pathlib import Path
from jaxlayout.table.measurement import Measurement
from jaxlayout.table.sqlite import checksum
from jaxlayout.table.records import look
from jaxlayout.table.table import CostTable

folder = Path(sys.argv[1])
ok = Measurement(status="ok", median_ns=1.5e6, spread_ns=2e3, runs=9, error=1e-7, temp_bytes=4096, program="f00d")
table, committed, warned = CostTable(folder / "table.sqlite"), [], []
warnings.simplefilter("error")
try:
    for number in range(10**5):
        table.record("env", "conv", f"candidate-{number}", ok)
        committed.append(f"candidate-{number}")
except Warning as warning:
    assert "cannot be written" in str(warning) and "full" in str(warning), warning
unsaved = table.counts()["unsaved"]
assert unsaved == 1 and len(committed) > 20, (unsaved, len(committed))
assert len(table.measurements("env", "conv")) == len(committed) + 1
read = "import sys; from jaxlayout.table.records import look; rows, refused = look(sys.argv[1]); "
read += "print(len(rows['measurements']), len(refused))"
seen = subprocess.run([sys.executable, "-c", read, folder / "table.sqlite"], capture_output=True, text=True, check=True)
assert seen.stdout == f"{len(committed)} 0\\n", (seen.stdout, len(committed))
print("full after", len(committed))
"""


def can_mount() -> bool:
    command = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs tmpfs /tmp"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


def test_a_disk_that_is_really_full(tmp_path):
    if not can_mount():
        pytest.skip("may not mount a small disk")
    command = ["unshare", "-rm", "sh", "-c", MOUNT, str(tmp_path), sys.executable, "-c", FILL, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("full after ")


# What somebody else's table may say


class Slow(Toy):
    """Right, and hundreds of times slower."""

    name = "slow"

    def apply(self, conv, dims, lhs, prepared):
        params = {"dimension_numbers": dims.to_lax(), **conv.params}

        def again(n: Any, out: jax.Array) -> jax.Array:
            return lax.conv_general_dilated(lhs + 0 * out.ravel()[n], prepared, **params)

        return lax.fori_loop(0, 300, again, lax.conv_general_dilated(lhs, prepared, **params))


class Wrong(Slow):
    def apply(self, conv, dims, lhs, prepared):
        return 1.01 * Toy.apply(self, conv, dims, lhs, prepared)


@pytest.mark.parametrize(("lowering", "cause"), [(Slow, "time"), (Wrong, "numbers")])
def test_times_that_are_a_lie(monkeypatch, lowering, cause):
    """Records as they should be, but that one candidate is a thousand times faster than it is, and right."""
    offer(monkeypatch, lowering(), "xla")
    monkeypatch.setattr(pipeline, "COMPILER_OPTION_SETS", {})
    with registered(lowering()):
        honest = auto_layout(network, on_miss="measure").outcome(X, K)
        assert not any(mode.candidate and mode.candidate.lowering == "slow" for mode in honest.plan.choices.values())
        table = CostTable(table_path())
        records = [row for row in look(table_path())[0]["measurements"] if not row[1].startswith("transpose")]
        for env, signature, candidate, record in records:
            told = Measurement.from_json(json.loads(record))
            ns = 100.0 if candidate.startswith("slow@") else 1e9
            lie = replace(told, status="ok", median_ns=ns, spread_ns=0.0, runs=9, error=0.0, temp_bytes=0)
            table.record(env, signature, candidate, lie)
        table.close()
        as_another_process(monkeypatch)
        tuned = auto_layout(lambda x, k: 2 * network(x, k), on_miss="error" if cause == "numbers" else "measure")
        np.testing.assert_allclose(tuned(X, K), 2 * network(X, K), rtol=1e-5, atol=1e-5)
        outcome = tuned.outcome(X, K)
        assert any(mode.candidate and mode.candidate.lowering == "slow" for mode in outcome.plan.choices.values())
        assert not outcome.kept and outcome.verdict.cause == cause


def stored() -> tuple[str, str, str, str, Any]:
    """The one plan in the table."""
    ((env, function, skeleton, sizes, payload),) = (
        row for row in look(table_path())[0]["plans"] if row[1] != ENVIRONMENT
    )
    return env, function, skeleton, sizes, json.loads(payload)


def changed(value: Any, place: tuple[Any, ...], to: Any) -> Any:
    """A copy of plain data with another value in one place."""
    if not place:
        return to
    key, *rest = place
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[key] = changed(copy[key], tuple(rest), to)
    return copy


def test_a_new_table_on_a_full_disk_is_one_warning(forced, recwarn):
    with full_disk(table_path()):
        for _ in range(2):
            tuned = auto_layout(network)
            np.testing.assert_allclose(tuned(X, K), network(X, K), rtol=1e-5, atol=1e-5)
    assert [str(one.message).count("for this process only") for one in recwarn.list] == [1]
    assert not list(table_path().parent.glob("*damaged*"))


CANDIDATE = ("plan", "choices", 0, 3)
LIES: list[tuple[tuple[Any, ...], Any, str]] = [
    (CANDIDATE, "no_such:NCHW,OIHW->NCHW", "cannot be computed by no_such"),
    (CANDIDATE, "winograd2:NHWC,HWIO->NHWC", "cannot be computed by winograd2"),  # of relaxed numerics
    (CANDIDATE, "dot:NCHW,OIHW->NCHW", "cannot be computed by dot"),  # of 1x1 only
    (CANDIDATE, "xla:NCW,OIW->NCW", "cannot be computed by xla:NCW"),
    (CANDIDATE, "xla:" + "N" * 300, "expected dimension numbers"),
    (CANDIDATE, "x" * 10**6, "1000000 characters long"),
    (CANDIDATE, ["xla"], "not a string"),
    (CANDIDATE, None, "no rule for other orders"),
    (("plan", "choices", 0, 0), [99], "no equation (99,)"),
    (("plan", "choices", 0, 0), [0, 1, 2], "no equation (0, 1, 2)"),
    (("plan", "choices", 2, 0), [0], "has other operands or results"),
    (("plan", "choices", 0, 0), [1e300], "not an integer"),
    (("plan", "choices", 0, 1), [[0, 1, 2, 3]], "has other operands or results"),
    (("plan", "choices", 0, 2), [[3, 2, 1, 0]], "other orders than its candidate"),
    (("plan", "choices", 0, 2), [[0, 0, 1, 2]], "not axis orders"),
    (("plan", "choices"), 7, "not a plan"),
    (("plan", "compiler_options"), {"xla_dump_to": "somewhere"}, "compiler options that are not among ours"),
    (("plan", "compiler_options"), ["xla_dump_to"], "not a plan"),
    (("plan", "predicted_ns"), float("nan"), "predicted_ns is nan"),
    (("plan", "written_ns"), 10**400, "written_ns is a huge integer"),
    (("plan", "materialised_bytes"), "1", "materialised_bytes is '1'"),
    (("verdict", "kept"), "yes", "kept is 'yes'"),
    (("verdict", "ratio"), "2", "ratio is '2'"),
    (("verdict", "pairs"), -1, "pairs is -1"),
    (("verdict", "cause"), "magic", "cause is 'magic'"),
    (("verdict", "reason"), "x" * 10**6, "1000000 characters long"),
    (("verdict", "original_ns"), float("inf"), "original_ns is inf"),
    (("source",), "oracle", "source is 'oracle'"),
    (("seconds",), float("nan"), "seconds is nan"),
    (("measured",), True, "measured is True"),
    (("folded",), None, "folded is None"),
]


def test_a_stored_plan_that_does_not_fit_is_refused_with_a_reason(forced, monkeypatch, tmp_path, caplog):
    tuned = auto_layout(network)
    honest = tuned.outcome(X, K)
    assert honest.kept and tuned.outcome(X, K).source == "stored"
    env, function, skeleton, sizes, payload = stored()
    assert Outcome.from_json(payload) == honest
    table, expected = stores.open_table(str(table_path())), network(X, K)
    for place, lie, reason in LIES:
        caplog.clear()
        table.store_plan(env, function, skeleton, sizes, json.dumps(changed(payload, place, lie)))
        again = auto_layout(network)
        np.testing.assert_allclose(again(X, K), expected, rtol=1e-5, atol=1e-5)
        (record,) = caplog.records
        assert reason in record.message and len(record.message) < 500, (place, lie, record.message)
        assert again.outcome(X, K).plan == honest.plan  # made anew
    assert not list(Path.cwd().glob("somewhere*"))


def test_a_pinned_plan_is_somebody_elses_too(tmp_path):
    somewhere = tmp_path / "somewhere"
    Plan(compiler_options={"xla_dump_to": str(somewhere)}).save(tmp_path / "plan.json")
    with pytest.raises(ValueError, match="compiler options that are not among ours"):
        auto_layout(network, plan=Plan.load(tmp_path / "plan.json"))(X, K)
    assert not somewhere.exists()


def test_a_stored_plan_of_relaxed_numerics_is_for_relaxed_numerics(forced, caplog):
    def f(x, k):
        return lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    x, k = normal(2, 1, 8, 8, 8), normal(3, 3, 3, 8, 8)
    table = stores.open_table(str(table_path()))
    for numerics, found in (("strict", "measured"), ("relaxed", "stored")):
        tuned = auto_layout(f, numerics=numerics)
        tuned(x, k)
        for env, function, skeleton, sizes, text in look(table_path())[0]["plans"]:
            if function != ENVIRONMENT:
                written = [[0, 1, 2, 3], [0, 1, 2, 3]], [[0, 1, 2, 3]]
                choices = [[[0], *written, "winograd2:NHWC,HWIO->NHWC"]]
                lie = changed(json.loads(text), ("plan", "choices"), choices)
                table.store_plan(env, function, skeleton, sizes, json.dumps(lie))
        assert auto_layout(f, numerics=numerics).outcome(x, k).source == found


def test_hostile_plans_at_random_are_refused_or_harmless(forced):
    """A value in any place of a stored outcome is replaced by something else; what is believed can be explained."""
    auto_layout(network)(X, K)
    env, function, skeleton, sizes, payload = stored()
    table, expected, draw = stores.open_table(str(table_path())), network(X, K), random.Random(11)
    nothing: list[Any] = [None, True, -1, 0, 1.5, 1e308, 5e-324, 10**30, "", "NCHW", "x" * 200, [], [[]], {}, [3, 1]]

    def places(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        yield here
        inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, one in inside:
            yield from places(one, (*here, key))

    everywhere = list(places(payload))
    lies = [changed(payload, draw.choice(everywhere), draw.choice(nothing)) for _ in range(19)]
    believed = 0
    for lie in (changed(payload, ("seconds",), 1.5), *lies):  # the first is believed
        table.store_plan(env, function, skeleton, sizes, json.dumps(lie))
        tuned = auto_layout(network)
        np.testing.assert_allclose(tuned(X, K), expected, rtol=1e-5, atol=1e-5)
        outcome = tuned.outcome(X, K)
        believed += outcome.to_json() | {"source": ""} == lie | {"source": ""} if isinstance(lie, dict) else 0
        explanation = tuned.explain(X, K)
        assert str(explanation) and json.dumps(explanation.to_json()) and explanation._repr_html_()
    assert 0 < believed < 20


def test_a_table_whose_sizes_are_a_lie(forced):
    """What other sizes of the program were planned as is a hint, and comes from the same file."""
    auto_layout(network)(X, K)
    env, _, skeleton, sizes, payload = stored()
    lies = ('["1", "2"]', "[1e999]", "[NaN]", "[" * 5000, f"[{'9' * 400}]", "7", "{}", sizes)
    with contextlib.closing(sqlite3.connect(table_path())) as raw, raw:
        for number, text in enumerate(lies):
            row = (env, f"f{number}", skeleton, text, "[" * 5000 if text == sizes else json.dumps(payload))
            raw.execute("INSERT INTO plans VALUES(?, ?, ?, ?, ?, ?)", (*row, checksum("plans", row)))
    close_tables()
    tuned = auto_layout(network)
    np.testing.assert_allclose(tuned(X[:1], K), network(X[:1], K), rtol=1e-5, atol=1e-5)
    assert tuned.outcome(X[:1], K).kept
