"""Tables that are written row by row, and keep the rows of earlier runs."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlayout.runtime.plain_data import check_format

if TYPE_CHECKING:  # a bench of the table does without JAX
    from bench.timing import Paired
    from jaxlayout import Outcome

Row = dict[str, Any]

FORMAT = 2
"""Of a file of results. The first was a list of the rows, without a number."""


def arguments(bench: str, doc: str | None, cases: Collection[str], budget: float = 3600.0) -> ArgumentParser:
    """The command line of a bench: which cases, where to, how long, how small."""
    parser = ArgumentParser(prog=f"python -m bench.{bench}", description=(doc or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="case", help=f"default: all of {', '.join(cases)}")
    parser.add_argument("--table", default=None, help="cost table, default: the user's")
    parser.add_argument("--small", action="store_true", help="small shapes, few pairs: to see that it works")
    parser.add_argument("--budget", type=float, default=budget, help="seconds of measuring, over all cases")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    return parser


def parsed(parser: ArgumentParser, cases: Collection[str], argv: list[str] | None) -> Namespace:
    """What was given; leaves the program where a case is not there."""
    given = parser.parse_args(argv)
    if unknown := [name for name in given.cases if name not in cases]:
        parser.error(f"no case {', '.join(unknown)}; there are {', '.join(cases)}")
    return given


def compared(name: str, seen: Paired, outcome: Outcome) -> Row:
    """What every row has in which jit is held against auto_layout."""
    verdict = outcome.verdict
    return {
        "case": name,
        **seen.to_json("jit", "auto_layout"),
        "kept": outcome.kept,
        "reason": verdict.reason,
        "memory": verdict.tuned_temp / verdict.original_temp if verdict.original_temp and verdict.tuned_temp else None,
        "tuning_s": outcome.seconds,
        "timed": outcome.measured,
    }


def read_rows(text: str) -> list[Row]:
    """The rows of a file of results; ValueError where it is none."""
    found = json.loads(text)
    if isinstance(found, list):  # the first format
        return found
    check_format("a file of results", found, FORMAT, oldest=FORMAT)
    return found["rows"]


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
    rows = {row["case"]: row for row in read_rows(file.read_text())} if named and file.exists() else {}
    for name in named or every:
        rows[name] = run(name)
        done = [rows[case] for case in every if case in rows]
        file.write_text(json.dumps({"format": FORMAT, "rows": done}, indent=1) + "\n")
        stem.with_name(f"{stem.name}.md").write_text(markdown(done))
        print(next(line for line in markdown([rows[name]]).splitlines() if line.startswith(f"| {name} ")), flush=True)
