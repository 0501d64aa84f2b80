"""A picture of each table of results.

    pip install 'jaxlayout[bench]'
    python -m bench.plot [file.json ...] [--out bench/results]

Writes NAME.png into --out for each NAME.json, by default all of bench/results. One bar for each case: how many times
faster auto_layout is than what it is held against, on a logarithmic axis, with half the interquartile range, and a mark
where the goal is; dotted, what it would be without the limit on memory. Of `bench.forms`: a point for each form.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from bench.rows import Row, read_rows

RESULTS = Path("bench/results")
TOLD = {
    "auto_entry": "AUTO at entry",
    "channels_last": "channels last",
    "channels_first": "channels first",
    "layouts": "layouts alone",
    "lowerings": "lowerings alone",
    "auto_layout": "auto_layout",
}
MARKS = dict(zip(TOLD, "v<>sD*", strict=True))
FASTER, AS_IT_WAS, SLOWER = "#2a78b5", "#a5acb3", "#c8553d"


def bars(axes: Axes, rows: list[Row]) -> None:
    """One for each case, its times beside it."""
    ratios = [row["ratio"] for row in rows]
    colours = [AS_IT_WAS if unchanged(row) else FASTER if row["ratio"] >= 1 else SLOWER for row in rows]
    # From 1: what is faster goes to the right, what is slower to the left.
    axes.barh(range(len(rows)), [r - 1 for r in ratios], left=1, color=colours, height=0.7)
    lifted = {i: row["lifted"]["ratio"] for i, row in enumerate(rows) if "lifted" in row}
    if lifted:
        widths = [ratio - 1 for ratio in lifted.values()]
        shape: dict[str, Any] = {"height": 0.7, "color": "none", "edgecolor": FASTER, "linestyle": ":"}
        axes.barh(list(lifted), widths, left=1, label="without memory limit", **shape)
    spreads = [row["spread"] for row in rows]
    axes.errorbar(ratios, range(len(rows)), xerr=spreads, fmt="none", ecolor="#333333", elinewidth=1)
    goals = [(row.get("goal") or row.get("target"), i) for i, row in enumerate(rows)]
    goals = [(goal, i) for goal, i in goals if goal]
    if goals:
        x, y = zip(*goals, strict=True)
        axes.plot(x, y, "|", color="black", markersize=15, markeredgewidth=2.2, label="goal")
    if goals or lifted:
        axes.legend(loc="lower right", frameon=False)
    for i, row in enumerate(rows):
        right = max(1.0, row["ratio"] + row["spread"], lifted.get(i, 1.0), *(goal for goal, at in goals if at == i))
        axes.annotate(words(row), (right, i), (6, 0), textcoords="offset points", va="center", fontsize=8)


def unchanged(row: Row) -> bool:
    """Whether the two programs are one."""
    return not row.get("kept", True) or bool(row.get("same"))


def words(row: Row) -> str:
    """What stands beside a bar."""
    if "ms" in row:  # against PyTorch
        other = row["faster_torch"]
        return f"{row['ratio']:.2f}x   {row['ms'][other]:.0f} ms ({other}) against {row['ms']['auto_layout']:.0f} ms"
    times = " → ".join(short(row[key]) for key in ("jit_ms", "auto_layout_ms"))
    said = "same program" if row.get("same") else "unchanged" if unchanged(row) else f"{short(row['ratio'])}x"
    return f"{said}   {times} ms"


def short(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def points(axes: Axes, rows: list[Row]) -> None:
    """One for each form of each case, each form on a line of its own, so that equal ones do not hide each other."""
    step = 0.13
    for n, (form, label) in enumerate(TOLD.items()):
        found = [(row["forms"].get(form, {"ratio": 1.0, "spread": 0.0}), i) for i, row in enumerate(rows)]
        places = [i + (n - (len(TOLD) - 1) / 2) * step for _, i in found]
        ratios, spreads = ([f[key] for f, _ in found] for key in ("ratio", "spread"))
        axes.errorbar(ratios, places, xerr=spreads, fmt=MARKS[form], label=label, markersize=8, elinewidth=1)
    for i in range(1, len(rows)):
        axes.axhline(i - 0.5, color="#dddddd", linewidth=0.8)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)


def picture(name: str, rows: list[Row]) -> Figure:
    """Of one table of results."""
    forms = "forms" in rows[0]
    figure = Figure(figsize=(10, 1.3 + (0.9 if forms else 0.3) * len(rows)), layout="constrained")
    axes = figure.subplots()
    (points if forms else bars)(axes, rows)
    axes.set_yticks(range(len(rows)), [row["case"] for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}x"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.axvline(1, color="black", linewidth=1)
    low, high = axes.get_xlim()
    low = min(low, 0.9)
    high *= (high / low) ** (0.05 if forms else 0.45)  # room for the words
    axes.set_xlim(low, high)
    steps = (1,) if high > 1000 * low else (1, 2, 5) if high > 4 * low else (1, 1.2, 1.5, 2, 3, 5, 6, 7, 8, 9)
    axes.xaxis.set_major_locator(LogLocator(subs=steps))
    against = "the faster PyTorch" if "faster_torch" in rows[0] else "jax.jit"
    axes.set_xlabel(f"times as fast as {against}")
    axes.set_title(name)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw(file: Path, out: Path) -> Path | None:
    """The picture's file; None where a file is no table of ratios."""
    rows = [row for row in read_rows(file.read_text()) if "ratio" in row or "forms" in row]
    if not rows:  # or a case that was not run
        return None
    out.mkdir(parents=True, exist_ok=True)
    made = out / f"{file.stem}.png"
    # No date and no version in the file: the same results make the same picture.
    picture(file.stem, rows).savefig(made, dpi=90, metadata={"Software": None})
    return made


def main(argv: list[str] | None = None) -> int:
    """Draw them."""
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="default: all results")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(argv)
    for file in given.files or sorted(RESULTS.glob("*.json")):
        made = draw(file, given.out)
        print(made or f"{file}: not a table of ratios, no picture", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
