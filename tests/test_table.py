"""The cost table: what goes in comes out, whatever happens to the file in between.

Other processes are real ones, and so is the read-only folder: where the tests run as root, that process gives
up its rights first. A full disk, and file systems that refuse SQLite's shared memory, are imitated (`disks`, and a
connection that refuses).
"""

import contextlib
import dataclasses
import json
import math
import os
import sqlite3
import sys
import tempfile
import textwrap
import threading
from pathlib import Path

import pytest
from disks import full_disk
from hypothesis import given
from hypothesis import strategies as st
from tables import OK, damaged_files, filled, finish, measured, start

from jaxlayout.table import sqlite
from jaxlayout.table.contents import holdings, places
from jaxlayout.table.measurement import MAX_DETAIL, MAX_NS, Measurement
from jaxlayout.table.records import ENVIRONMENT, look
from jaxlayout.table.table import MAX_LIKE, CostTable, TableWarning, describe

# Measurements


@given(
    st.sampled_from(["ok", "slow", "wrong", "failed", "memory", "pruned"]),
    st.floats(1e-3, MAX_NS),
    st.one_of(st.none(), st.floats(0, 1e300)),
    st.one_of(st.none(), st.integers(0, 2**60)),
    st.text(max_size=30),
)
def test_a_measurement_survives_json(status, ns, error, temp_bytes, detail):
    one = dataclasses.replace(OK, status=status, median_ns=ns, error=error, temp_bytes=temp_bytes, detail=detail)
    assert Measurement.from_json(json.loads(json.dumps(one.to_json(), allow_nan=False))) == one


def test_a_failure_needs_no_time_and_no_program():
    failed = Measurement(
        status="failed",
        median_ns=None,
        spread_ns=None,
        runs=0,
        error=None,
        temp_bytes=None,
        program="",
        detail="why",
    )
    assert Measurement.from_json(failed.to_json()) == failed


def test_a_nan_error_exceeds_every_bound():
    wrong = dataclasses.replace(OK, status="wrong", error=math.nan)
    assert wrong.error == math.inf
    assert json.loads(json.dumps(wrong.to_json(), allow_nan=False))["error"] == "inf"
    assert Measurement.from_json(wrong.to_json()) == wrong


def test_a_long_explanation_is_cut():
    assert len(dataclasses.replace(OK, detail="x" * 10**6).detail) == MAX_DETAIL


BAD_FIELDS = [
    ({"median_ns": math.nan}, "median_ns is nan"),
    ({"median_ns": -1.0}, "median_ns is -1.0"),
    ({"median_ns": 0}, "median_ns is 0"),
    ({"median_ns": 1e300}, "outside"),
    ({"median_ns": 10**400}, "a huge integer"),
    ({"median_ns": "1"}, "not a number"),
    ({"median_ns": True}, "not a number"),
    ({"median_ns": None}, "there is no median_ns"),
    ({"spread_ns": math.inf}, "spread_ns is inf"),
    ({"runs": 0}, "at least one run"),
    ({"runs": 2.5}, "not an integer"),
    ({"runs": None}, "not an integer"),
    ({"error": math.nan}, "error is nan"),
    ({"error": "inf"}, "the error is infinite"),
    ({"error": [0]}, "a list of 1"),
    ({"temp_bytes": -1}, "outside"),
    ({"temp_bytes": 2**70}, "a huge integer"),
    ({"program": "x" * 10**6}, "1000000 characters long"),
    ({"detail": 7}, "not a string"),
    ({"detail": "x" * (MAX_DETAIL + 1)}, "characters long"),
    ({"status": "fine"}, "not one of ok"),
    ({"status": ["ok"]}, "a list of 1"),
    ({"surprise": 1}, "unknown fields: 'surprise'"),
]


@pytest.mark.parametrize(("change", "reason"), BAD_FIELDS)
def test_a_broken_measurement_is_refused_with_a_short_reason(change, reason):
    with pytest.raises(ValueError, match=reason) as refusal:
        Measurement.from_json(OK.to_json() | change)
    assert len(str(refusal.value)) < 200


def test_what_is_no_measurement_at_all_is_refused():
    for value in (None, [], "ok", 3, {}, {"status": "ok"}):
        with pytest.raises(ValueError):
            Measurement.from_json(value)


# What goes in comes out


@pytest.mark.parametrize("where", ["file", "memory"])
def test_round_trip(path, where):
    with CostTable(path if where == "file" else ":memory:") as table:
        assert table.measurements("env", "conv") == {}
        assert table.load_plan("env", "f") is None
        table.record("env", "conv", "a", OK)
        table.record_many("env", "conv", {"a": measured(5), "b": dataclasses.replace(OK, status="slow")})
        table.record("env", "other conv", "a", measured(6))
        table.record("other env", "conv", "a", measured(7))
        assert table.measurements("env", "conv") == {
            "a": measured(5),
            "b": dataclasses.replace(OK, status="slow"),
        }
        assert table.measurements("other env", "conv") == {"a": measured(7)}
        table.store_plan("env", "f", "s", "[1, 2.5]", json.dumps("x" * 3_000_000))
        table.store_plan("env", "f", "s", "[1, 2.5]", '"newer"')
        assert table.load_plan("env", "f") == '"newer"'
        assert table.load_plan("other env", "f") is None
        assert table.counts() == {"measurements": 4, "plans": 1, "unsaved": 0}
        table.clear()
        assert table.counts() == {"measurements": 0, "plans": 0, "unsaved": 0}


def test_another_table_on_the_file_sees_it(path):
    those = filled(path)
    with contextlib.closing(sqlite3.connect(path)) as raw:
        assert raw.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    with CostTable(path) as table:
        assert table.measurements("env", "conv") == those
        assert table.load_plan("env", "function") == '{"plan": 1}'
    assert not damaged_files(path)


def test_nothing_is_made_before_it_is_needed(path):
    CostTable(path).close()
    assert not path.parent.exists()


def test_the_default_is_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert CostTable().path.name == "table.sqlite"
    if sys.platform == "linux":
        assert CostTable().path == tmp_path / "jaxlayout" / "table.sqlite"


def test_plans_like_are_the_newest_first():
    table = CostTable(":memory:")
    for number in range(MAX_LIKE + 5):
        table.store_plan("env", f"f{number}", "s", f"[{number}]", f'"{number}"')
    table.store_plan("env", "f6", "s", "[6]", '"6 again"')
    table.store_plan("env", "g", "another", "[]", '"g"')
    like = table.plans_like("env", "s")
    assert len(like) == MAX_LIKE
    assert like[:2] == [
        ("f6", "[6]", '"6 again"'),
        (f"f{MAX_LIKE + 4}", f"[{MAX_LIKE + 4}]", f'"{MAX_LIKE + 4}"'),
    ]


def test_what_could_not_be_read_again_is_not_written(path, caplog):
    with CostTable(path) as table:
        table.record_many("env", "conv", {"good": OK, "bad": measured(math.nan), "\ud800": OK, "": OK})
        table.store_plan("env", "f", "s", "not json", "{}")
        table.store_plan("env", "f", "s", '["1"]', "{}")
        table.store_plan("env", "f", "s", "[1]", "{")
        assert table.measurements("env", "conv") == {"good": OK}
        assert table.counts() == {"measurements": 1, "plans": 0, "unsaved": 0}
    assert len(caplog.records) == 6
    assert "median_ns is nan" in caplog.text


# Threads and processes


def test_threads_share_a_table(path):
    table = CostTable(path)

    def write(thread: int) -> None:
        for number in range(20):
            table.record("env", "conv", f"{thread}-{number}", measured(number + 1))
            assert f"{thread}-{number}" in table.measurements("env", "conv")

    threads = [threading.Thread(target=write, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert table.counts() == {"measurements": 80, "plans": 0, "unsaved": 0}
    table.close()


def test_processes_that_write_at_once_lose_nothing(path):
    """From a file that is not there yet, and from one that every process finds damaged."""
    script = """
        print("ready", flush=True); sys.stdin.readline()
        for number in range(100):
            table.record("env", "conv", f"{sys.argv[2]}-{number}", ok)
        sys.stdin.readline()
        sys.warnoptions.clear(); import warnings; warnings.simplefilter("ignore")
        path = sys.argv[3]; table.close(); table = CostTable(path)
        print("ready", flush=True); sys.stdin.readline()
        for number in range(20):
            table.record("env", "conv", f"{sys.argv[2]}-{number}", ok)
        table.close()
    """
    garbage = path.with_name("garbage.sqlite")
    path.parent.mkdir()
    garbage.write_bytes(b"not a database, " * 1000)
    processes = [start(script, path, name, garbage) for name in "AB"]
    for process in processes:
        assert process.stdout and process.stdin and process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n\n")
        process.stdin.flush()
    for process in processes:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        finish(process)
    with CostTable(path) as table:
        assert len(table.measurements("env", "conv")) == 200
    with CostTable(garbage) as table:
        assert len(table.measurements("env", "conv")) == 40
    assert len(damaged_files(garbage)) == 1


def test_a_killed_process_loses_nothing_that_it_had_recorded(path):
    process = start(
        """
        for number in range(10**6):
            table.record("env", "conv", f"candidate-{number}", ok)
            print(number, flush=True)
        """,
        path,
    )
    assert process.stdout
    last = [int(process.stdout.readline()) for _ in range(50)][-1]
    process.kill()
    process.communicate()
    with CostTable(path) as table:
        assert table.measurements("env", "conv").keys() >= {f"candidate-{number}" for number in range(last + 1)}
    assert not damaged_files(path)


def test_a_file_locked_by_another_process(path):
    those = filled(path, 3)
    holder = start(
        """
        import sqlite3
        other = sqlite3.connect(sys.argv[1], isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        print("ready", flush=True); sys.stdin.readline()
        """,
        path,
    )
    assert holder.stdout and holder.stdout.readline() == "ready\n"
    table = CostTable(path, timeout=0.2)
    assert table.measurements("env", "conv") == those  # with a write-ahead log, reading does not wait
    with pytest.warns(TableWarning, match=r"cannot be written.*locked") as caught:
        table.record("env", "conv", "late", OK)
    table.store_plan("env", "late", "skeleton", "[3]", "{}")
    assert len(caught) == 1  # and none for the second
    assert table.measurements("env", "conv") == those | {"late": OK}
    assert [function for function, _, _ in table.plans_like("env", "skeleton")] == ["late", "function"]
    assert table.counts() == {"measurements": 4, "plans": 2, "unsaved": 2}
    finish(holder, "\n")
    table.record("env", "conv", "later", OK)
    assert table.counts() == {"measurements": 5, "plans": 2, "unsaved": 0}
    with CostTable(path) as again:
        assert again.measurements("env", "conv") == those | {"late": OK, "later": OK}
    table.close()


def test_what_was_not_saved_is_written_when_the_table_is_closed(path):
    filled(path, 3)
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    table = CostTable(path, timeout=0.05)
    with pytest.warns(TableWarning, match="cannot be written"):
        table.record("env", "conv", "late", OK)
    holder.close()
    table.close()
    with CostTable(path) as again:
        assert again.measurements("env", "conv")["late"] == OK


def test_a_file_that_cannot_even_be_opened_for_the_lock(path):
    """With a plain journal an exclusive lock keeps readers out too."""
    filled(path, 3)
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("PRAGMA journal_mode = DELETE")
    holder.execute("BEGIN EXCLUSIVE")
    table = CostTable(path, timeout=0.05)
    with pytest.warns(TableWarning, match=r"cannot be read.*locked"):
        assert table.measurements("env", "conv") == {}
    with pytest.warns(TableWarning, match=r"cannot be written.*locked"):
        table.record("env", "conv", "late", OK)
    holder.close()
    assert len(table.measurements("env", "conv")) == 4
    table.close()
    assert not damaged_files(path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_opens_its_own_connection(path):
    """In a process of its own, since forking a process with JAX's threads is warned of."""
    script = """
        import os
        memory = CostTable(":memory:"); memory.record("env", "conv", "before", ok)
        table.record("env", "conv", "before", ok)
        assert table._connection is not None
        child = os.fork()
        assert table._connection is None
        name = "child" if child == 0 else "parent"
        for number in range(50):
            table.record("env", "conv", f"{name}-{number}", ok)
        assert list(memory.measurements("env", "conv")) == ["before"]
        if child == 0:
            table.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        print(len(table.measurements("env", "conv")))
    """
    assert (
        finish(
            start(
                "sys.warnoptions.clear(); import warnings; warnings.simplefilter('ignore')\n" + textwrap.dedent(script),
                path,
            )
        )
        == "101\n"
    )


# Places that cannot be written


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with CostTable(tmp_path / "file" / "table.sqlite") as table:
        with pytest.warns(TableWarning, match="cannot be opened; records are kept for this process only") as caught:
            table.record("env", "conv", "a", OK)
        table.record("env", "conv", "b", OK)
        assert table.measurements("env", "conv") == {"a": OK, "b": OK}
    assert len(caught) == 1


def test_a_path_that_is_a_folder(tmp_path):
    with CostTable(tmp_path) as table:
        with pytest.warns(TableWarning, match="cannot be opened"):
            assert table.measurements("env", "conv") == {}
        table.record("env", "conv", "a", OK)
        assert table.measurements("env", "conv") == {"a": OK}


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs POSIX permissions")
def test_read_only_folder_and_file(monkeypatch):
    """A sound table and a damaged one where nothing can be written, read by a user who is not root."""
    monkeypatch.delenv("TMPDIR")  # nor in tmp_path, which other users cannot enter
    monkeypatch.setattr(tempfile, "tempdir", None)
    folder = Path(tempfile.mkdtemp())
    try:
        those = filled(folder / "table.sqlite", 30)
        (folder / "damaged.sqlite").write_bytes((folder / "table.sqlite").read_bytes()[:12288])
        for file in folder.iterdir():
            file.chmod(0o444)
        folder.chmod(0o555)
        script = """
            import os, urllib.parse, warnings  # pathlib imports it late, when root's Python may be out of reach
            if os.geteuid() == 0:
                os.setgid(65534); os.setuid(65534)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for name in ("table", "damaged", "absent"):
                    with CostTable(os.path.join(sys.argv[1], name + ".sqlite")) as table:
                        print(name, len(table.measurements("env", "conv")), len(caught))
                        table.record("env", "conv", "new", ok)
                        assert table.measurements("env", "conv")["new"] == ok
                        print(len(caught), "cannot be" in str(caught[-1].message))
                    caught.clear()
        """
        lines = finish(start(script, folder)).splitlines()
        assert lines[:2] == [f"table {len(those)} 0", "1 True"]  # reading alone is no reason to warn
        assert lines[2].startswith("damaged ") and lines[2].endswith(" 1") and lines[3] == "1 True"
        assert lines[4:] == ["absent 0 1", "1 True"]
        assert {file.name for file in folder.iterdir()} == {"table.sqlite", "damaged.sqlite"}
    finally:
        folder.chmod(0o755)
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


def test_a_read_only_file_in_a_writable_folder(path, monkeypatch):
    """Root may write any file, so SQLite is told to open this one as it does without that right."""
    those = filled(path, 30)
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda name, *a, **k: connect(name.replace("=rwc", "=ro"), *a, **k))
    with CostTable(path) as table:
        assert table.measurements("env", "conv") == those
        with pytest.warns(TableWarning, match=r"cannot be written.*readonly") as caught:
            table.record("env", "conv", "a", OK)
        table.record("env", "conv", "candidate-1", OK)
        assert len(caught) == 1
        assert table.measurements("env", "conv") == those | {"a": OK, "candidate-1": OK}
        assert table.counts() == {"measurements": 31, "plans": 1, "unsaved": 2}


def test_a_full_disk(path):
    filled(path, 3)
    with CostTable(path) as table:
        assert table.measurements("env", "conv")
        plan = json.dumps("x" * 100_000)
        with full_disk(path), pytest.warns(TableWarning, match=r"cannot be written.*full"):
            table.store_plan("env", "big", "s", "[1]", plan)
            assert table.load_plan("env", "big") == plan
        table.record("env", "conv", "a", OK)
        assert table.counts()["unsaved"] == 0
    with CostTable(path) as table:
        assert table.load_plan("env", "big") == plan


def test_no_write_ahead_log_where_there_is_no_shared_memory(path, monkeypatch):
    class NoSharedMemory(sqlite3.Connection):
        def execute(self, sql, *arguments):
            if sql.endswith("journal_mode = wal"):
                raise sqlite3.OperationalError("unable to open database file")
            return super().execute(sql, *arguments)

    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: connect(*a, **k, factory=NoSharedMemory))
    those = filled(path)
    monkeypatch.undo()
    raw = sqlite3.connect(path)
    assert raw.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    raw.close()
    with CostTable(path) as table:
        assert table.measurements("env", "conv") == those


def test_no_write_ahead_log_on_a_network_file_system(path, monkeypatch):
    those = filled(path)
    monkeypatch.setattr(sqlite, "on_network", lambda path: True)
    with CostTable(path) as table:
        assert table.measurements("env", "conv") == those
        with contextlib.closing(sqlite3.connect(path)) as other:
            assert other.execute("PRAGMA journal_mode").fetchone() == ("delete",)


def test_network_file_systems_are_known_by_their_mounts(monkeypatch):
    mounts = "/dev/sda / ext4 rw 0 0\nserver:/x /home nfs4 rw 0 0\n/dev/sdb /home/my\\040disk xfs rw 0 0\n"
    monkeypatch.setattr(Path, "read_text", lambda path, **encoding: mounts)
    assert sqlite.on_network(Path("/home/me/.cache/jaxlayout/table.sqlite"))
    assert not sqlite.on_network(Path("/home/my disk/table.sqlite"))
    assert not sqlite.on_network(Path("/homes/table.sqlite"))


def test_warnings_as_errors_leave_the_table_usable(tmp_path):
    (tmp_path / "file").touch()
    table = CostTable(tmp_path / "file" / "table.sqlite")
    with pytest.raises(TableWarning):
        table.record("env", "conv", "a", OK)
    assert table.measurements("env", "conv") == {"a": OK}
    table.record("env", "conv", "b", OK)
    assert table.measurements("env", "conv") == {"a": OK, "b": OK}


# Export, import, merge


def test_export_and_import(path, tmp_path):
    those = filled(path, 20)
    with CostTable(path) as table:
        table.store_plan("env", "newest", "skeleton", "[3]", '"newest"')
        table.export_json(tmp_path / "table.json")
    other = CostTable(":memory:")
    other.record("env", "conv", "candidate-0", OK)
    assert other.import_json(tmp_path / "table.json") == (22, [])
    assert other.measurements("env", "conv") == those
    assert [function for function, _, _ in other.plans_like("env", "skeleton")] == ["newest", "function"]
    with pytest.raises(OSError):
        other.export_json(tmp_path / "no such folder" / "table.json")
    with pytest.raises(OSError):
        other.import_json(tmp_path / "no such file")
    assert {file.name for file in tmp_path.iterdir()} == {"cache", "table.json"}


def test_hostile_records_are_refused_one_by_one(tmp_path):
    def entry(*row: object, table: str = "measurements", checksum: object = None) -> dict[str, object]:
        texts = tuple(value if isinstance(value, str) else "" for value in row)
        checksum = sqlite.checksum(table, texts) if checksum is None else checksum
        return dict(zip(("table", *sqlite.COLUMNS[table], "checksum"), (table, *row, checksum), strict=True))

    def record(**change: object) -> str:
        return json.dumps(OK.to_json() | change)

    good = entry("env", "conv", "good", record())
    measurements = [
        (entry("env", "conv", "nan", record(median_ns=math.nan)), "median_ns is nan"),
        (entry("env", "conv", "negative", record(median_ns=-1)), "median_ns is -1"),
        (entry("env", "conv", "absurd", record(median_ns=1e30)), "outside"),
        (entry("env", "conv", "huge", record(program="x" * 10**6)), "characters long"),
        (entry("env", "conv", "digits", '{"runs": ' + "9" * 10**4 + "}"), "digits"),
        (entry("env", "conv", "deep", "[" * 10**5), "recursion"),
        (entry("env", "conv", "not json", "{"), "Expecting"),
        (entry("env", "conv", "array", "[]"), "a list of 0"),
        (entry("env", "conv", "number", 7), "record is not a text"),
        (entry("env", "conv", None, record()), "candidate is not a text"),
        (entry("env", "conv", "x" * 10**5, record()), "candidate is not a text of 1 to"),
        (entry("env", "conv", "\ud800", record()), "cannot be printed"),
        (entry("env", "conv", "\x1b[2J", record()), "cannot be printed"),
        (good | {"candidate": "moved"}, "checksum"),
        (good | {"checksum": None}, "checksum"),
        (good | {"checksum": ["x"]}, "checksum"),
        (good | {"more": 1}, "not a record of"),
        (good | {"table": "sqlite_master"}, "not a record of"),
        (good | {"table": ["plans"]}, "not a record of"),
        (["env", "conv", "list", record()], "not a record of"),
        (None, "not a record of"),
    ]
    plans = [
        (entry("env", "f1", "s", "[true]", "{}", table="plans"), "one of sizes is True, not a number"),
        (entry("env", "f2", "s", "{}", "{}", table="plans"), "sizes is not a list of numbers"),
        (entry("env", "f3", "s", "[1]", "__import__('os')", table="plans"), "Expecting"),
        (entry("env", "f4", "s", "[1e999]", "{}", table="plans"), "one of sizes is inf"),
        (entry("env", "f5", "s", "[NaN]", "{}", table="plans"), "one of sizes is nan"),
    ]
    strange = [("{", "not JSON: Expecting"), ("\udcff", "not JSON"), ("[" * 10**5, "recursion"), ("9" * 10**4, "digit")]
    lines = [json.dumps({"format": "jaxlayout cost table", "schema": sqlite.SCHEMA_VERSION})]
    lines += [json.dumps(one) for one, _ in measurements + plans] + [line for line, _ in strange]
    lines += [json.dumps(one) for one in (good, entry("env", "good", "s", "[1]", "{}", table="plans"))]
    (tmp_path / "hostile.json").write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    table = CostTable(":memory:")
    accepted, refused = table.import_json(tmp_path / "hostile.json")
    assert accepted == 2
    reasons = {int(reason.removeprefix("line ").partition(":")[0]): reason for reason in refused}
    bad = measurements + plans + strange
    assert sorted(reasons) == list(range(2, 2 + len(bad))) and len(refused) == len(bad)
    for number, (_, reason) in enumerate(bad, 2):
        assert reason in reasons[number] and len(reasons[number]) < 200
    assert table.measurements("env", "conv") == {"good": OK}
    assert table.counts() == {"measurements": 1, "plans": 1, "unsaved": 0}


def test_a_line_of_any_length_is_refused_alone(path, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxlayout.table.records.MAX_LINE", 1000)
    filled(path, 2)
    with CostTable(path) as table:
        table.export_json(tmp_path / "table.json")
    first, *rest = (tmp_path / "table.json").read_text().splitlines()
    for long in ("x" * 999, "x" * 1000, "x" * 12345, '"' + "x" * 5000):
        (tmp_path / "long.json").write_text("\n".join([first, rest[0], long, *rest[1:]]))
        other = CostTable(":memory:")
        accepted, refused = other.import_json(tmp_path / "long.json")
        assert accepted == 3 and len(refused) == 1 and refused[0].startswith("line 3: not JSON: ")


def test_many_records_go_in_and_out_some_at_a_time(path, tmp_path, monkeypatch):
    monkeypatch.setattr(sqlite, "BATCH", 7)
    those = filled(path, 50)
    with CostTable(path) as table:
        table.export_json(tmp_path / "table.json")
        assert table.merge(path) == (51, [])  # with itself: what is written meanwhile is not read
        assert table.measurements("env", "conv") == those
    for other, read in ((CostTable(":memory:"), "import_json"), (CostTable(":memory:"), "merge")):
        assert getattr(other, read)(tmp_path / "table.json" if read == "import_json" else path) == (51, [])
        assert other.measurements("env", "conv") == those
        assert list(other.measurements("env", "conv")) == list(those)[::-1]  # newest first


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"schema": 999}', "[" * 10**5, "\udcff"])
def test_a_file_that_is_no_export_is_refused_as_a_whole(tmp_path, text):
    (tmp_path / "file.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    accepted, refused = CostTable(":memory:").import_json(tmp_path / "file.json")
    assert accepted == 0
    assert len(refused) == 1


def test_merge(path, tmp_path):
    those = filled(path, 20)
    before = path.read_bytes()
    with CostTable(tmp_path / "mine.sqlite") as table:
        table.record("env", "conv", "mine", OK)
        assert table.merge(path) == (21, [])
        assert path.read_bytes() == before
        assert table.measurements("env", "conv") == those | {"mine": OK}
        with pytest.raises(FileNotFoundError):
            table.merge(tmp_path / "absent.sqlite")
        (tmp_path / "garbage").write_bytes(b"garbage" * 1000)
        accepted, refused = table.merge(tmp_path / "garbage")
        assert accepted == 0 and "not a database" in refused[0]
        assert (tmp_path / "garbage").exists()
        with sqlite3.connect(path) as raw:
            raw.execute("UPDATE measurements SET candidate = 'moved' WHERE candidate = 'candidate-7'")
        raw.close()
        accepted, refused = table.merge(path)
        assert accepted == 20 and len(refused) == 1 and "checksum" in refused[0]


def test_a_table_open_elsewhere_can_be_merged(path, tmp_path):
    """Its last records are in the write-ahead log only."""
    with CostTable(path) as open_elsewhere, CostTable(tmp_path / "mine.sqlite") as table:
        open_elsewhere.record("env", "conv", "a", OK)
        assert table.merge(path) == (1, [])
        open_elsewhere.record("env", "conv", "b", OK)
        assert len(open_elsewhere.measurements("env", "conv")) == 2


# Environments


def test_an_environment_is_described_beside_its_first_record(path):
    describe("f00d", {"jax": "1.0", "versions": {"dot": "1"}})
    describe("beef", {"jax": "1.0", "versions": {"dot": "2"}})
    with CostTable(path) as table:
        table.measurements("f00d", "conv")
        assert look(path)[0]["plans"] == []  # who only reads, writes nothing
        table.record("f00d", "conv", "a", measured(1))
        table.record("f00d-relaxed", "conv", "a", measured(1))
        table.store_plan("beef", "f", "s", "[]", "{}")
        table.record("of another process", "conv", "a", measured(1))
        changes = [table.load_plan(env, ENVIRONMENT) for env in ("f00d", "f00d-relaxed", "beef")]
        table.record("f00d", "conv", "b", measured(2))
        assert [table.load_plan(env, ENVIRONMENT) for env in ("f00d", "f00d-relaxed", "beef")] == changes  # once
        assert table.counts() == {"measurements": 4, "plans": 1, "unsaved": 0}
        assert table.load_plan("of another process", ENVIRONMENT) is None
    found = {one.env: one for one in holdings(look(path)[0])}
    assert found["f00d"].environment == {"jax": "1.0", "versions": {"dot": "1"}} and found["f00d"].measurements == 2
    assert found["beef"].plans == 1 and found["beef"].written is not None
    assert found["of another process"].environment is None
    grouped = [{one.env for one in together} for together in places(list(found.values()))]
    assert grouped == [{"f00d", "f00d-relaxed", "beef"}, {"of another process"}]


@pytest.mark.parametrize(
    "payload", ["[]", "3", '{"environment": 3, "written": "x"}', '{"written": 1e300}', '{"written": NaN}']
)
def test_a_strange_description_is_none(path, payload):
    with CostTable(path) as table:
        table.store_plan("env", ENVIRONMENT, ENVIRONMENT, "[]", payload)
    (found,) = holdings(look(path)[0])
    assert (found.environment, found.written, found.plans) == (None, None, 0)


def test_forgetting_environments(path):
    those = filled(path)
    with CostTable(path) as table:
        table.record("other", "conv", "a", measured(1))
        large = path.stat().st_size
        assert table.forget({"env", "absent"}) == len(those) + 1
        assert table.measurements("env", "conv") == {} and table.load_plan("env", "function") is None
        assert table.measurements("other", "conv") == {"a": measured(1)}
        assert table.forget({"env"}) == 0
    assert path.stat().st_size < large / 2


def test_forgetting_beside_a_reader(path):
    those = filled(path)
    with CostTable(path) as table:
        reader = sqlite3.connect(path)
        cursor = reader.execute("SELECT * FROM measurements")
        cursor.fetchone()  # in the middle of it
        assert table.forget({"env"}) == len(those) + 1
        reader.close()
        assert table.counts() == {"measurements": 0, "plans": 0, "unsaved": 0}


def test_forgetting_what_could_not_be_written(tmp_path):
    with CostTable(":memory:") as table:
        table.record("env", "conv", "a", measured(1))
        assert table.forget({"env"}) == 1
        assert table.measurements("env", "conv") == {}


def test_looking_changes_nothing(path):
    filled(path)
    damaged = path.read_bytes().replace(b'"median_ns":1000007.0', b'"median_ns":1000008.0')
    path.write_bytes(damaged)
    rows, refused = look(path)
    assert len(rows["measurements"]) == 399 and len(refused) == 1 and "checksum" in refused[0]
    path.write_bytes(b"something else entirely" * 1000)
    rows, refused = look(path)
    assert not any(rows.values()) and len(refused) == 1
    assert path.read_bytes() == b"something else entirely" * 1000 and not damaged_files(path)
    with pytest.raises(FileNotFoundError, match="no cost table at"):
        look(path.parent / "absent.sqlite")
