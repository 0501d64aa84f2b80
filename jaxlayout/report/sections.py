"""The tables of a report, for text and HTML alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from jaxlayout.report.value import Facts, SiteFacts
from jaxlayout.report.words import groups, listed, measured_cells, ms, scope, shapes, times

NUMBERS = frozenset({"ms", "tries", "error", "memory", "runs", "times"})
"""Columns of numbers."""
MOST_PLACES = 3
"""So many source lines of equal convolutions are shown."""
MOST_WORDS = 160
"""So many letters of why a candidate failed are shown."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a cell."""

    text: str
    tone: Literal["", "dim", "won"] = ""
    """Beside the point, or what was chosen."""


Cell = Sequence[Line]


@dataclass(frozen=True, slots=True)
class Section:
    """A table with a title."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[Cell]]

    def __bool__(self) -> bool:
        return bool(self.rows)


def convolutions(facts: Facts) -> Section:
    """A row for each of `groups`."""
    rows = []
    for group in groups(facts):
        site, written, chosen = group.first, group.first.written, group.first.chosen
        others = len(group.places) - MOST_PLACES
        more = f" and {len(group.sites) - 1} more" if len(group.sites) > 1 else ""
        place = [*map(Line, group.places[:MOST_PLACES]), *_dim(f"and {others} more places" if others > 0 else "")]
        before, after = measured_cells(written)[0], measured_cells(chosen)[0]
        if written.chosen:
            form, time = [Line(str(written.candidate)), Line("as written", "dim")], [Line(before)]
        else:
            form = [Line(str(written.candidate), "dim"), Line(f"→ {chosen.candidate}", "won")]
            time = [Line(before, "dim"), Line(after, "won")]
        what = [Line(f"{site.kind}, {site.dtype}"), Line(shapes(site), "dim")]
        where_ = [*place, *_dim(f"{scope(site)}{more}".strip())]
        rows.append((_line(group.numbers), where_, what, form, time, _line(times(group.runs))))
    return Section("Convolutions", ("#", "where", "convolution", "form", "ms", "runs"), rows)


def candidates(site: SiteFacts, title: str = "") -> Section:
    """All candidates of one convolution."""
    rows = []
    for one in site.tried:
        tone = "won" if one.chosen else "" if one.measurement and one.measurement.median_ns else "dim"
        time, spread, *numbers, status = measured_cells(one)
        marks = [status, *(word for word, true in (("chosen", one.chosen), ("written", one.written)) if true)]
        why = one.measurement.detail.partition("\n")[0] if one.measurement and status not in ("ok", "slow") else ""
        cells = str(one.candidate), time if spread == "–" else f"{time} ±{spread}", *numbers
        last = [Line(", ".join(marks), tone), *_dim(f"{why[:MOST_WORDS]}…" if len(why) > MOST_WORDS else why)]
        rows.append([*([Line(cell, tone)] for cell in cells), last])
    return Section(title, ("candidate", "ms", "tries", "error", "memory", ""), rows)


def others(facts: Facts) -> list[Section]:
    """What there is beside convolutions: of these tables those that have a row."""
    return [section for section in (_conversions(facts), _transposes(facts), _barriers(facts)) if section]


def _conversions(facts: Facts) -> Section:
    rows = [
        (
            _line(f"conversion of {move.dtype}{list(move.shape)}"),
            _line(f"{move.held} → {move.wanted}"),
            [Line(f"{move.held} from {move.held_by}"), Line(f"{move.wanted} for {listed(move.wanted_by)}")],
            _line(ms(move.ns) if move.measured else f"≥ {ms(move.ns)}"),
            _line(times(move.times)),
        )
        for move in facts.moves
    ]
    return Section("Conversions", ("value", "orders", "why", "ms", "runs"), rows)


def _transposes(facts: Facts) -> Section:
    rows = [
        (
            _line(one.line),
            _line(f"{list(one.shape)} by {list(one.permutation)}"),
            _line("absorbed" if one.absorbed else "stays"),
        )
        for one in facts.transposes
    ]
    return Section("Your transposes", ("where", "what", ""), rows)


def _barriers(facts: Facts) -> Section:
    title = "Barriers: no rule, their operands come in the order written"
    rows = [(_line(one.name), _line(str(one.count)), _line(listed(one.lines))) for one in facts.barriers]
    return Section(title, ("primitive", "times", "where"), rows)


def _line(text: str) -> Cell:
    return [Line(text)]


def _dim(text: str) -> Iterable[Line]:
    """A line beside the point, where there is one."""
    return [Line(text, "dim")] if text else []
