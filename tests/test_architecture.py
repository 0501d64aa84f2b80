"""Which way imports run: between the folders down one line, and inside a folder never in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter

import pytest
from helpers import ROOT

LINE = "runtime ← layout ← convs ← graph ← rewrite ← table ← measure ← verify ← tuning ← report ← api ← flax ← cli"
FOLDERS = LINE.split(" ← ")
"""Each may import from those before it."""

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "jaxlayout").rglob("*.py")
}


def taken(source: str) -> Iterator[tuple[str, set[str]]]:
    """The modules that a source names in its imports, anywhere in it, and what it takes from each."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, set()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "imports here are absolute"
            yield node.module, {f"{node.module}.{alias.name}" for alias in node.names}


def imported(source: str) -> set[str]:
    """The modules of the package among them."""
    return {name for module, inside in taken(source) for name in inside & MODULES.keys() or {module}} & MODULES.keys()


def everything(source: str) -> set[str]:
    """All that is named there."""
    return {name for module, inside in taken(source) for name in inside | {module}}


IMPORTS = {name: imported(path.read_text()) for name, path in MODULES.items()}


def folder(module: str) -> str:
    """The one directly under the package; of what lies loose there, its own name."""
    return module.partition(".")[2].partition(".")[0]


def test_imports_are_found():
    solving = {"jaxlayout.graph.plan", "jaxlayout.graph.solve"}
    assert imported("def f():\n    from jaxlayout.graph import plan, solve") == solving
    assert imported("import jaxlayout.cli\nfrom jaxlayout.layout import Order") == {"jaxlayout.cli", "jaxlayout.layout"}
    assert len(IMPORTS) > 90 and sum(map(len, IMPORTS.values())) > 300


def test_every_folder_has_its_place():
    there = {path.name for path in (ROOT / "jaxlayout").iterdir() if (path / "__init__.py").exists()}
    assert there == set(FOLDERS)
    assert LINE in (ROOT / "docs" / "architecture.md").read_text()


@pytest.mark.parametrize("name", FOLDERS)
def test_imports_run_down_the_line(name):
    above = FOLDERS[FOLDERS.index(name) + 1 :]
    upwards = {
        (module, other)
        for module, others in IMPORTS.items()
        if folder(module) == name
        for other in others
        if folder(other) in above
    }
    assert not upwards


@pytest.mark.parametrize("name", FOLDERS)
def test_no_circle(name):
    here = {module for module in IMPORTS if folder(module) == name}
    inside = {module: IMPORTS[module] & here for module in here}
    assert len(list(TopologicalSorter(inside).static_order())) == len(inside)  # CycleError where there is one


def test_the_table_needs_no_jax():
    for module in IMPORTS:
        if folder(module) == "table":
            assert "jax" not in {name.split(".")[0] for name in everything(MODULES[module].read_text())}, module


def test_nothing_private_of_jax_is_imported():
    assert "jax._src" in everything("from jax import _src")
    for module, path in MODULES.items():
        assert not any(name.startswith("jax._src") for name in everything(path.read_text())), module
