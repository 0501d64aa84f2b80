"""The notebooks run, at small sizes; those that are stored were run, and name no folder of the machine they ran on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT
from once import once

PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ABSOLUTE = re.compile(r"""(?:^|[\s"'=(:])((?:/[\w.+-]+){2,}|[A-Z]:\\\w+)""", re.MULTILINE)
each = pytest.mark.parametrize("path", PATHS, ids=[path.stem for path in PATHS])


def texts(output: dict[str, Any]) -> list[str]:
    """What of an output can be read."""
    shown = [text for kind, text in output.get("data", {}).items() if kind.startswith("text/")]
    return ["".join(text) for text in (*shown, output.get("text", ""))]


def check(path: Path) -> None:
    """That a notebook was executed from its first cell to its last, without an error."""
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert any("text/html" in output.get("data", {}) or "image/png" in output.get("data", {}) for output in outputs)
    assert not [found for output in outputs for text in texts(output) for found in ABSOLUTE.findall(text)]


def test_there_are_some():
    assert len(PATHS) == 6


def test_a_folder_is_found():
    named = ["in /opt/some/place.py:3", "'/opt/some'", "C:\\Users", "/opt/some"]
    assert all(map(ABSOLUTE.search, named))
    fine = ["phases/dot:NHWC", "</td></tr>", "3 / 4", "lost/found", "// two"]
    assert not any(map(ABSOLUTE.search, fine))


@each
def test_what_is_stored(path):
    check(path)


@each
@once
def test_it_runs(path, tmp_path):
    python_path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "notebooks.run", str(path), "--to", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"NOTEBOOKS": "small", "PYTHONPATH": python_path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    check(tmp_path / path.name)


@pytest.mark.parametrize("page", ["lowerings.md", "rules.md"])
def test_the_examples_of_the_docs_are_run(page):
    """By the notebook, which has them as they are."""
    cells = json.loads((ROOT / "notebooks" / "own_lowering_and_rule.ipynb").read_text())["cells"]
    source = "\n\n\n".join("".join(cell["source"]) for cell in cells)
    [example] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    for part in re.split(r"\n{3,}", example.strip()):
        assert part in source
