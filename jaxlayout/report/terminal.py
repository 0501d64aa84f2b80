"""An explanation as rich shows it."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from jaxlayout.report.sections import NUMBERS, Cell, Section, candidates, convolutions, others
from jaxlayout.report.value import Facts, SiteFacts
from jaxlayout.report.words import groups, headline, shapes, summary, times, where, why_nothing, wrong_as_written

DETAILED = 6
"""Of so many distinct convolutions all candidates are shown; of more, each site's own print shows them."""
WIDTH = 120
"""Columns of `str`, which knows no terminal."""
STYLES = {"": "", "dim": "dim", "won": "green"}
SHARES: Mapping[str, Any] = {
    "#": {"max_width": 8},
    "where": {"ratio": 3},
    "convolution": {"ratio": 3},
    "form": {"ratio": 3, "min_width": 26},
    "value": {"ratio": 2},
    "orders": {"ratio": 1},
    "why": {"ratio": 3},
}
"""How the wide tables' columns share the width."""


def of_explanation(facts: Facts) -> Group:
    """The whole report."""
    found = groups(facts)
    parts: list[Any] = [_head(facts)]
    if wrong := wrong_as_written(facts):
        parts.append(Text(wrong, style="bold red"))
    if why := why_nothing(facts):
        parts.append(Text(why, style="bold"))
    if found:
        parts += _titled(convolutions(facts), wide=True)
    for group in found if len(found) <= DETAILED else ():
        title = f"{group.numbers}: {group.first.kind}, {shapes(group.first)}"
        parts += _titled(candidates(group.first, title))
    if len(found) > DETAILED:
        parts.append(Text("print(explanation.sites[#]) shows all candidates of one, to_json() of all", style="dim"))
    for section in others(facts):
        parts += _titled(section, wide="why" in section.columns)
    return Group(*parts)


def of_site(site: SiteFacts) -> Group:
    """One convolution: all that was measured of it."""
    head = Text(where(site), style="bold")
    if site.scope:
        head.append(f"  {site.scope}", style="not bold dim")
    what = Text(f"{site.kind}, {shapes(site)}, runs {times(site.times)} times a call")
    return Group(head, what, _table(candidates(site)))


def plain_text(value: Any) -> str:
    """As text without colours."""
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None, force_terminal=False, legacy_windows=False)
    with console.capture() as capture:
        console.print(value)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _titled(section: Section, *, wide: bool = False) -> list[Any]:
    return [Text(f"\n{section.title}", style="bold"), _table(section, wide=wide)]


def _table(section: Section, *, wide: bool = False) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name in section.columns:
        how = {"justify": "right", "no_wrap": True} if name in NUMBERS else SHARES.get(name, {}) if wide else {}
        table.add_column(name, header_style="dim", overflow="fold", **how)
    for row in section.rows:
        table.add_row(*map(_text, row))
    return table


def _text(cell: Cell) -> Text:
    """Text, never markup: names and lines are the user's."""
    return Text("\n").join(Text(line.text, style=STYLES[line.tone]) for line in cell)


def _head(facts: Facts) -> Group:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in summary(facts):
        grid.add_row(name, Text(text))
    style = "bold green" if facts.outcome.kept else "bold yellow"
    return Group(Text(headline(facts), style=style), Padding(grid, (0, 0, 0, 2)))
