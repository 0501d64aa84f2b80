"""What got slower between two commits' results.

    python -m bench.compare OLD NEW

OLD and NEW are folders of results, or commits, whose bench/results is read. Tables are matched by the name of their
file, rows by their case. Only ratios are compared: the two sides of each ran in turn, while milliseconds of two days
may differ for any reason. Prints each ratio that has changed by more than its two spreads together, the worst first,
and what only one of the two has. The exit status is 1 if a ratio has fallen by that much.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.rows import Row, read_rows

ROOT = Path(__file__).parents[1]
RESULTS = "bench/results/"

AMONG_OURS = {"inside_ratio"}
"""Ratios of two uses of `auto_layout`: where one falls, the other may have become faster."""

Key = tuple[str, str]
"""The name of a table; the case of a row, and which of its ratios."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times as fast as what it is held against, and half the interquartile range."""

    value: float
    spread: float

    def __str__(self) -> str:
        return f"{self.value:.3g}x ±{self.spread:.2g}"


@dataclass(frozen=True, slots=True)
class Change:
    """Of one ratio between two results."""

    key: Key
    old: Ratio
    new: Ratio

    @property
    def times(self) -> float:
        """New over old: below 1, it is slower."""
        return self.new.value / self.old.value

    @property
    def beyond_noise(self) -> bool:
        """Whether `value ± spread` of the two do not meet."""
        return abs(self.new.value - self.old.value) > self.old.spread + self.new.spread


def ratios(row: Row) -> Iterator[tuple[str, Ratio]]:
    """The ratios of a row that have a spread, each by its name, those of its parts too (`rivals.torch.ratio`)."""
    for name, held in row.items():
        if isinstance(held, dict):
            yield from ((f"{name}.{inner}", ratio) for inner, ratio in ratios(held))
        elif (name == "ratio" or name.endswith("_ratio")) and name not in AMONG_OURS and held is not None:
            spread = row.get(name.removesuffix("ratio") + "spread")
            if spread is not None:
                yield name, Ratio(held, spread)


def found(tables: dict[str, str]) -> dict[Key, Ratio]:
    """All ratios of some tables."""
    return {
        (table, row["case"] if name == "ratio" else f"{row['case']}, {name}"): ratio
        for table, text in tables.items()
        for row in read_rows(text)
        for name, ratio in ratios(row)
    }


def results(where: str) -> dict[str, str]:
    """The texts of the tables in a folder, or in a commit; ValueError where it is neither."""
    if Path(where).is_dir():
        return {file.stem: file.read_text() for file in sorted(Path(where).glob("*.json"))}
    try:
        names = [name for name in _git("ls-tree", "--name-only", where, RESULTS).splitlines() if name.endswith(".json")]
        return {Path(name).stem: _git("show", f"{where}:{name}") for name in names}
    except (OSError, subprocess.CalledProcessError):
        raise ValueError(f"{where} is neither a folder nor a commit") from None


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def shown(changes: list[Change]) -> str:
    """A table of them."""
    lines = [("table", "case", "old", "new", "new / old")]
    lines += [(*change.key, str(change.old), str(change.new), f"{change.times:.2f}") for change in changes]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def main(argv: list[str] | None = None) -> int:
    """Compare them; 1 if something got slower, 2 if there is nothing to compare."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old", metavar="OLD", help="a folder of results, or a commit")
    parser.add_argument("new", metavar="NEW", help="likewise")
    given: Any = parser.parse_args(argv)
    try:
        old, new = found(results(given.old)), found(results(given.new))
    except ValueError as error:
        parser.error(str(error))
    changes = [Change(key, old[key], new[key]) for key in old if key in new]
    if not changes:
        parser.error(f"{given.old} and {given.new} have no ratio in common")
    told = sorted((change for change in changes if change.beyond_noise), key=lambda change: change.times)
    if told:
        print(shown(told))
    slower = sum(change.times < 1 for change in told)
    print(f"of {len(changes)} ratios {slower} got slower, {len(told) - slower} faster")
    for where, those, others in ((given.old, old, new), (given.new, new, old)):
        for table, case in sorted(those.keys() - others.keys()):
            print(f"only in {where}: {table}  {case}")
    return int(slower > 0)


if __name__ == "__main__":
    sys.exit(main())
