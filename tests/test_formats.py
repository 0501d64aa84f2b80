"""All that is stored says which form it has. What is from before it did is read; what is newer is
told, or not believed."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from jax import lax

from bench.rows import read_rows, write_rows
from jaxlayout import CostTable, Outcome, Plan, auto_layout
from jaxlayout.measure.marker import Marker
from jaxlayout.runtime.plain_data import check_format
from jaxlayout.table import sqlite
from jaxlayout.table.contents import holdings
from jaxlayout.table.measurement import Measurement
from jaxlayout.table.records import ENVIRONMENT, look
from jaxlayout.table.table import describe

# As they were stored before measurements, outcomes, environments, markers and results had a number.

SIGNATURE = "transpose=[2, 3, 30]float32 by=[0, 2, 1] in=entry"
MEASUREMENT = (
    '{"detail":"","error":null,"median_ns":21607.5,"program":"f1ae5bf5d3db0e0e","runs":9,'
    '"spread_ns":6453.872252321982,"status":"ok","temp_bytes":0}'
)
EXPORTED = {
    "candidate": "transpose",
    "checksum": "bfc9f9e287a2a133",
    "env": "6d5906115843c36b",
    "record": MEASUREMENT,
    "signature": SIGNATURE,
    "table": "measurements",
}
PLAN = (
    '{"format": 3, "choices": [[[0], [[0, 1, 2, 3], [0, 1, 2, 3]], [[0, 2, 3, 1]], "im2col:NCHW,OIHW->NHWC"]], '
    '"conversions": [[[2, 4, 6, 5], "float32", [0, 2, 3, 1], [0, 1, 2, 3], [], 1.0]], '
    '"predicted_ns": 159448.61022727273, "written_ns": 109633236.0, "bound_ns": 159448.61022727273, "exact": true, '
    '"compiler_options": {}, "sealed_bytes": 4096}'
)
OUTCOME = (
    '{"source": "measured", "seconds": 12.674126222002087, "measured": 3, "folded": false, "plan": ' + PLAN + ", "
    '"verdict": {"kept": true, "reason": "timing was not asked for", "cause": "untried", "original_ns": null, '
    '"tuned_ns": null, "ratio": null, "spread": null, "pairs": 0, "difference": 0.0, "noise": [], '
    '"original_temp": 1392, "tuned_temp": 11568}}'
)
TOLD = '{"environment":{"cores":2,"cpu":"AMD EPYC","jax":"0.12.0.1"},"written":1796066515.8516674}'
MARKER = '{"doing": "run for the first time", "process": 7, "time": 1796066515.85}'
RESULTS = '[{"case": "native", "ratio": 0.998, "spread": 0.025}]'

NEWER = 99


def numbered(text: str, number: Any = NEWER) -> str:
    """The same, with another number and what nobody here knows."""
    return json.dumps(json.loads(text) | {"format": number, "new": 1})


def conv(x: Any, k: Any) -> Any:
    return lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW"))


X, K = jnp.ones((2, 3, 6, 5)), jnp.ones((4, 3, 3, 3))

PARSED = {"measurement": (Measurement, MEASUREMENT), "plan": (Plan, PLAN), "outcome": (Outcome, OUTCOME)}


@pytest.mark.parametrize("name", PARSED)
def test_what_was_stored_is_read_and_stored_with_a_number(name):
    kind, text = PARSED[name]
    again = json.loads(json.dumps(kind.from_json(json.loads(text)).to_json()))
    renamed = text.replace('"format": 3', '"format": 4').replace("sealed_bytes", "materialised_bytes")
    assert {"format": 1} | json.loads(renamed) == again


@pytest.mark.parametrize("name", PARSED)
def test_a_newer_form_is_told(name):
    """And so is what is no number, before anything else that is wrong."""
    kind, text = PARSED[name]
    article = "an" if name == "outcome" else "a"
    known = 4 if name == "plan" else 1
    with pytest.raises(ValueError, match=f"^{article} {name} of format 99, of a newer .* knows format {known}$"):
        kind.from_json(json.loads(numbered(text)))
    for bad in ("3", True, None, -1, 2.0, [1]):
        with pytest.raises(ValueError, match="format is"):
            kind.from_json(json.loads(numbered(text, bad)))


def test_a_plan_of_an_older_form_is_told(tmp_path):
    """Where it is loaded, too; one without a number is of the first."""
    for data, number in (({"choices": []}, 1), (json.loads(PLAN) | {"format": 2}, 2)):
        (tmp_path / "plan.json").write_text(json.dumps(data))
        with pytest.raises(ValueError, match=f"a plan of format {number}, of an older .* knows format 3"):
            Plan.load(tmp_path / "plan.json")


def test_what_is_in_between_is_known():
    for number in (2, 3):
        check_format("a thing", {"format": number}, newest=3, oldest=2)
    for number in (0, 1, 4):
        with pytest.raises(ValueError, match="a thing of format"):
            check_format("a thing", {"format": number}, newest=3, oldest=2)


def export(path: Path, *records: dict[str, Any]) -> Path:
    head = {"format": "jaxlayout cost table", "schema": 1}
    path.write_text("".join(json.dumps(line) + "\n" for line in (head, *records)))
    return path


def record(text: str, **changed: str) -> dict[str, Any]:
    """A line of an exported file."""
    line = EXPORTED | changed | {"record": text}
    row = tuple(line[name] for name in sqlite.COLUMNS["measurements"])
    return line | {"checksum": sqlite.checksum("measurements", row)}


def test_an_exported_record_is_taken(tmp_path):
    with CostTable(tmp_path / "table.sqlite") as table:
        assert table.import_json(export(tmp_path / "old.json", EXPORTED)) == (1, [])
        found = table.measurements(EXPORTED["env"], SIGNATURE)
        assert found == {"transpose": Measurement.from_json(json.loads(MEASUREMENT))}


def test_a_newer_record_is_measured_anew(tmp_path, caplog):
    """It is refused where it is imported, and not found where it is in the file already."""
    path = tmp_path / "table.sqlite"
    newer = record(numbered(MEASUREMENT))
    with CostTable(path) as table:
        accepted, (why,) = table.import_json(export(tmp_path / "new.json", newer))
        assert accepted == 0 and "a measurement of format 99, of a newer version of jaxlayout" in why
        table.record("env", "signature", "known", Measurement.from_json(json.loads(MEASUREMENT)))
    with closing(sqlite3.connect(path)) as raw:
        row = tuple(newer[name] for name in sqlite.COLUMNS["measurements"])
        sqlite.insert(raw, {"measurements": [("env", "signature", *row[2:])]})
        raw.commit()
    with CostTable(path) as table:
        assert list(table.measurements("env", "signature")) == ["known"]
        assert "skipped a record of measurements: a measurement of format 99" in caplog.text


def test_an_exported_table_of_another_schema_is_told(tmp_path):
    file = export(tmp_path / "new.json", EXPORTED)
    file.write_text(file.read_text().replace('"schema": 1', '"schema": 2'))
    assert CostTable(":memory:").import_json(file) == (0, [f"{file}: its schema is version 2, not 1"])


def test_a_stored_plan_of_a_newer_form_is_made_anew(costs, caplog, tmp_path):
    f = auto_layout(conv)
    f(X, K)
    with CostTable(tmp_path / "table.sqlite") as table:
        ((env, *key, payload),) = (row for row in table._select("plans") if row[1] != ENVIRONMENT)
        assert json.loads(payload)["format"] == 1
        table.store_plan(env, *key, numbered(payload))
        assert f.outcome(X, K).source == "measured"
        assert "made anew: an outcome of format 99, of a newer version" in caplog.text
        old = {name: value for name, value in json.loads(payload).items() if name != "format"}
        table.store_plan(env, *key, json.dumps(old))
    assert f.outcome(X, K).source == "stored"


def test_what_an_environment_is(tmp_path):
    """Of a newer form it is as good as not told."""
    with CostTable(tmp_path / "table.sqlite") as table:
        for env, payload in (("old", TOLD), ("newer", numbered(TOLD))):
            table.store_plan(env, ENVIRONMENT, ENVIRONMENT, "[]", payload)
        describe("now", {"cores": 2})
        table.store_plan("now", "f", "s", "[]", "{}")
    rows, refused = look(tmp_path / "table.sqlite")
    found = {holding.env: holding for holding in holdings(rows)}
    assert not refused
    assert found["old"].environment == json.loads(TOLD)["environment"] and found["old"].written == 1796066515.8516674
    assert found["newer"].environment is None and found["newer"].written is None
    assert found["now"].environment == {"cores": 2}
    (payload,) = (row[4] for row in rows["plans"] if row[:2] == ("now", ENVIRONMENT))
    assert json.loads(payload)["format"] == 1


def test_a_marker_says_that_a_process_ended_whatever_its_form(tmp_path):
    marker = Marker.of(tmp_path / "table", "program")
    assert marker.path is not None
    with marker.on("tried"):
        assert json.loads(marker.path.read_text())["format"] == 1
    marker.path.write_text(MARKER)
    assert "process 7 ended on 20" in marker.left() and marker.left().endswith("was run for the first time")
    for text in (numbered(MARKER), "[]", "7", "cut sho"):
        marker.path.write_text(text)
        assert marker.left() == "a process ended while the rewritten function was tried"


def test_results(tmp_path):
    """Those of earlier runs stay when a case is run again."""
    file = tmp_path / "some.json"
    file.write_text(RESULTS)

    def markdown(rows: list[dict[str, Any]]) -> str:
        return "".join(f"| {row['case']} |\n" for row in rows)

    write_rows(tmp_path / "some", ["more"], ["native", "more"], lambda name: {"case": name, "ratio": 2.0}, markdown)
    assert json.loads(file.read_text())["format"] == 2
    assert read_rows(file.read_text()) == [*json.loads(RESULTS), {"case": "more", "ratio": 2.0}]
    with pytest.raises(ValueError, match="a file of results of format 99, of a newer"):
        read_rows(numbered(file.read_text()))
    with pytest.raises(ValueError, match="not a file of results: 7"):
        read_rows("7")
