"""An explanation as rich shows it."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from jaxlayout.report.value import Facts, SiteFacts
from jaxlayout.report.words import (
    groups,
    headline,
    listed,
    measured_cells,
    ms,
    scope,
    shapes,
    summary,
    times,
    where,
    why_nothing,
    wrong_as_written,
)

DETAILED = 6
"""Of so many distinct convolutions all candidates are shown; of more, each site's own print shows them."""
WIDTH = 120
"""Columns of `str`, which knows no terminal."""


def of_explanation(facts: Facts) -> Group:
    """The whole report."""
    found = groups(facts)
    parts: list[Any] = [_head(facts)]
    if wrong := wrong_as_written(facts):
        parts.append(Text(wrong, style="bold red"))
    if why := why_nothing(facts):
        parts.append(Text(why, style="bold"))
    if found:
        parts += _titled("Convolutions", _convolutions(facts))
    for group in found if len(found) <= DETAILED else ():
        parts += _titled(f"{group.numbers}: {group.first.kind}, {shapes(group.first)}", _candidates(group.first))
    if len(found) > DETAILED:
        parts.append(Text("print(explanation.sites[#]) shows all candidates of one, to_json() of all", style="dim"))
    if facts.moves:
        parts += _titled("Conversions", _conversions(facts))
    if facts.transposes:
        parts += _titled("Your transposes", _transposes(facts))
    if facts.barriers:
        parts += _titled("Barriers: no rule, their operands come in the order written", _barriers(facts))
    return Group(*parts)


def of_site(site: SiteFacts) -> Group:
    """One convolution: all that was measured of it."""
    head = Text(where(site), style="bold")
    if site.scope:
        head.append(f"  {site.scope}", style="not bold dim")
    return Group(head, Text(f"{site.kind}, {shapes(site)}, runs {times(site.times)} times a call"), _candidates(site))


def plain_text(value: Any) -> str:
    """As text without colours."""
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None, force_terminal=False, legacy_windows=False)
    with console.capture() as capture:
        console.print(value)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _table(columns: Sequence[tuple[str, Any]], rows: Iterable[Sequence[Any]]) -> Table:
    """Cells are text, never markup: names and lines are the user's."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name, how in columns:
        table.add_column(name, header_style="dim", overflow="fold", **how)
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    return table


def _titled(title: str, table: Table) -> list[Any]:
    return [Text(f"\n{title}", style="bold"), table]


RIGHT: dict[str, Any] = {"justify": "right", "no_wrap": True}


def _head(facts: Facts) -> Group:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in summary(facts):
        grid.add_row(name, Text(text))
    style = "bold green" if facts.outcome.kept else "bold yellow"
    return Group(Text(headline(facts), style=style), Padding(grid, (0, 0, 0, 2)))


def _convolutions(facts: Facts) -> Table:
    rows = []
    for group in groups(facts):
        site, written, chosen = group.first, group.first.written, group.first.chosen
        place, (before, after) = Text(), (measured_cells(written)[0], measured_cells(chosen)[0])
        for line in group.places[:3]:
            place.append(f"{line}\n")
        if len(group.places) > 3:
            place.append(f"and {len(group.places) - 3} more places\n", style="dim")
        place.append(scope(site) + (f" and {len(group.sites) - 1} more" if len(group.sites) > 1 else ""), style="dim")
        place.rstrip()
        what = Text(f"{site.kind}, {site.dtype}\n").append(shapes(site), style="dim")
        if written.chosen:
            form, time = Text(f"{written.candidate}\n").append("as written", style="dim"), Text(before)
        else:
            form = Text(f"{written.candidate}\n", style="dim").append(f"→ {chosen.candidate}", style="not dim green")
            time = Text(f"{before}\n", style="dim").append(after, style="not dim green")
        rows.append((group.numbers, place, what, form, time, times(group.runs)))
    columns = [
        ("#", {"max_width": 8}),
        ("where", {"ratio": 3}),
        ("convolution", {"ratio": 3}),
        ("form", {"ratio": 3, "min_width": 26}),
    ]
    return _table([*columns, ("ms", RIGHT), ("runs", RIGHT)], rows)


def _candidates(site: SiteFacts) -> Table:
    rows = []
    for one in site.tried:
        style = "green" if one.chosen else "" if one.measurement and one.measurement.median_ns else "dim"
        time, spread, runs, error, _, status = measured_cells(one)
        marks = [status, *(word for word, true in (("chosen", one.chosen), ("written", one.written)) if true)]
        cells = str(one.candidate), time if spread == "–" else f"{time} ±{spread}", runs, error, ", ".join(marks)
        rows.append([Text(cell, style=style) for cell in cells])
    return _table([("candidate", {}), ("ms", RIGHT), ("tries", RIGHT), ("error", RIGHT), ("", {})], rows)


def _conversions(facts: Facts) -> Table:
    rows = []
    for move in facts.moves:
        what = f"conversion of {move.dtype}{list(move.shape)}"
        time = ms(move.ns) if move.measured else f"≥ {ms(move.ns)}"
        why = f"{move.held} from {move.held_by}\n{move.wanted} for {listed(move.wanted_by)}"
        rows.append((what, f"{move.held} → {move.wanted}", why, time, times(move.times)))
    columns = [("value", {"ratio": 2}), ("orders", {"ratio": 1}), ("why", {"ratio": 3})]
    return _table([*columns, ("ms", RIGHT), ("runs", RIGHT)], rows)


def _transposes(facts: Facts) -> Table:
    rows = [
        (one.line, f"{list(one.shape)} by {list(one.permutation)}", "absorbed" if one.absorbed else "stays")
        for one in facts.transposes
    ]
    return _table([("where", {}), ("what", {}), ("", {})], rows)


def _barriers(facts: Facts) -> Table:
    rows = [(one.name, one.count, listed(one.lines)) for one in facts.barriers]
    columns = [("primitive", {}), ("times", RIGHT), ("where", {})]
    return _table(columns, rows)
