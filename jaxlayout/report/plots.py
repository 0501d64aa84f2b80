"""An explanation in pictures. Figures are made without pyplot: nothing global is touched, no window is opened."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

try:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm, to_rgb
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import PathPatch, Rectangle
    from matplotlib.path import Path
except ImportError as error:
    raise ImportError("plots need matplotlib: pip install 'jaxlayout[plots]'") from error

from jaxlayout.report.value import Facts, SiteFacts, Step
from jaxlayout.report.words import Group, groups, headline, ms, shapes, times, where, why_nothing

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
GREY, INK, PALE = "#8A8A8A", "#222222", "#C9CED6"
ORDER_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILLION)


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=150, facecolor="white")


# The cost of one convolution


def costs(site: SiteFacts) -> Figure:
    """Lowerings by orders, in ms."""
    cells = {(one.candidate.lowering, str(one.candidate.dims)): one for one in site.tried}
    best: dict[str, float] = {}
    for (lowering, _), one in cells.items():
        best[lowering] = min(best.get(lowering, math.inf), _ns(one) or math.inf)
    rows = sorted(best, key=lambda name: best[name])
    every = Counter(dims for _, dims in cells)
    columns = sorted(every, key=lambda dims: min(_ns(one) or math.inf for (_, d), one in cells.items() if d == dims))
    known = [ns for one in cells.values() if (ns := _ns(one))]
    least, most = (min(known) / 1e6, max(max(known), 1.01 * min(known)) / 1e6) if known else (1.0, 10.0)
    norm = LogNorm(least, most)
    longest = max(map(len, rows))
    wide, left = 1.15, 0.35 + 0.085 * longest
    figure = _figure(left + wide * len(columns) + 1.2, 1.45 + 0.42 * len(rows))
    width, height = figure.get_size_inches()
    axes = figure.add_axes((left / width, 0.25 / height, wide * len(columns) / width, 0.42 * len(rows) / height))
    colours = colormaps["cividis_r"]
    for y, lowering in enumerate(rows):
        for x, dims in enumerate(columns):
            one = cells.get((lowering, dims))
            if one is None:
                continue
            ns = _ns(one)
            shade = colours(norm(ns / 1e6)) if ns else "#F2F2F2"
            axes.add_patch(Rectangle((x, y), 1, 1, facecolor=shade, edgecolor="white", linewidth=1.5))
            ink = "white" if ns and _is_dark(shade) else INK
            status = "not measured" if one.measurement is None else one.measurement.status
            text = ms(ns) if ns else status
            axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=9, color=ink)
    for one, colour, style in (
        *((one, INK, (0, (2, 1.5))) for one in site.tried if one.written and not one.chosen),
        *((one, VERMILLION, "-") for one in site.tried if one.chosen),
    ):
        x, y = columns.index(str(one.candidate.dims)), rows.index(one.candidate.lowering)
        box = Rectangle((x, y), 1, 1, fill=False, edgecolor=colour, linewidth=2.4, linestyle=style, zorder=3)
        box.set_clip_on(False)
        axes.add_patch(box)
    axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0))
    names = [dims.replace("->", "\n→ ").replace(",", ", ") for dims in columns]
    axes.set_xticks([x + 0.5 for x in range(len(columns))], names, fontsize=8)
    axes.set_yticks([y + 0.5 for y in range(len(rows))], rows, fontsize=9)
    axes.tick_params(length=0, top=False, bottom=False, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    figure.text(0.15 / width, 1 - 0.2 / height, f"{site.kind}   {where(site)}", fontsize=10, weight="bold", va="center")
    figure.text(0.15 / width, 1 - 0.42 / height, f"{shapes(site)} {site.dtype}", fontsize=8, color=GREY, va="center")
    marks = [Line2D([], [], color=VERMILLION, linewidth=2.4, label="chosen")]
    if not site.written.chosen:
        marks.append(Line2D([], [], color=INK, linewidth=2.4, linestyle=(0, (2, 1.5)), label="written"))
    figure.legend(handles=marks, loc="upper left", bbox_to_anchor=(0.07 / width, 1 - 0.53 / height), ncols=2,
                  fontsize=8, frameon=False, borderpad=0)  # fmt: skip
    if known:
        bar = figure.add_axes((1 - 1.0 / width, 0.25 / height, 0.13 / width, 0.42 * len(rows) / height))
        scale = figure.colorbar(ScalarMappable(norm, colours), cax=bar)
        ticks = [least, math.sqrt(least * most), most] if len(rows) > 2 else [least, most]
        scale.set_ticks(ticks, labels=[ms(1e6 * tick) for tick in ticks], minor=False)
        scale.minorticks_off()
        scale.ax.tick_params(labelsize=8)
        scale.ax.set_title("ms", fontsize=8)
        scale.outline.set_visible(False)  # type: ignore[operator]
    return figure


def _ns(one: Any) -> float | None:
    return one.measurement.median_ns if one.measurement else None


def _is_dark(colour: Any) -> bool:
    red, green, blue = to_rgb(colour)
    return 0.3 * red + 0.6 * green + 0.1 * blue < 0.5


# Predicted and measured

MOST_BARS = 30


def predicted(facts: Facts) -> Figure:
    """Milliseconds each time the function runs: the whole above, convolutions below."""
    verdict, plan = facts.outcome.verdict, facts.outcome.plan
    whole = [
        ("as written", plan.written_ns or None, verdict.original_ns),
        ("as planned", plan.predicted_ns or None, verdict.tuned_ns),
    ]
    found = sorted(
        groups(facts), key=lambda group: -group.runs * max(_ns(group.first.written) or 0, _ns(group.first.chosen) or 0)
    )
    few = len(found) <= MOST_BARS + 1
    shown, others = (found, []) if few else (found[:MOST_BARS], found[MOST_BARS:])
    bars = [(f"{group.first.kind}  {_arrays(group)}", *_both(group)) for group in shown]
    if others:
        sums = [sum(pair) for pair in zip(*map(_both, others), strict=True)]
        bars.append((f"{len(others)} others", sums[0], sums[1]))
    tall = 0.34
    below = max(1, len(bars)) * tall
    height = 0.85 + 0.95 + 0.75 + below + 0.5
    figure = _figure(9.5, height)
    figure.text(
        0.15 / 9.5,
        1 - 0.25 / height,
        f"{facts.name}: {_cut(headline(facts), 80)}",
        fontsize=11,
        weight="bold",
        va="center",
    )
    box = (3.3 / 9.5, 5.2 / 9.5)
    top = figure.add_axes((box[0], (height - 0.75 - 0.95) / height, box[1], 0.95 / height))
    _paired(
        top,
        [(name, a or 0.0, b or 0.0) for name, a, b in whole],
        (SKY, BLUE),
        ("predicted: convolutions and conversions", "measured: the whole function"),
        known=[(a is not None, b is not None) for _, a, b in whole],
    )
    bottom = figure.add_axes((box[0], 0.5 / height, box[1], below / height))
    _paired(bottom, bars, (PALE, VERMILLION), ("as written", "as chosen"))
    for axes, name in ((top, "The whole"), (bottom, "Convolutions")):
        axes.set_title(name, fontsize=10, loc="left", x=-0.6, weight="bold")
    bottom.set_xlabel("ms each time the function runs", fontsize=9)
    return figure


def _arrays(group: Group) -> str:
    shape = "x".join(map(str, group.first.out))
    return f"{shape}  ({times(group.runs)}x)" if group.runs != 1 else shape


def _both(group: Group) -> tuple[float, float]:
    written, chosen = group.first.written, group.first.chosen
    return group.runs * (_ns(written) or 0.0), group.runs * (_ns(chosen) or 0.0)


def _paired(
    axes: Any,
    rows: Sequence[tuple[str, float, float]],
    colours: tuple[str, str],
    names: tuple[str, str],
    known: Sequence[tuple[bool, bool]] | None = None,
) -> None:
    """Two bars for each row, with their numbers."""
    most = max((max(a, b) for _, a, b in rows), default=0.0) / 1e6 or 1.0
    for y, (_, *both) in enumerate(rows):
        for half, (ns, colour) in enumerate(zip(both, colours, strict=True)):
            seen = known[y][half] if known else ns > 0
            at = y + 0.2 * (2 * half - 1)
            axes.barh(at, ns / 1e6, 0.36, color=colour, label=names[half] if y == 0 else None)
            text = ms(ns) if seen else "not known"
            axes.text(ns / 1e6 + 0.01 * most, at, text, va="center", fontsize=7, color=INK if seen else GREY)
    axes.set(ylim=(max(1, len(rows)) - 0.5, -0.5), xlim=(0, 1.12 * most))
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", color="#E6E6E6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    if rows:
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, fontsize=8, frameon=False, borderaxespad=0.1)


# The program under its plan

MOST_LANES = 7
"""Columns side by side; beyond, the longest branch is cut, and what reads it says so."""
MOST_ROWS = 44
"""Rows below each other before the drawing goes on beside; of the longest programs more."""
MOST_STRIPS = 3
ROW, LANE, TOP = 0.225, 0.2, 1.25
"""Inches: between rows, between columns, above the first row."""
TEXT = {"label": 0.0, "shape": 2.15, "lowering": 3.35, "ms": 5.35}
"""Where the columns of text begin; that of times ends there."""


@dataclass(slots=True)
class Lanes:
    """In which column each step stands, and from which steps it reads by number, since their branch is cut."""

    lane: list[int] = field(default_factory=list)
    cut: dict[int, list[int]] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many columns there are."""
        return max(self.lane, default=0) + 1


def lanes(steps: Sequence[Step], most: int = MOST_LANES) -> Lanes:
    """A column for each branch: a step stands below one that it reads and is the last to, else in a free column."""
    last = {i: max((j for j, step in enumerate(steps) if i in step.inputs), default=i) for i in range(len(steps))}
    found, held = Lanes(), {}  # held: the step whose branch runs in a column
    for row, step in enumerate(steps):
        gone = [i for i in step.inputs if i not in held.values()]
        if gone:
            found.cut[row] = gone
        ending = [lane for lane, i in held.items() if last[i] <= row]
        mine = [lane for lane in ending if held[lane] in step.inputs]
        for lane in ending:
            del held[lane]
        free = [lane for lane in range(most) if lane not in held]
        if not free:  # the branch that is read last waits the longest
            lane = max(held, key=lambda lane: last[held[lane]])
            del held[lane]
            free = [lane]
        lane = min(mine or free)
        found.lane.append(lane)
        if last[row] > row:
            held[lane] = row
    return found


def graph(facts: Facts) -> Figure:
    """One row for each step, one column for each branch, with what each step is and takes."""
    steps = facts.steps
    placed = lanes(steps)
    strips = min(MOST_STRIPS, max(1, math.ceil(len(steps) / MOST_ROWS)))
    per = max(1, math.ceil(len(steps) / strips))
    wide = LANE * (placed.count + 1) + TEXT["ms"] + 0.55
    title = f"{facts.name}: {_cut(headline(facts), 90)}"
    width, height = max(0.4 + 0.1 * len(title), wide * strips), TOP + ROW * (per + 0.2)
    figure = _figure(width, height)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    colours = _order_colours(steps)
    pen = _Pen(axes, steps, placed, per, wide, colours, facts)
    pen.edges()
    for row in range(len(steps)):
        pen.step(row)
    axes.text(0.2, 0.22, title, fontsize=11, weight="bold", va="center")
    for strip in range(strips if facts.sites else 0):
        pen.heading(strip)
    _legend(figure, steps, colours, facts, width, height)
    if not steps:
        axes.text(0.2, 1.1, why_nothing(facts) or "Nothing to draw.", fontsize=9)
    return figure


def _order_colours(steps: Sequence[Step]) -> dict[str, str]:
    """The orders of arrays with spatial axes, the commonest first; all others are grey."""
    counts = Counter(step.order for step in steps if step.kind in ("convolution", "conversion"))
    names = [name for name, _ in counts.most_common(len(ORDER_COLOURS))]
    return dict(zip(names, ORDER_COLOURS, strict=False))


MARKS = {
    "argument": ("v", 5.5),
    "convolution": ("o", 7.5),
    "conversion": ("D", 6.5),
    "transpose": ("D", 6.5),
    "equation": ("s", 5.5),
    "barrier": ("X", 7.0),
    "join": ("o", 3.5),
    "result": ("^", 5.5),
}
NAMES = {
    "conversion": "conversion put in",
    "transpose": "your transpose",
    "equation": "other work",
    "join": "branches meet",
}


@dataclass(slots=True)
class _Pen:
    axes: Any
    steps: Sequence[Step]
    placed: Lanes
    per: int
    wide: float
    colours: dict[str, str]
    facts: Facts

    def x(self, row: int, lane: float) -> float:
        return 0.3 + self.wide * (row // self.per) + LANE * lane

    def y(self, row: float, strip: int) -> float:
        return TOP + ROW * (row - strip * self.per)

    def colour(self, step: Step) -> str:
        return self.colours.get(step.order, GREY)

    def edges(self) -> None:
        """From each step straight down its column, and over to the reader in the last row before it."""
        drawn = set()
        for reader, step in enumerate(self.steps):
            for source in step.inputs:
                if source in self.placed.cut.get(reader, ()):
                    continue
                lane, end = self.placed.lane[source], self.placed.lane[reader]
                for row in range(source, reader):
                    to = end if row + 1 == reader else lane
                    if (source, row, to) not in drawn:
                        drawn.add((source, row, to))
                        self.segment(row, lane, to, self.colour(self.steps[source]))

    def segment(self, row: int, lane: int, to: int, colour: str) -> None:
        strip, next_strip = row // self.per, (row + 1) // self.per
        if strip == next_strip:
            self.curve(row, strip, row, lane, row + 1, to, colour)
        else:  # on beside
            self.curve(row, strip, row, lane, row + 0.75, lane, colour)
            self.curve(row + 1, next_strip, row + 0.25, lane, row + 1, to, colour)

    def curve(self, row: int, strip: int, top: float, lane: int, bottom: float, to: int, colour: str) -> None:
        (x0, y0), (x1, y1) = (self.x(row, lane), self.y(top, strip)), (self.x(row, to), self.y(bottom, strip))
        middle = (y0 + y1) / 2
        codes = [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4]
        path = Path([(x0, y0), (x0, middle), (x1, middle), (x1, y1)], codes)
        self.axes.add_patch(PathPatch(path, fill=False, edgecolor=colour, linewidth=1.8, zorder=1, capstyle="round"))

    def step(self, row: int) -> None:
        step, colour = self.steps[row], self.colour(self.steps[row])
        x, y = self.x(row, self.placed.lane[row]), self.y(row, row // self.per)
        site = None if step.site is None else self.facts.sites[step.site]
        marker, size = MARKS[step.kind]
        hollow = step.kind == "transpose" or (site is not None and site.written.chosen)
        face = "white" if hollow else GREY if step.kind == "barrier" else colour
        rim = INK if step.kind in ("conversion", "transpose") else GREY if step.kind == "barrier" else colour
        self.axes.plot([x], [y], marker, markersize=size, markerfacecolor=face, markeredgecolor=rim,
                       markeredgewidth=1.3 if hollow or rim == INK else 0.8, zorder=2, gid=step.kind)  # fmt: skip
        self.words(step, site, row, y)

    def named(self, row: int) -> str:
        """A step by the number of its convolution; another by those of what it is made of."""
        step = self.steps[row]
        if step.site is not None or not step.inputs:
            return step.label if step.site is None else f"#{step.site}"
        return (
            self.named(max(step.inputs))
            if step.kind == "conversion"
            else f"{step.label} {self.named(max(step.inputs))}"
        )

    def heading(self, strip: int) -> None:
        left, y = self.x(strip * self.per, self.placed.count) + 0.05, self.y(-1.1, 0)
        for column, name in (("label", "#  step"), ("shape", "out"), ("lowering", "form"), ("ms", "ms")):
            how = "right" if column == "ms" else "left"
            self.axes.text(left + TEXT[column], y, name, fontsize=7.5, va="center", ha=how, color=GREY, style="italic")

    def words(self, step: Step, site: SiteFacts | None, row: int, y: float) -> None:
        left = self.x(row, self.placed.count) + 0.05
        label = step.label if site is None else f"{step.site}  {step.label}"
        if row in self.placed.cut:
            read = ", ".join(dict.fromkeys(map(self.named, self.placed.cut[row])))
            label = f"{_cut(label, 33 - len(read))} ← {read}"
        if step.times != 1:
            label += f"  ×{times(step.times)}"

        def write(text: str, column: str, colour: str = INK, **how: Any) -> None:
            self.axes.text(left + TEXT[column], y, text, fontsize=7.5, va="center", color=colour, zorder=3, **how)

        loud = step.kind in ("conversion", "transpose")
        write(_cut(label, 62 if site is None else 36), "label", INK if site is not None or loud else GREY,
              weight="bold" if loud else "normal")  # fmt: skip
        if site is not None:
            write("x".join(map(str, site.out)), "shape", GREY)
            write(_cut(site.chosen.candidate.lowering, 22), "lowering", GREY if site.written.chosen else INK,
                  weight="normal" if site.written.chosen else "bold")  # fmt: skip
            before, after = _ns(site.written), _ns(site.chosen)
            text = ms(after) if site.written.chosen else f"{ms(before)} → {ms(after)}"
            write(text, "ms", INK, ha="right")
        elif step.ns:
            write(ms(step.ns), "ms", INK, ha="right")


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _legend(
    figure: Figure, steps: Sequence[Step], colours: dict[str, str], facts: Facts, width: float, height: float
) -> None:
    used = {step.kind for step in steps}
    handles = [Line2D([], [], color=colour, linewidth=3, label=name) for name, colour in colours.items()]
    if any(step.site is not None and not facts.sites[step.site].written.chosen for step in steps):
        handles.append(_mark("convolution", GREY, "form or order changed"))
    if any(step.site is not None and facts.sites[step.site].written.chosen for step in steps):
        handles.append(_mark("convolution", "white", "as written"))
    for kind in ("conversion", "transpose", "equation", "barrier", "join"):
        if kind in used:
            handles.append(_mark(kind, "white" if kind == "transpose" else GREY, NAMES.get(kind, kind)))
    if handles:
        figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.1 / width, 1 - 0.36 / height), fontsize=7.5,
                      ncols=math.ceil(len(handles) / (1 if width > 9 else 2)), frameon=False, columnspacing=1.4,
                      handletextpad=0.5, borderpad=0.2)  # fmt: skip


def _mark(kind: str, face: str, name: str) -> Line2D:
    marker, size = MARKS[kind]
    rim = INK if kind in ("conversion", "transpose") else GREY
    return Line2D(
        [], [], linestyle="", marker=marker, markersize=size, markerfacecolor=face, markeredgecolor=rim, label=name
    )
