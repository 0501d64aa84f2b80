"""Tables that are written row by row, and keep the rows of earlier runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.timing import Paired
from jaxlayout import Outcome

Row = dict[str, Any]


def compared(name: str, seen: Paired, outcome: Outcome) -> Row:
    """What every row has in which jit is held against auto_layout."""
    verdict = outcome.verdict
    return {
        "case": name,
        "jit_ms": seen.first_ms,
        "auto_layout_ms": seen.second_ms,
        "ratio": seen.ratio,
        "spread": seen.spread,
        "pairs": seen.pairs,
        "kept": outcome.kept,
        "reason": verdict.reason,
        "memory": verdict.tuned_temp / verdict.original_temp if verdict.original_temp and verdict.tuned_temp else None,
        "tuning_s": outcome.seconds,
        "timed": outcome.measured,
    }


def write_rows(
    stem: Path,
    named: Sequence[str],
    every: Iterable[str],
    run: Callable[[str], Row],
    markdown: Callable[[list[Row]], str],
) -> None:
    """Run the cases `named`, or all, and after each write stem.json and stem.md, rows in the order of `every`. Where
    cases are named, the others' rows stay."""
    file = stem.with_name(f"{stem.name}.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    every = list(every)
    rows = {row["case"]: row for row in json.loads(file.read_text())} if named and file.exists() else {}
    for name in named or every:
        rows[name] = run(name)
        done = [rows[case] for case in every if case in rows]
        file.write_text(json.dumps(done, indent=1) + "\n")
        stem.with_name(f"{stem.name}.md").write_text(markdown(done))
        print(next(line for line in markdown([rows[name]]).splitlines() if line.startswith(f"| {name} ")), flush=True)
