"""An explanation as HTML: one element with a style of its own, no scripts, everything escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from types import MappingProxyType

from jaxlayout.report.sections import NUMBERS, Cell, Line, Section, candidates, convolutions, others
from jaxlayout.report.value import Facts
from jaxlayout.report.words import groups, headline, summary, why_nothing, wrong_as_written

STYLE = """
.jaxlayout { font-family: sans-serif; font-size: 13px; line-height: 1.4 }
.jaxlayout table { border-collapse: collapse; margin: 2px 0 8px 0 }
.jaxlayout th, .jaxlayout td { text-align: left; vertical-align: top; padding: 2px 10px 2px 0; border: 0 }
.jaxlayout th { border-bottom: 1px solid #8888; font-weight: 600 }
.jaxlayout td.n, .jaxlayout th.n { text-align: right; white-space: nowrap }
.jaxlayout code { font-size: 12px; background: none; padding: 0; white-space: nowrap }
.jaxlayout .dim { opacity: .65 }
.jaxlayout .won { color: #00775a; font-weight: 600 }
.jaxlayout .kept, .jaxlayout .left { font-size: 15px; font-weight: 600 }
.jaxlayout .kept { color: #00775a }
.jaxlayout .left { color: #a85500 }
.jaxlayout .wrong { color: #b00020; font-weight: 600 }
.jaxlayout details { margin: 2px 0 }
.jaxlayout summary { cursor: pointer }
""".strip()
CODE = frozenset({"form", "candidate", "orders"})
"""Columns of code."""


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
        tried = [candidates(group.first) for group in groups(facts)]
        folded = [_folded(f'<span class="dim">{len(one.rows)} candidates</span>', _table(one)) for one in tried]
        found = convolutions(facts)
        parts.append(f"<b>{escape(found.title)}</b>{_table(found, {'form': folded})}")
    parts += [_folded(f"<b>{escape(section.title)}</b>", _table(section)) for section in others(facts)]
    return f'<div class="jaxlayout"><style>{STYLE}</style>{"".join(parts)}</div>'


def _table(section: Section, behind: Mapping[str, Sequence[str]] = MappingProxyType({})) -> str:
    """`behind`: by column, HTML that follows each row's cell."""
    marks = [' class="n"' if name in NUMBERS else "" for name in section.columns]
    head = "".join(f"<th{mark}>{escape(name)}</th>" for name, mark in zip(section.columns, marks, strict=True))
    body = ""
    for number, row in enumerate(section.rows):
        cells = zip(section.columns, marks, row, strict=True)
        more = {name: html[number] for name, html in behind.items()}
        filled = (f"<td{mark}>{_cell(name, cell)}{more.get(name, '')}</td>" for name, mark, cell in cells)
        body += f"<tr>{''.join(filled)}</tr>"
    return f"<table><tr>{head}</tr>{body}</table>"


def _cell(column: str, cell: Cell) -> str:
    return "<br>".join(_line(line, "code" if column in CODE else "span") for line in cell)


def _line(line: Line, tag: str) -> str:
    return (
        f'<{tag} class="{line.tone}">{escape(line.text)}</{tag}>' if line.tone or tag == "code" else escape(line.text)
    )


def _folded(summary: str, table: str) -> str:
    return f"<details><summary>{summary}</summary>{table}</details>"
