"""A damaged table, and one of another schema: what can be read is kept, and nothing wrong is believed."""

import logging
import random
import re
import sqlite3
import warnings

import pytest
from tables import OK, damaged_files, filled

from jaxlayout.table import sqlite
from jaxlayout.table.table import CostTable, TableWarning

# Damage


def test_a_flipped_byte_costs_one_record(path, caplog):
    those = filled(path)
    data = path.read_bytes()
    assert data.count(b"1000123.0") == 1
    path.write_bytes(data.replace(b"1000123.0", b"1000923.0"))
    with CostTable(path) as table:
        found = table.measurements("env", "conv")
        assert found == {name: one for name, one in those.items() if name != "candidate-123"}
        assert "checksum" in caplog.text
        table.record("env", "conv", "candidate-123", OK)
        assert table.measurements("env", "conv")["candidate-123"] == OK
    assert not damaged_files(path)


def test_a_record_under_another_key_is_not_valid(path, caplog):
    filled(path, 3)
    with sqlite3.connect(path) as raw:
        raw.execute("UPDATE measurements SET candidate = 'moved' WHERE candidate = 'candidate-1'")
        raw.execute("UPDATE measurements SET record = 7 WHERE candidate = 'candidate-2'")
        raw.execute("UPDATE plans SET function = 'moved', checksum = x'00ff'")
    raw.close()
    with CostTable(path) as table:
        assert list(table.measurements("env", "conv")) == ["candidate-0"]
        assert table.load_plan("env", "moved") is None
        assert table.plans_like("env", "skeleton") == []
    assert len(caplog.records) == 4


def test_a_file_cut_short_is_set_aside_and_salvaged(path):
    those = filled(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    with CostTable(path) as table:
        with pytest.warns(
            TableWarning, match=r"malformed.*set aside as table.sqlite.damaged-.*valid records"
        ) as caught:
            found = table.measurements("env", "conv")
        assert len(caught) == 1
        assert found.items() <= those.items()
        assert 50 < len(found) < 400
        table.record("env", "conv", "new", OK)
        assert table.measurements("env", "conv") == found | {"new": OK}
    (aside,) = damaged_files(path)
    assert aside.stat().st_size == len(data) * 2 // 3
    with CostTable(path) as table:  # and no warning any more
        assert len(table.measurements("env", "conv")) == len(found) + 1


def test_a_damaged_page_costs_the_records_on_it(path):
    those = filled(path)
    data = bytearray(path.read_bytes())
    page = data.index(b"1000200.0") // 4096 * 4096
    data[page : page + 4096] = random.Random(0).randbytes(4096)
    path.write_bytes(data)
    with CostTable(path) as table:
        with pytest.warns(TableWarning, match="set aside"):
            found = table.measurements("env", "conv")
        assert found.items() <= those.items()
        assert "candidate-0" in found and "candidate-399" in found and "candidate-200" not in found
        assert len(found) > 300
        assert table.load_plan("env", "function") == '{"plan": 1}'


def test_new_records_win_over_salvaged_ones(path):
    filled(path)
    data = bytearray(path.read_bytes())
    page = data.index(b"1000200.0") // 4096 * 4096
    data[page : page + 4096] = bytes(4096)
    path.write_bytes(data)
    with CostTable(path) as table, pytest.warns(TableWarning, match="set aside"):
        table.record_many("env", "conv", {f"candidate-{number}": OK for number in range(400)})
        assert set(table.measurements("env", "conv").values()) == {OK}


@pytest.mark.parametrize(
    "content", [b"xy", b"hello, world\n" * 999, bytes(8192), b"SQLite format 3\0" + b"\xff" * 5000]
)
def test_a_file_of_something_else_is_set_aside(path, content):
    path.parent.mkdir()
    path.write_bytes(content)
    with CostTable(path) as table:
        with pytest.warns(TableWarning, match=r"set aside as .*; 0 valid records"):
            assert table.measurements("env", "conv") == {}
        table.record("env", "conv", "a", OK)
        assert table.measurements("env", "conv") == {"a": OK}
    (aside,) = damaged_files(path)
    assert aside.read_bytes() == content


def test_an_empty_file_is_an_empty_table(path):
    path.parent.mkdir()
    path.touch()
    assert len(filled(path)) == 400
    assert not damaged_files(path)


def test_a_sound_database_of_another_program_is_set_aside_unchanged(path):
    filled(path, 3)
    with sqlite3.connect(path) as raw:
        raw.execute("PRAGMA application_id = 7")
    raw.close()
    with CostTable(path) as table:
        with pytest.warns(TableWarning, match=r"not a cost table.*; 0 valid records"):
            table.record("env", "conv", "a", OK)
        assert table.measurements("env", "conv") == {"a": OK}
    (aside,) = damaged_files(path)
    raw = sqlite3.connect(aside)
    assert raw.execute("SELECT count(*) FROM measurements").fetchone() == (3,)
    raw.close()


# Other schemas


def of_schema(version: int) -> pytest.MonkeyPatch:
    """The package as it is when its schema has another number, until undone."""
    patch = pytest.MonkeyPatch()
    patch.setattr(sqlite, "SCHEMA_VERSION", version)
    patch.setattr(sqlite, "SCHEMA", re.sub(r"user_version = \d+", f"user_version = {version}", sqlite.SCHEMA))
    return patch


@pytest.mark.parametrize("versions", [(1, 2), (2, 1), (7, 3, 1)])
@pytest.mark.parametrize("suffix", [".sqlite", ""])
def test_versions_of_different_schemas_used_in_turn_keep_all_they_have(path, versions, suffix):
    path, turns = path.with_suffix(suffix), 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for turn in range(turns):
            for version in versions:
                patch = of_schema(version)
                try:
                    with CostTable(path) as table:
                        table.record("env", "conv", f"{version}, {turn}", OK)
                        found = table.measurements("env", "conv")
                        assert list(found) == [f"{version}, {n}" for n in range(turn, -1, -1)]
                    with CostTable(table.path) as again:  # by the name that `jaxlayout table path` prints
                        assert again.measurements("env", "conv") == found and again.path == table.path
                finally:
                    patch.undo()
    names = {path.name, *(f"{path.stem}-{version}{suffix}" for version in versions[1:])}
    assert {file.name for file in path.parent.iterdir()} == names


def test_a_table_stays_with_its_records_when_the_other_schemas_is_gone(path):
    filled(path, 3)
    patch = of_schema(2)
    try:
        those = filled(path, 5)
        path.unlink()
        with CostTable(path) as table:
            assert table.measurements("env", "conv") == those
    finally:
        patch.undo()
    assert not damaged_files(path)


def test_two_schemas_that_start_at_the_same_moment(path, monkeypatch):
    """The other one's file appears between looking and opening: it is not damaged."""
    path.parent.mkdir()
    path.touch()
    connect = sqlite3.connect

    def late(*args, **keywords):
        monkeypatch.setattr(sqlite3, "connect", connect)
        patch = of_schema(2)
        try:
            filled(path, 3)
        finally:
            patch.undo()
        return connect(*args, **keywords)

    monkeypatch.setattr(sqlite3, "connect", late)
    with CostTable(path) as table:
        table.record("env", "conv", "a", OK)
        assert table.measurements("env", "conv") == {"a": OK} and table.path != path
    assert not damaged_files(path) and sqlite.schema_of(path) == 2


def test_merging_from_another_schema_says_so(path):
    patch = of_schema(2)
    try:
        filled(path, 3)
    finally:
        patch.undo()
    with CostTable(path) as table:
        assert table.merge(path) == (0, [f"{path.name}: its schema is version 2, not 1"])


def test_whatever_byte_is_hit_nothing_raises_and_nothing_wrong_is_read(tmp_path):
    those = filled(tmp_path / "table.sqlite", 60)
    data, draw = (tmp_path / "table.sqlite").read_bytes(), random.Random(7)
    logging.getLogger("jaxlayout").setLevel(logging.CRITICAL)
    try:
        for trial in range(120):
            path, broken = tmp_path / f"{trial}.sqlite", bytearray(data)
            position = draw.randrange(draw.choice([110, 4096, len(data)]))
            broken[position] ^= 1 << draw.randrange(8)
            if trial % 5 == 0:
                del broken[draw.randrange(len(broken)) :]
            path.write_bytes(broken)
            with warnings.catch_warnings(), CostTable(path) as table:
                warnings.simplefilter("ignore", TableWarning)
                assert table.measurements("env", "conv").items() <= those.items(), (trial, position)
                assert table.load_plan("env", "function") in (None, '{"plan": 1}')
                table.record("env", "conv", "new", OK)
                assert table.measurements("env", "conv")["new"] == OK
                table.counts()
    finally:
        logging.getLogger("jaxlayout").setLevel(logging.NOTSET)


def test_a_table_that_vanishes_is_made_again(path):
    filled(path, 3)
    table = CostTable(path)
    assert len(table.measurements("env", "conv")) == 3
    for file in path.parent.iterdir():
        file.unlink()
    assert table.measurements("env", "conv") == {}
    table.record("env", "conv", "a", OK)
    table.close()
    with CostTable(path) as again:
        assert again.measurements("env", "conv") == {"a": OK}


def test_a_file_set_aside_by_another_process_is_left_behind(path):
    """The one that has it open notices before its next step, and what it wrote is in the new file."""
    those = filled(path)
    with CostTable(path) as table:
        assert table.measurements("env", "conv") == those
        with path.open("r+b") as file:
            page = file.read().index(b"1000200.0") // 4096 * 4096
            file.seek(page)
            file.write(bytes(4096))
        with CostTable(path) as other, pytest.warns(TableWarning, match="set aside"):
            kept = other.measurements("env", "conv")
        table.record("env", "conv", "new", OK)
        assert table.measurements("env", "conv") == kept | {"new": OK}
    with CostTable(path) as again:
        assert again.measurements("env", "conv") == kept | {"new": OK}
    assert len(damaged_files(path)) == 1
