"""The benchmarks run, at sizes of no interest, and write what they say they write. No time is judged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from once import once

from bench import corpus, forms, gpu, networks, noise, plot, races, remote, scenarios, table
from bench.models import video
from bench.rows import read_rows
from jaxlayout.convs.primitive import CONVOLUTIONS
from jaxlayout.graph.program import equations
from jaxlayout.graph.validate import check_plan
from jaxlayout.tuning import pipeline


@pytest.fixture(autouse=True)
def believed(monkeypatch):
    """Nothing is measured, and no verdict is timed: the policy is believed."""
    monkeypatch.setenv("JAXLAYOUT_ON_MISS", "heuristic")
    monkeypatch.setenv("JAXLAYOUT_VERDICT", "0")


def told(folder: Path) -> list[str]:
    """Where to write, and a table that is not the user's."""
    return ["--table", str(folder / "table.sqlite"), "--out", str(folder)]


def written(out: Path, stem: str) -> list[dict[str, Any]]:
    """The rows of the table that a bench has written, each of which is in the Markdown too."""
    (file,) = out.glob(f"{stem}*-small.json")
    rows = read_rows(file.read_text())
    lines = file.with_suffix(".md").read_text().splitlines()
    for row in rows:
        assert sum(line.startswith(f"| {row['case']} ") for line in lines) == 1
    return rows


def columns(out: Path, stem: str) -> set[int]:
    """How many cells the lines of the table have."""
    (file,) = out.glob(f"{stem}*-small.md")
    return {line.count(" |") for line in file.read_text().splitlines() if line.startswith("| ")}


@pytest.mark.parametrize("looped", [False, True])
@pytest.mark.parametrize("name", scenarios.SCENARIOS)
def test_written_by_hand_is_the_same_function(name, looped):
    """Of the same weights and images, each in its own order."""
    body, order = scenarios.SCENARIOS[name]
    case = scenarios.scenario(body, order, looped, True)
    if case.by_hand is None:
        assert order == "NHWC"
        return

    def turned(x: jax.Array) -> jax.Array:
        match x.shape:
            case (4, 4, 3, 3):
                return scenarios.transposed(x, "OIHW", "HWIO")
            case (_,) | (3, 3, 4, 4):
                return x
        return jnp.moveaxis(x, -3, -1)

    (fun, args), (other, _) = case.written, case.by_hand
    found = jax.jit(other)(*jax.tree.map(turned, args))
    np.testing.assert_allclose(found, turned(jax.jit(fun)(*args)), atol=1e-2 if body is scenarios.mixed else 1e-5)


def test_no_conversion_is_hoisted_out_of_a_loop():
    """Every convolution of a looped scenario is in the body, once."""
    for name, (body, order) in scenarios.SCENARIOS.items():
        fun, args = scenarios.scenario(body, order, True, True).written
        jaxpr = jax.make_jaxpr(fun)(*args)
        assert [str(eqn.primitive) for eqn in jaxpr.eqns] == ["scan"], name
        assert any(eqn.primitive in CONVOLUTIONS for eqn in equations(jaxpr))


def test_the_decoder_is_causal_and_runs_in_half_precision():
    params, latent = video.build(True)
    out = np.asarray(jax.jit(video.decode)(params, latent))
    batch, _, frames, height, width = latent.shape
    assert out.shape == (batch, 3, 4 * frames - 3, 8 * height, 8 * width)
    assert np.isfinite(out).all() and out.std() > 0.01
    half = jax.jit(video.decode)(*video.build(True, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    assert np.abs(np.asarray(half, np.float32) - out).max() < 0.2 * np.abs(out).max()


def test_no_frame_of_the_decoder_is_made_of_a_later_one():
    """Group norm looks at all frames at once: its input is held as it is."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 4, 3, 5, 6)), jnp.float32)
    p = {"c.weight": jnp.ones((4, 4, 3, 3, 3)), "c.bias": jnp.zeros(4)}
    out, other = (video.causal_conv(p, "c", y) for y in (x, x.at[:, :, 2].add(1)))
    assert out.shape == x.shape
    np.testing.assert_array_equal(out[:, :, :2], other[:, :, :2])
    assert np.abs(out - other)[:, :, 2].max() > 0


@pytest.mark.parametrize("order", ["NHWC", "NCHW"])
def test_all_channels_first(order):
    """Of two convolutions and their gradients, all are, but kernel gradients."""

    def loss(weights: Any, x: Any) -> Any:
        for w in weights:
            x = jax.nn.relu(scenarios.conv(x, w, order))
        return jnp.square(x).sum()

    sizes = {"N": 2, "H": 8, "W": 8, "C": 4}
    x, weights = jnp.ones([sizes[axis] for axis in order]), [scenarios.kernel(order, 4)] * 2
    plan = forms.channels_first_plan(jaxpr := jax.make_jaxpr(jax.grad(loss))(weights, x))
    check_plan(jaxpr, plan)
    found = sorted(str(mode.candidate) for mode in plan.choices.values() if mode.candidate is not None)
    changed = ["xla:CHWN,IHWO->HWNC"] * 2 + ["xla:NCHW,OIHW->NCHW"] * 3
    assert found == ([] if order == "NCHW" else changed)


def test_scenarios(tmp_path):
    names = ["native", "other_loop", "mixed_loop", "jax31662_transposed3d_grad", "nearest_upsampling"]
    assert scenarios.main([*names, "--small", *told(tmp_path)]) == 0
    rows = written(tmp_path, "scenarios")
    assert [row["case"] for row in rows] == names
    assert len(columns(tmp_path, "scenarios")) == 1
    for row in rows:
        assert row["jit_ms"] > 0 and row["auto_layout_ms"] > 0 and row["apart"] < 0.1
        assert ("by_hand" in row) == (row["case"] in ("other_loop", "mixed_loop"))
    assert set(scenarios.EXPECTED) <= set(scenarios.CASES)


def test_forms(tmp_path, costs, monkeypatch):
    monkeypatch.setattr(networks, "measure", pipeline.measure)  # made up, by `costs`
    case = scenarios.scenario(scenarios.five, "NCHW", True, True)
    monkeypatch.setitem(forms.CASES, "some", lambda small: case.written)
    assert forms.main(["some", "--small", *told(tmp_path)]) == 0
    (row,) = written(tmp_path, "forms")
    assert len(columns(tmp_path, "forms")) == 1
    assert "channels_last" in row["forms"] and "channels_first" not in row["forms"]  # it is written so
    assert all(seen["ratio"] > 0 for seen in row["forms"].values()) and row["apart"] < 1e-4


@once
def test_corpus(tmp_path, monkeypatch, capsys):
    """Of a case that cannot be built, or whose package is not there, there is a row too."""
    absent = corpus.Case(group="other", build=corpus.lstm, needs="no_such_package")
    wrong = corpus.Case(group="user", build=lambda small: (jnp.sin, ("no array",)), what="gradient")
    monkeypatch.setitem(corpus.CASES, "absent", absent)
    monkeypatch.setitem(corpus.CASES, "wrong", wrong)
    names = ["nchw_autoencoder", "lstm", "absent", "wrong"]
    assert corpus.main([*names, "--small", *told(tmp_path)]) == 1
    rows = written(tmp_path, "corpus")
    assert [row["case"] for row in rows] == names
    assert len(columns(tmp_path, "corpus")) == 1
    autoencoder, lstm, absent, wrong = rows
    assert autoencoder["kept"] and autoencoder["heavy"] and autoencoder["what"] == "gradient"
    assert 0 < autoencoder["error"] < 1e-4 and autoencoder["apart"] < 1e-4
    assert not lstm["kept"] and not lstm["heavy"] and lstm["error"] is None and lstm["apart"] == 0
    assert "no_such_package" in absent["missing"] and "TypeError" in wrong["failed"]
    assert "TypeError" in capsys.readouterr().err
    (table,) = tmp_path.glob("corpus*-small.md")
    said = table.read_text()
    assert "4 cases: 1 rewritten, 1 kept, 1 not installed (absent), 1 failed (wrong)" in said
    assert "of 1 conv-heavy ones 1 rewritten" in said


def test_the_work_of_a_program():
    """What a scan does counts as often as it runs; a dot is none of a convolution's work."""

    def run(w: jax.Array, head: jax.Array, images: jax.Array) -> Any:
        def step(carry: Any, x: jax.Array) -> Any:
            return carry, jnp.tanh(scenarios.conv(x, w, "NHWC"))

        return jax.lax.scan(step, None, images)[1] @ head

    shapes = (1, 1, 4, 8), (8, 2), (3, 2, 5, 5, 4)
    jaxpr = jax.make_jaxpr(run)(*map(jnp.zeros, shapes))
    assert corpus.work(jaxpr) == (3 * 2 * 25 * 4 * 8, 3 * 2 * 25 * 8 * 2, 3 * 2 * 25 * 8)
    assert corpus.is_heavy(90, 10, 89) and not corpus.is_heavy(89, 11, 0) and not corpus.is_heavy(90, 0, 90)


def test_errors_of_gradients_that_are_rounding_alone():
    """Are relative to the other gradients, and not to the loss."""
    exact, out = (np.ones(3), np.full(3, 1e-12)), (np.ones(3), np.zeros(3))
    loss = np.float64(1e6)
    assert corpus.apart((loss, exact), (loss, out), False) == 1.0
    assert corpus.apart((loss, exact), (loss, out), True) == pytest.approx(1e-9)


@once
def test_gpu_on_a_cpu(tmp_path):
    names = ["dense3x3", "nchw_scan"]
    assert gpu.main([*names, "--platform", "cpu", "--small", *told(tmp_path)]) == 0
    rows = written(tmp_path, "gpu-cpu")
    assert [row["case"] for row in rows] == names
    dense, loop = rows
    assert dense["same"] and not dense["kept"]
    assert loop["same"] != loop["kept"]
    assert dense["environment"]["jax"] == jax.__version__


def test_gpu_where_there_is_none(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["dense3x3", "--platform", "cuda"])
    assert "no cuda here: JAX sees" in capsys.readouterr().err


def test_table(tmp_path):
    assert table.main(["--small", "--out", str(tmp_path)]) == 0
    rows = {row["case"]: row for row in written(tmp_path, "table")}
    assert rows.keys() == table.CASES.keys() and len(columns(tmp_path, "table")) == 1
    assert rows["build"]["records"] == rows["export"]["records"] == rows["import"]["records"] == 1850
    assert rows["prune"]["records"] == 925 and rows["merge"]["records"] == 1850
    assert all(row["peak_mib"] > 0 for row in rows.values())


@once
def test_remote(tmp_path):
    assert remote.main(["--small", "--out", str(tmp_path)]) == 0
    rows = {row["case"]: row for row in written(tmp_path, "remote")}
    assert rows.keys() == remote.cases(True).keys() and len(columns(tmp_path, "remote")) == 1
    assert all(row["jobs_per_s"] > 0 for row in rows.values())
    assert rows["asleep, pool of 2"]["in_worker_ms"] >= 50


@once
def test_races(tmp_path):
    assert races.main(["--small", "--out", str(tmp_path)]) == 0
    rows = written(tmp_path, "races")
    assert [row["case"] for row in rows] == list(races.CASES) and len(columns(tmp_path, "races")) == 1
    assert all(row["races"] == 1 and 0 <= row["kept"] <= 1 and row["pairs"] >= 3 for row in rows)


@pytest.mark.parametrize("bench", [corpus, scenarios, forms, gpu, noise, races])
def test_a_case_that_is_not_there(bench, capsys):
    with pytest.raises(SystemExit):
        bench.main(["nonsense"])
    assert "no case nonsense; there are" in capsys.readouterr().err


@once
def test_pictures_of_all_results(tmp_path):
    results = sorted(plot.RESULTS.glob("*.json"))
    assert plot.main(["--out", str(tmp_path)]) == 0
    drawn = {file.stem for file in tmp_path.glob("*.png")}
    without_ratios = "noise", "races", "remote", "table"
    assert drawn == {file.stem for file in results if not file.stem.startswith(without_ratios)}
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in tmp_path.glob("*.png"))
