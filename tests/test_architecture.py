"""Which way imports run: between the folders down one line, and inside a folder never in a circle."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINE = "runtime ← layout ← convs ← graph ← rewrite ← table ← measure ← verify ← tuning ← report ← api ← flax ← cli"
FOLDERS = LINE.split(" ← ")
"""Each may import from those before it."""

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "jaxlayout").rglob("*.py")
}


def imported(source: str) -> set[str]:
    """The modules of the package that a source imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports here are absolute"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inside & MODULES.keys() or {node.module or ""}
    return found & MODULES.keys()


IMPORTS = {name: imported(path.read_text()) for name, path in MODULES.items()}


def folder(module: str) -> str:
    """The one directly under the package; '' for what lies loose there."""
    _, _, inside = module.partition(".")
    return inside.partition(".")[0] if inside.partition(".")[0] in FOLDERS else ""


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


def everything(source: str) -> set[str]:
    """All that a source imports."""
    nodes = list(ast.walk(ast.parse(source)))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}


def test_only_one_module_knows_jax_versions():
    """And nobody imports what is private in JAX."""
    for module, path in MODULES.items():
        assert not any(name.startswith("jax._src") for name in everything(path.read_text())), module
