"""An explanation as HTML: one element with a style of its own, no scripts, everything escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from jaxlayout.report.value import Facts
from jaxlayout.report.words import (
    Group,
    groups,
    headline,
    measured_cells,
    ms,
    scope,
    shapes,
    summary,
    times,
    why_nothing,
    wrong_as_written,
)

STYLE = """
.jaxlayout { font-family: sans-serif; font-size: 13px; line-height: 1.4 }
.jaxlayout table { border-collapse: collapse; margin: 2px 0 8px 0 }
.jaxlayout th, .jaxlayout td { text-align: left; vertical-align: top; padding: 2px 10px 2px 0; border: 0 }
.jaxlayout th { border-bottom: 1px solid #8888; font-weight: 600 }
.jaxlayout td.n, .jaxlayout th.n { text-align: right; white-space: nowrap }
.jaxlayout code { font-size: 12px; background: none; padding: 0 }
.jaxlayout .dim { opacity: .65 }
.jaxlayout .won { color: #00775a; font-weight: 600 }
.jaxlayout .kept, .jaxlayout .left { font-size: 15px; font-weight: 600 }
.jaxlayout .kept { color: #00775a }
.jaxlayout .left { color: #a85500 }
.jaxlayout .wrong { color: #b00020; font-weight: 600 }
.jaxlayout details { margin: 2px 0 }
.jaxlayout summary { cursor: pointer }
""".strip()
NUMBERS = frozenset({"ms", "±", "tries", "error", "memory", "runs", "times"})


def of_explanation(facts: Facts) -> str:
    """The whole report; the candidates of each convolution can be unfolded."""
    state = "kept" if facts.outcome.kept else "left"
    parts = [f'<div class="{state}"><code>{escape(facts.name)}</code> {escape(headline(facts))}</div>']
    if wrong := wrong_as_written(facts):
        parts.append(f'<p class="wrong">{escape(wrong)}</p>')
    if why := why_nothing(facts):
        parts.append(f"<p>{escape(why)}</p>")
    whole = "".join(
        f'<tr><td class="dim">{escape(name)}</td><td>{escape(text)}</td></tr>' for name, text in summary(facts)
    )
    parts.append(f"<table>{whole}</table>")
    if facts.sites:
        parts.append(_convolutions(facts))
    if facts.moves:
        parts.append(_conversions(facts))
    if facts.transposes:
        rows = [
            [escape(one.line), f"{list(one.shape)} by {list(one.permutation)}", "absorbed" if one.absorbed else "stays"]
            for one in facts.transposes
        ]
        parts.append(_folded("Your transposes", _table(["where", "what", ""], rows)))
    if facts.barriers:
        rows = [[escape(one.name), str(one.count), "<br>".join(map(escape, one.lines))] for one in facts.barriers]
        title = "Barriers: no rule, their operands come in the order written"
        parts.append(_folded(title, _table(["primitive", "times", "where"], rows)))
    return f'<div class="jaxlayout"><style>{STYLE}</style>{"".join(parts)}</div>'


def _table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML already."""
    marks = [' class="n"' if name in NUMBERS else "" for name in names]
    head = "".join(f"<th{mark}>{escape(name)}</th>" for name, mark in zip(names, marks, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{mark}>{cell}</td>" for cell, mark in zip(row, marks, strict=True)) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _folded(title: str, table: str) -> str:
    return f"<details><summary><b>{escape(title)}</b></summary>{table}</details>"


def _convolutions(facts: Facts) -> str:
    rows = []
    for group in groups(facts):
        site, written, chosen = group.first, group.first.written, group.first.chosen
        place = "<br>".join([*map(escape, group.places), f'<span class="dim">{escape(scope(site))}</span>'])
        what = f'{escape(site.kind)}, {escape(site.dtype)}<br><span class="dim">{escape(shapes(site))}</span>'
        before, after = measured_cells(written)[0], measured_cells(chosen)[0]
        if written.chosen:
            form, time = f'<code>{escape(str(written.candidate))}</code> <span class="dim">as written</span>', before
        else:
            form = f'<code class="dim">{escape(str(written.candidate))}</code><br>'
            form += f'<code class="won">{escape(str(chosen.candidate))}</code>'
            time = f'<span class="dim">{before}</span><br><span class="won">{after}</span>'
        rows.append([group.numbers, place, what, form + _candidates(group), time, times(group.runs)])
    return "<b>Convolutions</b>" + _table(["#", "where", "convolution", "form", "ms", "runs"], rows)


def _candidates(group: Group) -> str:
    rows = []
    for one in group.first.tried:
        marks = [word for word, true in (("chosen", one.chosen), ("written", one.written)) if true]
        name = f'<code class="{"won" if one.chosen else ""}">{escape(str(one.candidate))}</code>'
        why = escape(one.measurement.detail) if one.measurement else ""
        rows.append([name, *map(escape, measured_cells(one)), ", ".join(marks) or f'<span class="dim">{why}</span>'])
    table = _table(["candidate", "ms", "±", "tries", "error", "memory", "", ""], rows)
    return f'<details><summary class="dim">{len(rows)} candidates</summary>{table}</details>'


def _conversions(facts: Facts) -> str:
    rows = [
        [
            f"{escape(move.dtype)}{list(move.shape)}",
            f"<code>{escape(move.held)} → {escape(move.wanted)}</code>",
            f"{escape(move.held)} from {escape(move.held_by)}<br>"
            + "<br>".join(f"{escape(move.wanted)} for {escape(one)}" for one in move.wanted_by),
            f"{'' if move.measured else '≥ '}{ms(move.ns)}",
            times(move.times),
        ]
        for move in facts.moves
    ]
    return _folded(f"{len(rows)} conversions", _table(["value", "orders", "why", "ms", "runs"], rows))
