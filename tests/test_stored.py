"""What a call finds in the table: plans of other processes, releases and options, damage, and places that cannot be
written."""

from __future__ import annotations

import importlib
import json
import os
import sqlite3
from dataclasses import fields, replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT, K, X, conv, normal, python
from jax import lax
from tables import as_another_process
from toys import table

from jaxlayout import Options, Outcome, TableWarning, auto_layout
from jaxlayout.runtime.timing import Paired
from jaxlayout.table.records import ENVIRONMENT, look
from jaxlayout.tuning import pipeline
from jaxlayout.verify.accept import Verdict

CALL = """
import logging, sys
import jax, numpy as np
from jax import lax
import jaxlayout
from jaxlayout.tuning import pipeline
from jaxlayout.convs import candidates, lowering
candidates.lowerings = lambda: {"xla": lowering.lowerings()["xla"]}  # enough
calls = []
real_measure, real_judge = pipeline.measure, pipeline.Pipeline.judge
pipeline.measure = lambda jobs, **k: calls.extend(j.key for j in jobs) or real_measure(jobs, **k)
pipeline.Pipeline.judge = lambda self, *plan: calls.append("judge") or real_judge(self, *plan)

@jaxlayout.auto_layout
def f(x, k, scale):
    y = jax.nn.relu(lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW")))
    return {"mean": y.mean((2, 3)) * scale, "y": y}

x = np.random.default_rng(0).standard_normal((2, 3, 6, 5)).astype("f")
k = np.random.default_rng(1).standard_normal((4, 3, 3, 3)).astype("f")
out = f(x, k, 2.0)
np.testing.assert_allclose(out["y"], f.__wrapped__(x, k, 2.0)["y"], rtol=1e-5, atol=1e-5)
lowered = f.lower(x, k, 2.0)
print(len(calls), f.outcome(x, k, 2.0).source)
"""


def test_a_second_process_neither_measures_nor_judges(tmp_path):
    first = python("-c", CALL, PYTHONHASHSEED="1").stdout.split()
    assert int(first[0]) >= 1 and first[1] == "stored"
    moved = tmp_path / "moved.py"  # to other lines of another file
    moved.write_text("\n\n\n" + CALL)
    script = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
    assert python("-c", script, moved, PYTHONPATH=str(ROOT), PYTHONHASHSEED="2").stdout.split() == ["0", "stored"]
    assert table().counts()["plans"] == 1


def test_a_damaged_table(forced):
    path = Path(os.environ["JAXLAYOUT_TABLE"])
    path.write_bytes(b"this is no database" * 1000)
    f = auto_layout(conv)
    with pytest.warns(TableWarning, match="set aside"):
        out = f(X, K)
    np.testing.assert_allclose(out, conv(X, K), rtol=1e-5, atol=1e-5)
    assert f.outcome(X, K).kept
    assert table().counts()["plans"] == 1


def test_a_table_of_another_schema(forced):
    path = Path(os.environ["JAXLAYOUT_TABLE"])
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE plans (something, quite, different)")
    connection.close()
    f = auto_layout(conv)
    with pytest.warns(TableWarning):
        out = f(X, K)
    np.testing.assert_allclose(out, conv(X, K), rtol=1e-5, atol=1e-5)
    assert f.outcome(X, K).kept


def test_a_table_that_cannot_be_written(forced, tmp_path):
    (tmp_path / "file").write_text("in the way")
    f = auto_layout(conv, table=tmp_path / "file" / "table.sqlite")
    with pytest.warns(TableWarning, match="for this process only"):
        out = f(X, K)
    np.testing.assert_allclose(out, conv(X, K), rtol=1e-5, atol=1e-5)
    asked = len(forced)
    assert f.outcome(X, K).kept and f.outcome(X, K).source == "stored"
    assert len(forced) == asked  # this process remembers


def test_a_table_that_can_only_be_read(forced, monkeypatch):
    f = auto_layout(conv)
    f(X, K)
    asked = len(forced)
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda name, *a, **k: connect(name.replace("=rwc", "=ro"), *a, **k))
    as_another_process(monkeypatch)
    again = auto_layout(conv)
    np.testing.assert_array_equal(again(X, K), f(X, K))  # as it was deployed: without a warning
    assert again.outcome(X, K).source == "stored" and len(forced) == asked
    other = auto_layout(lambda x, k: conv(x[:1], k))
    with pytest.warns(TableWarning, match="cannot be written"):
        out = other(X, K)
    np.testing.assert_allclose(out, conv(X[:1], K), rtol=1e-5, atol=1e-5)
    assert other.outcome(X, K).kept and other.outcome(X, K).source == "stored"


def test_a_stored_plan_that_cannot_be_read_is_made_anew(forced, caplog):
    f = auto_layout(conv)
    f(X, K)
    ((env, function, skeleton, sizes, _),) = (
        row for row in look(os.environ["JAXLAYOUT_TABLE"])[0]["plans"] if row[1] != ENVIRONMENT
    )
    for payload in ('{"plan": 1}', "[]", '"text"', '{"plan": {"format": 99}, "verdict": {}}'):
        table().store_plan(env, function, skeleton, sizes, payload)
        assert f.outcome(X, K).source == "measured"
        assert f.outcome(X, K).source == "stored"
    assert "made anew: not an outcome: a list of 0" in caplog.text


def test_outcomes_survive_json(costs):
    outcome = auto_layout(conv).outcome(X, K)
    assert Outcome.from_json(json.loads(json.dumps(outcome.to_json()))) == outcome
    for bad in (None, 3, {}, {"plan": {}}, outcome.to_json() | {"more": 1}):
        with pytest.raises(ValueError, match="not a"):
            Outcome.from_json(bad)


def test_verdicts_that_name_no_noise_are_read():
    """As they were stored until they did."""
    verdict = Verdict(kept=True, reason="faster", difference=1e-6, noise=(0, 3))
    data = json.loads(json.dumps(verdict.to_json()))
    assert Verdict.from_json(data) == verdict
    assert Verdict.from_json({name: value for name, value in data.items() if name != "noise"}) == replace(
        verdict, noise=()
    )
    for bad in (3, "03", [-1], [0.5], [True], {"0": 1}):
        with pytest.raises(ValueError, match="noise"):
            Verdict.from_json(data | {"noise": bad})


OTHERS = {"memory_limit": 999.0, "numerics": "relaxed", "verdict": True}
ALIKE = {"on_miss": "error", "time_budget": 5.0, "lock_timeout": 5.0}
"""Values that are not those of the fixture: of options on which a plan depends, and of such as it does not."""


def test_different_options_have_different_plans(costs, monkeypatch):
    monkeypatch.setattr("jaxlayout.verify.accept.race", lambda *_: (False, Paired.of([(1e6, 1e6)] * 3)))
    assert {field.name for field in fields(Options)} == {*OTHERS, *ALIKE, "policy", "table"}  # a new one comes here
    auto_layout(conv)(X, K)
    for name, value in OTHERS.items():
        assert auto_layout(conv, **{name: value}).outcome(X, K).source == "measured"
    for name, value in ALIKE.items():
        assert auto_layout(conv, **{name: value}).outcome(X, K).source == "stored"


def test_a_release_plans_anew_from_what_was_measured(forced, monkeypatch):
    auto_layout(conv)(X, K)
    asked = len(forced)
    monkeypatch.setattr(pipeline, "__version__", "99.0")
    assert auto_layout(conv).outcome(X, K).source == "measured"
    assert auto_layout(conv).outcome(X, K).source == "stored"
    assert len(forced) == asked


def test_a_rule_that_is_another_has_other_plans_and_times(forced, monkeypatch):
    def pooled(x, k):
        return lax.reduce_window(conv(x, k), -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")

    x = normal(4, 2, 3, 128, 128)
    rules, pooling = importlib.import_module("jaxlayout.graph.rules.base"), lax.reduce_window_max_p
    auto_layout(pooled)(x, K)
    asked = len(forced)
    monkeypatch.setitem(rules._rules, pooling, replace(rules.rule_for(pooling), version=2))
    assert auto_layout(pooled).outcome(x, K).source == "measured"
    (timed,) = (key for key in forced[:asked] if key.startswith("reduce_window_max@1 "))
    assert forced[asked:] == [timed.replace("@1", "@2")]
