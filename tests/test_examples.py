"""The examples run, and give what plain JAX gives: under costs that have every convolution changed."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import jax
from helpers import ROOT, close

FOLDER = ROOT / "examples"


def example(name: str) -> ModuleType:
    """Imported anew, when the test's table and options are set."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_are_here():
    assert {path.stem for path in FOLDER.glob("*.py")} == {"ahead", "decorate", "report", "serve", "train"}


def test_decorate(costs, capsys):
    script = example("decorate")
    logits = script.main()
    assert script.predict.outcome(*script.inputs()).kept
    assert "depthwise 3x3" in capsys.readouterr().out
    close(logits, jax.jit(script.predict.__wrapped__)(*script.inputs()))


def test_train(costs, monkeypatch):
    script = example("train")
    losses = script.main()
    assert losses[-1] < losses[0]
    asked = len(costs)
    assert asked > 2  # the gradient's convolutions, too
    close(losses, script.train(script.Network()))
    assert len(costs) == asked  # that one was plain


def test_serve(costs):
    script = example("serve")
    plain = jax.jit(script.predict.__wrapped__)
    for found, images in zip(script.main(), script.requests(), strict=True):
        close(found, plain(script.weights(), images))
    assert costs


def test_ahead(costs, capsys):
    script = example("ahead")
    found = script.main()
    said = capsys.readouterr().out
    assert "kept: " in said and "the plan is pinned" in said
    close(found, jax.jit(script.predict)(*script.inputs()))


def test_report(costs, capsys):
    script = example("report")
    report, data = script.main()
    said = capsys.readouterr().out
    assert [site.kind for site in report.sites] == ["1x1", "depthwise 3x3 stride 2"]
    assert all(f"{site.chosen.candidate} (" in said and site.chosen != site.written for site in report.sites)
    assert data["barriers"][0]["name"] == "sort" and "orders stop at sort" in said
    close(script.score(*script.inputs()), jax.jit(script.score.__wrapped__)(*script.inputs()))
