"""Tables that are written row by row, and keep the rows of earlier runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


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
