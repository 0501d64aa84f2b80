"""`python -m bench.compare`, of invented results."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bench import compare


def written(folder: Path, **tables: Any) -> str:
    """A folder with tables of these rows."""
    folder.mkdir()
    for name, rows in tables.items():
        (folder / f"{name}.json").write_text(json.dumps({"format": 2, "rows": rows}))
    return str(folder)


def row(case: str, ratio: float | None, spread: float = 0.1, **more: Any) -> dict[str, Any]:
    return {"case": case, "jit_ms": 5.0, "auto_layout_ms": 1.0, "ratio": ratio, "spread": spread, **more}


def test_the_worst_is_first(tmp_path, capsys):
    old = written(
        tmp_path / "old", one=[row("a", 2.0), row("b", 3.0), row("c", 1.0), row("d", 2.0)], two=[row("a", 10.0, 1.0)]
    )
    new = written(
        tmp_path / "new", two=[row("a", 2.5, 0.5)], one=[row("d", 4.0), row("c", 1.0), row("b", 1.5), row("a", 2.19)]
    )
    assert compare.main([old, new]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "table  case  old      new        new / old",
        "two    a     10x ±1   2.5x ±0.5  0.25",
        "one    b     3x ±0.1  1.5x ±0.1  0.50",
        "one    d     2x ±0.1  4x ±0.1    2.00",
        "of 5 ratios 2 got slower, 1 faster",
    ]


@pytest.mark.parametrize(("new", "spread", "status"), [(1.5, 0.1, 1), (1.75, 0.1, 1), (1.85, 0.1, 0), (1.5, 0.5, 0)])
def test_a_change_counts_beyond_both_spreads_together(tmp_path, new, spread, status):
    """One that was measured badly may have changed, or not."""
    old, new = written(tmp_path / "old", one=[row("a", 2.0)]), written(tmp_path / "new", one=[row("a", new, spread)])
    assert compare.main([old, new]) == status
    assert compare.main([new, old]) == 0  # what got faster is no failure


def test_milliseconds_are_not_compared(tmp_path, capsys):
    old = written(tmp_path / "old", one=[row("a", 2.0)])
    new = written(tmp_path / "new", one=[row("a", 2.0) | {"jit_ms": 50.0, "auto_layout_ms": 25.0}])
    assert compare.main([old, new]) == 0
    assert capsys.readouterr().out == "of 1 ratios 0 got slower, 0 faster\n"


def test_what_only_one_has_is_told(tmp_path, capsys):
    """A case that fails now has a row without a ratio."""
    old = written(tmp_path / "old", one=[row("a", 2.0), row("b", 2.0)], two=[row("a", 2.0)])
    new = written(tmp_path / "new", one=[row("a", 2.0), {"case": "b", "failed": "TypeError"}, row("c", 1.0)])
    assert compare.main([old, new]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "of 1 ratios 0 got slower, 0 faster",
        f"only in {old}: one  b",
        f"only in {old}: two  a",
        f"only in {new}: one  c",
    ]


def test_every_ratio_of_a_row_with_its_own_spread():
    parts = {"rivals": {"torch": {"ms": 3.0, "ratio": 3.0, "spread": 0.3}}, "torch_ratio": 4.0, "torch_spread": 0.4}
    other = {"frozen": 6.5, "layouts_ratio": 1.5, "goal": 40.0, "inside_ratio": 0.9, "inside_spread": 0.1}
    assert dict(compare.ratios(row("a", 2.0, **parts, **other))) == {
        "ratio": compare.Ratio(2.0, 0.1),
        "rivals.torch.ratio": compare.Ratio(3.0, 0.3),
        "torch_ratio": compare.Ratio(4.0, 0.4),
    }
    assert not dict(compare.ratios(row("a", None))) and not dict(compare.ratios({"case": "a", "spread": 0.1}))


def test_of_a_commit(tmp_path, monkeypatch, capsys):
    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.setattr(compare, "ROOT", tmp_path)
    (tmp_path / "bench").mkdir()
    folder = written(tmp_path / "bench" / "results", one=[row("a", 2.0)])
    (tmp_path / "bench" / "results" / "one.md").write_text("| a |")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "old")
    (tmp_path / "bench" / "results" / "one.json").write_text(json.dumps([row("a", 1.0)]))  # as it was first written
    assert compare.main(["HEAD", folder]) == 1
    assert capsys.readouterr().out.splitlines()[1].split() == ["one", "a", "2x", "±0.1", "1x", "±0.1", "0.50"]
    assert compare.main(["HEAD", "HEAD"]) == 0


@pytest.mark.parametrize("rows", [[], [row("b", 2.0)], [{"case": "a", "ms": 5.0}]])
def test_nothing_to_compare_is_an_error(tmp_path, capsys, rows):
    old, new = written(tmp_path / "old", one=[row("a", 2.0)]), written(tmp_path / "new", one=rows)
    for wrong, said in (((old, new), "no ratio in common"), ((old, str(tmp_path / "none")), "neither a folder nor")):
        with pytest.raises(SystemExit) as left:
            compare.main([*wrong])
        assert left.value.code == 2 and said in capsys.readouterr().err
