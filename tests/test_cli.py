"""The command line: what it prints, what it leaves behind, and its exit codes."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
import tomllib
import typing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT, python, shape
from made_up import measurement

import jaxlayout
from jaxlayout import AutoLayout, CostTable, Options, Outcome, Plan, auto_layout
from jaxlayout.cli import checks, main
from jaxlayout.cli import noise as noises
from jaxlayout.cli.base import UsageError
from jaxlayout.cli.settings import add_options, options_of
from jaxlayout.cli.target import argument, arguments, loaded
from jaxlayout.cli.tune import has_failed
from jaxlayout.measure.environment import current_environment
from jaxlayout.measure.turns import Turns
from jaxlayout.table.records import look
from jaxlayout.table.sqlite import SCHEMA_VERSION
from jaxlayout.table.table import describe
from jaxlayout.tuning.outcome import untouched
from jaxlayout.verify.accept import Verdict

MODEL = """
import jax
import jax.numpy as jnp
from jaxlayout import auto_layout

def conv(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW"))

@jax.jit
def jitted(params, x, *, scale=1.0):
    return conv(x, params["w"]) * scale

decorated = auto_layout(conv, memory_limit=1000.0)
donating = jax.jit(conv, donate_argnums=0)

def nothing(x):
    return x + 1

class Held:
    conv = staticmethod(conv)

def given():
    return (jnp.ones((2, 3, 8, 8)),), {"kernel": jnp.ones((4, 3, 3, 3))}

def wrongly_given():
    return jnp.ones(3)

number = 3
"""
TYPES = ["--args", "f32[2,3,8,8]", "f32[4,3,3,3]"]
_numbers = itertools.count()


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A file with functions, under a name of its own: it is imported."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    file = tmp_path / f"model_{next(_numbers)}.py"
    file.write_text(MODEL)
    yield str(file)
    sys.modules.pop(file.stem, None)


def printed(capsys, *argv: str, code: int = 0) -> str:
    assert main(argv) == code
    return capsys.readouterr().out


def refusal(capsys, *argv: str) -> str:
    """What is said of wrong usage."""
    with pytest.raises(SystemExit) as exit:
        main(argv)
    assert exit.value.code == 2
    return capsys.readouterr().err


# Starting


COMMANDS = [("tune",), ("explain",), ("bench",), ("doctor",)]
COMMANDS += [("table", action) for action in ("show", "export", "import", "merge", "prune", "path")]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_has_a_worked_example(command, capsys):
    with pytest.raises(SystemExit) as exit:
        main([*command, "--help"])
    assert exit.value.code == 0
    out = capsys.readouterr().out
    assert "example" in out and f"$ jaxlayout {' '.join(command)}" in out


@pytest.mark.parametrize("argv", [["--help"], ["tune", "--help"], ["table", "path"], ["table", "show"]], ids=" ".join)
def test_what_needs_no_jax_does_not_import_it(argv):
    script = f"""
import sys
from jaxlayout.cli import main
try:
    main({argv!r})
finally:
    assert "jax" not in sys.modules
"""
    done = python("-c", script)
    assert done.stdout or "no cost table" in done.stderr


def test_the_entry_point_and_the_module_are_the_same_program(tmp_path):
    (name, target), *more = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"].items()
    assert (name, target, more) == ("jaxlayout", "jaxlayout.cli:main", [])
    assert loaded(target) is main
    assert python("-m", "jaxlayout", "--version").stdout == f"jaxlayout {jaxlayout.__version__}\n"
    run = subprocess.run([sys.executable, "-m", "jaxlayout", "tune"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and "MODULE:FUNCTION" in run.stderr


def test_what_is_installed_has_the_version_that_the_package_tells():
    """Which is where the build takes it from."""
    assert importlib.metadata.version("jaxlayout") == jaxlayout.__version__


def test_the_public_names_are_there_though_imported_late():
    for name in jaxlayout.__all__:
        assert getattr(jaxlayout, name) is not None and name in dir(jaxlayout)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = jaxlayout.nonsense
    script = "from jaxlayout import *; import sys; assert auto_layout and 'jax' in sys.modules; Lowering, LayoutPolicy"
    python("-c", script)
    # And what comes with the package is registered whichever part of it is imported first.
    script = "from jaxlayout.convs.lowering import lowerings; assert {'xla', 'winograd2'} <= lowerings().keys()"
    python("-c", script)


# Functions and arguments


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("f32[8,224,224,3]", shape(8, 224, 224, 3)),
        ("float32[8]", shape(8)),
        ("bf16[3, 0]", shape(3, 0, dtype=jnp.bfloat16)),
        ("f16[]", shape(dtype=jnp.float16)),
        ("bool[2]", shape(2, dtype=bool)),
        ("u8[2]", shape(2, dtype=jnp.uint8)),
        ("i32[2]", shape(2, dtype=jnp.int32)),
        ("c64[2]", shape(2, dtype=jnp.complex64)),
        ("f8_e4m3fn[2]", shape(2, dtype=jnp.float8_e4m3fn)),
        ('{"w": f32[3,3], "b": [f32[3], 1.5]}', {"w": shape(3, 3), "b": [shape(3), 1.5]}),
        ("(f32[3], {'a': i32[]}, [])", (shape(3), {"a": shape(dtype=jnp.int32)}, [])),
        ("[true, false, null, True, None, -2, 'f32[3]']", [True, False, None, True, None, -2, "f32[3]"]),
    ],
)
def test_arguments_as_jax_prints_their_types(text, expected):
    assert argument(text) == expected


def test_every_short_name_is_the_one_that_jax_prints():
    for dtype in (jnp.float32, jnp.bfloat16, jnp.int4, jnp.uint16, jnp.bool_, jnp.complex64, jnp.float8_e5m2):
        (variable,) = jax.make_jaxpr(lambda x: x)(shape(2, 3, dtype=dtype)).jaxpr.invars
        assert argument(variable.aval.str_short()) == shape(2, 3, dtype=dtype)


def test_keys_and_keywords():
    (key,), keywords = arguments(["key[4]", "train=true", 'params={"a=b": f32[2]}'])
    assert key.shape == (4,) and key.dtype == jax.random.key(0).dtype
    assert keywords == {"train": True, "params": {"a=b": shape(2)}}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("f32[8", "not an argument"),
        ("f33[8]", "f33 is no dtype"),
        ("f32[-1]", "no shape"),
        ("f32[n]", "what is 'n'"),
        ("f32[2.5]", "no shape"),
        ("f32", "what is 'f32'"),
        ("f64[2]", "JAX_ENABLE_X64"),
        ("print(1)", "what is 'print"),
        ("{**f32[1]}", "what is"),
        ("", "not an argument"),
    ],
)
def test_what_is_no_argument_is_refused(text, why):
    with pytest.raises(UsageError, match=re.escape(why)):
        argument(text)


def test_double_precision_where_jax_has_it():
    with jax.enable_x64(True):
        assert argument("f64[2]") == shape(2, dtype=jnp.float64)


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("conv", "expected module:function"),
        ("no_such_module_at_all:conv", "no module 'no_such_module_at_all'"),
        ("no_such_file.py:conv", "no file no_such_file.py"),
        ("FILE:absent", "has no attribute 'absent'"),
        ("FILE:number", "is no function: 3"),
    ],
)
def test_what_is_no_function_is_refused(model, target, why, capsys):
    assert why in refusal(capsys, "tune", target.replace("FILE", model))


def test_functions_by_module_and_by_path(model, monkeypatch):
    assert loaded("jax.numpy:linalg.norm") is jnp.linalg.norm
    assert loaded(f"{model}:Held.conv") is loaded(f"{model}:conv")
    monkeypatch.chdir(Path(model).parent)
    assert loaded(f"{Path(model).stem}:conv") is loaded(f"{model}:conv")
    Path("json.py").write_text("def f(): pass")  # its name is taken
    with pytest.raises(UsageError, match="rename it"):
        loaded("json.py:f")
    Path("needs.py").write_text("import no_such_module_at_all")  # its own affair
    with pytest.raises(ModuleNotFoundError):
        loaded("needs:f")


# Options


def options(*argv: str) -> dict[str, typing.Any]:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return options_of(parser.parse_args(argv))


def test_every_option_is_a_flag_with_its_docstring(capsys):
    with pytest.raises(SystemExit):
        main(["tune", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, kind in typing.get_type_hints(Options).items():
        if kind in (float, bool, str | None) or typing.get_origin(kind) is typing.Literal:
            assert f"--{name.replace('_', '-')}" in text
    assert "Seconds that this process may spend on measuring" in text and "(default: 300.0)" in text


def test_options_are_those_given_and_no_others(capsys, model, monkeypatch):
    assert options() == {}
    assert options("--time-budget", "5", "--numerics", "relaxed", "--no-verdict", "--table", "x") == {
        "time_budget": 5.0,
        "numerics": "relaxed",
        "verdict": False,
        "table": "x",
    }
    assert "invalid choice" in refusal(capsys, "tune", "a:b", "--numerics", "sloppy")
    assert "memory_limit=0.5" in refusal(capsys, "tune", f"{model}:conv", "--memory-limit", "0.5")
    monkeypatch.setenv("JAXLAYOUT_TIME_BUDGET", "soon")
    assert "JAXLAYOUT_TIME_BUDGET" in refusal(capsys, "tune", f"{model}:conv", *TYPES)


# tune and explain


def test_tune_then_explain(model, costs, capsys, tmp_path):
    miss = main(["explain", f"{model}:conv", *TYPES])
    err = capsys.readouterr().err
    assert miss == 1 and "lacks 1 convolutions" in err and "jaxlayout tune" in err
    plan = tmp_path / "plan.json"
    assert "kept" in printed(capsys, "tune", f"{model}:conv", *TYPES, "--plan", str(plan))
    assert len(costs) == 1 + len(set(costs[1:]))  # measured once
    saved = Plan.load(plan)
    assert not saved.trivial
    x, kernel = np.ones((2, 3, 8, 8), np.float32), np.ones((4, 3, 3, 3), np.float32)
    conv = loaded(f"{model}:conv")
    np.testing.assert_allclose(auto_layout(conv, plan=saved)(x, kernel), conv(x, kernel), rtol=1e-5)
    asked = len(costs)
    seen = json.loads(printed(capsys, "explain", f"{model}:conv", *TYPES, "--json"))
    assert seen["kept"] is True and seen["target"] == f"{model}:conv"
    assert "stored" in json.dumps(seen)
    auto_layout(conv)(x, kernel)  # plans from the same entry
    assert len(costs) == asked


def test_functions_in_every_wrapping(model, costs, capsys):
    for name, *args in (
        ("jitted", "--args", '{"w": f32[4,3,3,3]}', "f32[2,3,8,8]", "scale=f32[]"),
        ("decorated", *TYPES),
        ("conv", "--args-from", f"{model}:given"),
    ):
        assert json.loads(printed(capsys, "tune", f"{model}:{name}", *args, "--json"))["kept"] is True
    tune_conv = "tune", f"{model}:conv"
    assert "expected (args, kwargs)" in refusal(capsys, *tune_conv, "--args-from", f"{model}:wrongly_given")
    assert "not allowed with" in refusal(capsys, *tune_conv, *TYPES, "--args-from", f"{model}:given")


def test_nothing_to_gain_is_no_failure(model, capsys, tmp_path):
    plan = tmp_path / "plan.json"
    out = printed(capsys, "tune", f"{model}:nothing", "--args", "f32[3]", "--json", "--plan", str(plan))
    assert json.loads(out)["kept"] is False and "no convolution" in out
    assert Plan.load(plan).trivial


def test_wrong_numbers_are_a_failure(model, capsys, monkeypatch, tmp_path):
    wrong = Verdict(kept=False, reason="output 0 differs", cause="numbers")
    refused = Outcome(plan=Plan(compiler_options={"some": "option"}), verdict=wrong, source="measured")
    monkeypatch.setattr(AutoLayout, "outcome", lambda *args: refused)
    monkeypatch.setattr(AutoLayout, "explain", lambda *args: SimpleNamespace(outcome=refused))
    out = printed(capsys, "tune", f"{model}:conv", *TYPES, "--plan", str(tmp_path / "plan.json"), code=1)
    assert "output 0 differs" in out
    assert Plan.load(tmp_path / "plan.json").trivial  # what was refused is not for deployment
    assert "output 0 differs" in printed(
        capsys, "bench", f"{model}:nothing", "--args", "f32[3]", "--pairs", "3", code=1
    )


def test_what_counts_as_failed():
    assert has_failed(untouched("tuning failed: ValueError()", "failure"))
    assert not has_failed(untouched("it has no convolution"))


def test_tune_really_measures(model, capsys):
    seen = json.loads(printed(capsys, "tune", f"{model}:conv", *TYPES, "--time-budget", "20", "--json"))
    assert isinstance(seen["kept"], bool)
    shown = json.loads(printed(capsys, "table", "show", "--json"))
    (known,) = {json.dumps(one["environment"]["jax"]) for one in shown["environments"]}
    assert known == json.dumps(jax.__version__)
    assert sum(one["measurements"] for one in shown["environments"]) > 1
    assert sum(one["plans"] for one in shown["environments"]) == 1
    text = printed(capsys, "table", "show")
    assert f"jax {jax.__version__}" in text and "1 plans" in text
    assert "nothing to remove" in printed(capsys, "table", "prune")  # it is the present environment
    listed = printed(capsys, "table", "show", "--signature", "rhs=4[3, 3]")
    assert "xla@" in listed or "xla:" in listed
    assert " ms" in listed


def test_an_interrupt_keeps_what_was_measured(tmp_path):
    source = "from jax.lax import conv\n\ndef f(x, *kernels):\n"
    source += "    return [conv(x, kernel, (1, 1), 'SAME') for kernel in kernels]\n"
    (tmp_path / "several.py").write_text(source)
    types = ["f32[1,2,4,4]", *(f"f32[{n},2,3,3]" for n in range(1, 60))]
    command = [sys.executable, "-m", "jaxlayout", "tune", f"{tmp_path / 'several.py'}:f", "--args", *types]
    table = Path(os.environ["JAXLAYOUT_TABLE"])

    def measured() -> set[str]:
        rows = look(table)[0]["measurements"] if table.exists() else []
        return {row[1] for row in rows if row[1].startswith("lhs=")}

    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not measured() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "what was measured is kept" in err and "Traceback" not in err
    assert 0 < len(measured()) < 59  # and it did stop


# bench


def test_bench_gives_a_ratio(model, forced, capsys):
    out = printed(capsys, "bench", f"{model}:conv", *TYPES, "--pairs", "3")
    assert re.search(r"ratio +[\d.e+-]+x ±[\d.e+-]+ \(.* of 3 pairs\)", out) and "kept: forced" in out
    for name in ("decorated", "donating"):
        seen = json.loads(printed(capsys, "bench", f"{model}:{name}", *TYPES, "--pairs", "3", "--json"))
        assert seen["ratio"] > 0 and seen["pairs"] == 3 and seen["kept"] is True
    assert "at least 3" in refusal(capsys, "bench", f"{model}:conv", "--pairs", "2")


# table


HERE = {"jax": "9.9", "jaxlib": "9.8", "platform": "cpu", "device_kind": "cpu", "cpu": "Abacus", "allocator": "beads"}


@pytest.fixture
def two(tmp_path):
    """A table with records of two environments, one of them described; its path."""
    path = os.environ["JAXLAYOUT_TABLE"]
    describe("a1", {**HERE, "cores": 2, "variables": {"XLA_FLAGS": "--x"}, "versions": {"dot": "1"}})
    with CostTable(path) as table:
        table.record_many("a1", "rhs=64[3, 3]", {"slow": measurement(2e6), "fast": measurement(1e6)})
        table.store_plan("a1", "function", "skeleton", "[]", "{}")
        table.record("b2", "rhs=8[1, 1]", "one", measurement(3e6))
    return path


def test_show_counts_by_environment(two, capsys):
    text = printed(capsys, "table", "show")
    assert "3 measurements of 2 signatures, 1 plans" in text
    assert "jax 9.9, jaxlib 9.8 on cpu (Abacus, 2 cores, beads), XLA_FLAGS=--x" in text
    assert "unknown" in text and f"last written {time.strftime('%Y-')}" in text
    seen = json.loads(printed(capsys, "table", "show", "--json"))
    assert seen["refused"] == [] and seen["bytes"] > 0 and seen["path"] == two
    assert {one["env"]: (one["measurements"], one["plans"]) for one in seen["environments"]} == {
        "a1": (2, 1),
        "b2": (1, 0),
    }


def test_show_lists_candidates_fastest_first(two, capsys):
    text = printed(capsys, "table", "show", "--signature", "64[3")
    assert text.index("fast") < text.index("slow") and "1 ms" in text and "rhs=8" not in text
    (seen,) = json.loads(printed(capsys, "table", "show", "--signature", "64[3", "--json"))
    assert seen["candidates"]["fast"]["median_ns"] == 1e6
    assert main(["table", "show", "--signature", "elsewhere"]) == 1
    assert "'elsewhere'" in capsys.readouterr().err


def test_no_table_is_said_and_none_is_made(capsys):
    path = Path(os.environ["JAXLAYOUT_TABLE"])
    for argv in (["show"], ["export", "x.json"], ["prune"]):
        assert main(["table", *argv]) == 1
        assert f"no cost table at {path} yet" in capsys.readouterr().err
    assert printed(capsys, "table", "path") == f"{path}\n"
    assert printed(capsys, "table", "path", "--table", "other") == "other\n"
    assert not path.exists()


def test_the_table_of_another_schema_is_another_file(capsys, tmp_path):
    path, own = tmp_path / "t.sqlite", tmp_path / f"t-{SCHEMA_VERSION}.sqlite"
    with CostTable(path) as table:
        table.record("env", "conv", "a", measurement(1e6))
    with contextlib.closing(sqlite3.connect(path)) as raw:
        raw.execute("PRAGMA user_version = 99")
    assert printed(capsys, "table", "path", "--table", str(path)) == f"{own}\n"
    assert main(["table", "show", "--table", str(path)]) == 1
    assert f"no cost table at {own} yet" in capsys.readouterr().err
    with CostTable(path) as table:
        table.record_many("env", "conv", {"b": measurement(1e6), "c": measurement(1e6)})
    shown = json.loads(printed(capsys, "table", "show", "--json", "--table", str(path)))
    assert shown["path"] == str(own) and [env["measurements"] for env in shown["environments"]] == [2]
    doctor = ("doctor", "--json", "--seconds", "0", "--table", str(path))
    (found,) = (one["found"] for one in json.loads(printed(capsys, *doctor))["findings"] if one["check"] == "table")
    assert found.startswith(f"{own}: 2 measurements")


def test_export_import_and_merge(two, capsys, tmp_path):
    file, third, fourth = (str(tmp_path / name) for name in ("out.json", "third.sqlite", "fourth.sqlite"))
    assert "3 measurements and 1 plans" in printed(capsys, "table", "export", file)
    assert "5 records taken" in printed(capsys, "table", "import", file, "--table", third)
    seen = json.loads(printed(capsys, "table", "merge", two, "--table", fourth, "--json"))
    assert seen == {"accepted": 5, "refused": []}  # the description is one
    for path in (third, fourth):
        assert look(path)[0]["measurements"] == look(two)[0]["measurements"]
    lines = Path(file).read_text().splitlines()
    lines[1] = json.dumps(json.loads(lines[1]) | {"signature": "forged"})
    Path(file).write_text("\n".join(lines))
    text = printed(capsys, "table", "import", file, "--table", str(tmp_path / "fifth.sqlite"), code=1)
    assert "4 records taken" in text and "refused line 2: its checksum does not match" in text
    assert "no file" in refusal(capsys, "table", "merge", str(tmp_path / "absent.sqlite"))


def test_prune_removes_other_environments(two, capsys):
    with CostTable(two) as table:
        environment = current_environment(versions={"dot": 1})
        here = environment.fingerprint
        describe("c3", environment.to_json() | {"variables": {"XLA_FLAGS": "--y"}})  # there may be use for it yet
        table.record("c3", "conv", "one", measurement(1.0))
        table.record_many(here, "conv", {"one": measurement(1.0)})
        table.record_many(f"{here}-relaxed", "conv", {"one": measurement(1.0)})
    text = printed(capsys, "table", "prune", "--dry-run")
    assert "would remove 2 measurements of 1 signatures, 1 plans: jax 9.9" in text and "kept 1 environments" in text
    assert len(look(two)[0]["measurements"]) == 6
    text = printed(capsys, "table", "prune")
    assert text.startswith("removed 2 measurements of 1 signatures, 1 plans: jax 9.9")
    assert {row[0] for row in look(two)[0]["measurements"]} == {here, f"{here}-relaxed", "b2", "c3"}
    seen = json.loads(printed(capsys, "table", "prune", "--unknown", "--json"))
    assert [one["env"] for one in seen["removed"]] == ["b2"] and not seen["dry_run"]
    assert {row[0] for row in look(two)[0]["measurements"]} == {here, f"{here}-relaxed", "c3"}


def test_prune_of_plans_alone(two, capsys):
    with CostTable(two) as table:
        table.store_plan("plans", "a function", "skeleton", "[]", "{}")
    measured = look(two)[0]["measurements"]
    assert "1 plans" in printed(capsys, "table", "prune", "--plans")
    rows = look(two)[0]
    assert rows["measurements"] == measured and not [row for row in rows["plans"] if row[0] == "plans"]
    assert "nothing to remove" in printed(capsys, "table", "prune", "--plans")


def test_prune_by_age(two, capsys, monkeypatch):
    assert "removed" not in printed(capsys, "table", "prune", "--older-than", "1")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 2 * 86_400)
    assert "jax 9.9" in printed(capsys, "table", "prune", "--older-than", "1")
    assert {row[0] for row in look(two)[0]["measurements"]} == {"b2"}


def test_a_table_that_cannot_be_written_is_a_failure(two, capsys, tmp_path):
    assert main(["table", "merge", two, "--table", str(tmp_path)]) == 1  # a folder
    assert "cost table" in capsys.readouterr().err


# doctor


def test_doctor_finds_nothing_wrong(capsys):
    seen = json.loads(printed(capsys, "doctor", "--seconds", "0", "--json"))
    assert seen["ok"] is True
    found = {finding["check"]: finding for finding in seen["findings"]}
    assert f"jax {jax.__version__}" in found["versions"]["found"] and found["device"]["grade"] == "ok"
    assert {"variables", "memory", "table", "processor", "cores", "threads"} <= found.keys() and "noise" not in found
    assert os.environ["JAXLAYOUT_TABLE"] in found["variables"]["found"]
    assert not Path(os.environ["JAXLAYOUT_TABLE"]).exists()


def test_doctor_measures_noise(capsys):
    out = printed(capsys, "doctor", "--seconds", "0.01")
    assert re.search(r"noise +a matrix product takes [\d.]+ ms ±[\d.]+%, [\d.]+% of \d+", out)


def test_doctor_does_not_wait_for_ever(monkeypatch):
    monkeypatch.setattr(noises, "LOCK_SECONDS", 0.1)
    with Turns().timing(), ThreadPoolExecutor(1) as other:
        finding = other.submit(noises.noise, 0.01).result()
    assert finding.grade == "note" and "not measured" in finding.found


def test_doctor_on_a_damaged_table(two, capsys):
    before = Path(two).read_bytes()
    Path(two).write_bytes(b"not a database" * 100)
    seen = json.loads(printed(capsys, "doctor", "--seconds", "0", "--json", code=1))
    (bad,) = [finding for finding in seen["findings"] if finding["grade"] == "problem"]
    assert bad["check"] == "table" and "refused 1" in bad["found"] and seen["ok"] is False
    assert Path(two).read_bytes() == b"not a database" * 100  # looked at, left alone
    Path(two).write_bytes(before.replace(b"rhs=8[1, 1]", b"rhs=9[1, 1]"))
    grades = {finding.grade: finding for finding in checks.table_file(Path(two))}
    assert "its checksum does not match" in grades["warning"].found


def test_doctor_on_where_the_table_is(tmp_path, monkeypatch):
    path = tmp_path / "table.sqlite"
    (tmp_path / "table.sqlite.damaged-20260101T000000").touch()
    monkeypatch.setattr("jaxlayout.table.sqlite.on_network", lambda path: True)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    found = [(finding.grade, finding.found) for finding in checks.table_file(path)]
    assert [grade for grade, _ in found] == ["warning", "note", "note", "ok"]
    assert f"{tmp_path} cannot be written" in found[0][1]
    assert [finding.grade for finding in checks.table_file(tmp_path)][-1] == "problem"  # a folder
    assert [finding.grade for finding in checks.table_file(Path(":memory:"))] == ["note"]


def test_doctor_on_variables():
    found = list(checks.variables({"JAXLAYOUT_TABEL": "x", "XLA_FLAGS": "--a", "HOME": "y"}))
    assert [finding.grade for finding in found] == ["ok", "warning", "note"]
    assert "JAXLAYOUT_TABEL" in found[1].found and "JAXLAYOUT_TABLE" in found[1].advice and "HOME" not in found[0].found
    assert checks.threads(2, {}).grade == "ok"
    assert "NPROC=1" in checks.threads(2, {"NPROC": "1"}).found
    flag = "--xla_cpu_multi_thread_eigen=false"
    assert flag in checks.threads(2, {"XLA_FLAGS": f"--other {flag}"}).found
    assert "OMP_NUM_THREADS" in checks.threads(2, {"OMP_NUM_THREADS": "1"}).advice


def test_doctor_on_a_wrong_option(monkeypatch):
    monkeypatch.setenv("JAXLAYOUT_MEMORY_LIMIT", "0")
    assert [finding.grade for finding in checks.variables({})] == ["ok", "problem"]


def test_doctor_knows_bad_versions(monkeypatch):
    for version, grades in (("0.10.2", ["ok", "warning"]), ("0.10.1", ["ok"])):
        monkeypatch.setattr("jaxlayout.measure.environment.package_version", lambda name, version=version: version)
        assert [finding.grade for finding in checks.versions()] == grades


def test_doctor_without_a_device():
    done = subprocess.run(
        [sys.executable, "-m", "jaxlayout", "doctor", "--json"],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "no_such_platform"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    (bad,) = [finding for finding in json.loads(done.stdout)["findings"] if finding["grade"] == "problem"]
    assert bad["check"] == "device" and "no_such_platform" in bad["found"]


@pytest.mark.parametrize(
    ("spread", "outliers", "grade"),
    [(0.01, 0.0, "ok"), (0.1, 0.0, "note"), (0.01, 0.1, "note"), (0.3, 0.0, "warning"), (0.01, 0.5, "warning")],
)
def test_what_noise_means(spread, outliers, grade):
    seen = noises.Noise(median_ns=4e6, spread=spread, outliers=outliers, runs=100)
    assert noises.judged(seen).grade == grade
    assert bool(noises.judged(seen).advice) == (grade != "ok")


def test_noise_is_measured_at_least_nine_times():
    seen = noises.measured_noise(0.0)
    assert seen.runs == 9 and seen.median_ns > 0 and seen.spread >= 0 and 0 <= seen.outliers <= 1
