"""What text, HTML and pictures say alike."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from jaxlayout.report.value import Facts, SiteFacts, Tried, short_line

SOURCES = {
    "measured": "measured now",
    "stored": "stored, from an earlier call or process",
    "nearest": "measured now, starting from the plan of another shape",
    "pinned": "pinned: given by you, neither measured nor compared",
    "forced": "forced by the policy 'channels_last', neither measured nor compared: it may be slower",
    "heuristic": "provisional: not all was measured",
    "none": "none",
}


def ms(ns: float | None) -> str:
    """Milliseconds, two or three digits of them."""
    if ns is None:
        return "–"
    value = ns / 1e6
    digits = next((digits for digits, least in enumerate((100, 10, 0.1, 0.01)) if value >= least), 4)
    return f"{value:.{digits}f}"


def size(count: float | None) -> str:
    """Bytes in the unit that fits."""
    if count is None:
        return "–"
    for unit in ("bytes", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" or count >= 10 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def headline(facts: Facts) -> str:
    """What became of the function."""
    word = "kept" if facts.outcome.kept else "left as it is"
    return f"{word}: {facts.outcome.verdict.reason}{', provisional' if facts.provisional else ''}"


def wrong_as_written(facts: Facts) -> str:
    """Which convolutions XLA computes wrongly as they are written; '' where none was found to be."""
    wrong = [group for group in groups(facts) if group.first.wrong]
    if not wrong:
        return ""
    each = "; ".join(f"#{group.numbers} at {group.places[0]}: {group.first.wrong}" for group in wrong)
    return (
        f"XLA is wrong here: as written, these convolutions do not give what a float64 reference does ({each}). "
        "Where the function is left as it is, so are its numbers."
    )


def why_nothing(facts: Facts) -> str:
    """Why the function runs as it was written, in one sentence; '' where it does not."""
    outcome, verdict = facts.outcome, facts.outcome.verdict
    if outcome.kept:
        return ""
    if not facts.sites:
        barred = any(barrier.name == "conv_general_dilated" for barrier in facts.barriers)
        why = "its convolutions have symbolic shapes" if barred else "there is no convolution in it"
        return f"Nothing could be gained: {why}."
    if outcome.source == "none":
        return f"Nothing was tried: {verdict.reason}."
    because = {
        "time": f"the rewritten function was not faster as a whole ({verdict.reason})",
        "numbers": f"the numbers of the rewritten function differ too much ({verdict.reason})",
        "memory": f"the rewritten function needs too much memory ({verdict.reason})",
        "collectives": f"the devices of the rewritten function exchange more ({verdict.reason})",
        "failure": f"the rewritten function does not run ({verdict.reason})",
    }
    if verdict.cause in because:
        return f"Nothing was gained: {because[verdict.cause]}."
    if outcome.plan.trivial:
        if facts.provisional:
            return "Nothing was found to be gained before the time for measuring ran out; a later process goes on."
        return "Nothing could be gained: the forms and orders as written are the fastest measured, conversions counted."
    return f"Nothing was gained: {verdict.reason}."


def summary(facts: Facts) -> list[tuple[str, str]]:
    """The facts about the whole, each with its name."""
    outcome, plan, verdict = facts.outcome, facts.outcome.plan, facts.outcome.verdict
    rows = []
    if verdict.original_ns is not None and verdict.tuned_ns is not None:
        pairs = (
            "" if verdict.ratio is None else f", {verdict.ratio:.2f}x ±{verdict.spread or 0:.2f}, {verdict.pairs} pairs"
        )
        rows.append(
            ("measured", f"{ms(verdict.original_ns)} → {ms(verdict.tuned_ns)} ms for the whole function{pairs}")
        )
    if plan.written_ns and outcome.source != "forced":
        gap = "optimal" if plan.exact else f"within {plan.gap:.1%} of optimal" if plan.bound_ns else "no bound known"
        rows.append(
            (
                "predicted",
                f"{ms(plan.written_ns)} → {ms(plan.predicted_ns)} ms for convolutions and conversions, {gap} under the "
                "measured costs",
            )
        )
    if verdict.original_temp is not None and verdict.tuned_temp is not None:
        rows.append(("memory", f"{size(verdict.original_temp)} → {size(verdict.tuned_temp)} of temporaries"))
    if verdict.difference is not None:
        outputs = listed(map(str, verdict.noise))
        noise = f", but for outputs {outputs}: rounding arguments moves these as much" if verdict.noise else ""
        rows.append(("numbers", f"results differ by {verdict.difference:.1g} of their rms at most{noise}"))
    if outcome.source != "none":
        timed = f"; {outcome.measured} convolutions and transposes timed" if outcome.measured else ""
        spent = f", {outcome.seconds:.1f} s of tuning" if outcome.seconds else ""
        rows.append(("plan", f"{SOURCES.get(outcome.source, outcome.source)}{timed}{spent}"))
    if outcome.seconds:
        rows.append(("won back", _won_back(facts)))
    if plan.compiler_options:
        options = ", ".join(f"{name}={value!r}" for name, value in plan.compiler_options.items())
        rows.append(("compiler options", options))
    if facts.transposes or facts.moves:
        own = sum(not transpose.absorbed for transpose in facts.transposes)
        yours = f"{own} of your {len(facts.transposes)} stay, " if facts.transposes else ""
        rows.append(("transposes", f"{yours}{len(facts.moves)} put in"))
    return rows


def _won_back(facts: Facts) -> str:
    if not facts.outcome.kept:
        return "never: nothing is saved"
    if facts.saved_ns is None:
        return "not known: the whole functions were not timed"
    if facts.break_even is None:
        return "never: nothing is saved"
    return f"the tuning, after {facts.break_even} calls that each save {ms(facts.saved_ns)} ms"


@dataclass(frozen=True, slots=True)
class Group:
    """Equal convolutions that have the same form, the first of which stands for all."""

    sites: tuple[tuple[int, SiteFacts], ...]

    @property
    def first(self) -> SiteFacts:
        """One of them."""
        return self.sites[0][1]

    @property
    def numbers(self) -> str:
        """Which of the explanation's sites: "0, 3-5"."""
        runs = groupby(enumerate(number for number, _ in self.sites), lambda pair: pair[1] - pair[0])
        ends = [(found[0][1], found[-1][1]) for found in (list(run) for _, run in runs)]
        return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in ends)

    @property
    def runs(self) -> float:
        """How often they run, all together, each time the function does."""
        return sum(site.times for _, site in self.sites)

    @property
    def places(self) -> list[str]:
        """Where they stand, each place once."""
        return list(dict.fromkeys(where(site) for _, site in self.sites))


def groups(facts: Facts) -> list[Group]:
    """The convolutions, equal ones together."""
    found: dict[tuple, list[tuple[int, SiteFacts]]] = {}
    for number, site in enumerate(facts.sites):
        key = site.signature, site.kind, str(site.written.candidate), str(site.chosen.candidate)
        found.setdefault(key, []).append((number, site))
    return [Group(tuple(sites)) for sites in found.values()]


def where(site: SiteFacts) -> str:
    """The user's line, and the function that wrote the convolution: "model.py:12 Conv.__call__"."""
    function = site.line.rpartition(" (")[2].rstrip(")")
    return f"{short_line(site.caller).partition(' (')[0]} {function}"


def scope(site: SiteFacts) -> str:
    """The innermost name scopes that are the user's, without what differentiation puts around them."""
    names = (re.sub(r"\b[a-z]+\(|\)", "", name) for name in site.scope.split("/"))
    return "/".join([name for name in names if name][-3:])


def shapes(site: SiteFacts) -> str:
    """Its arrays: "8x56x56x64 * 3x3x64x64 → 8x56x56x64"."""
    lhs, rhs, out = ("x".join(map(str, shape)) for shape in (site.lhs, site.rhs, site.out))
    return f"{lhs} * {rhs} → {out}"


def times(count: float) -> str:
    """How often something runs: "4", "about 0.5"."""
    return f"{count:.0f}" if count == round(count) else f"{count:.2g}"


def error_of(one: Tried) -> str:
    """Its error against float64, relative to the result's rms."""
    error = one.measurement.error if one.measurement else None
    return "–" if error is None else f"{error:.1e}"


def measured_cells(one: Tried) -> tuple[str, ...]:
    """Median and spread in ms, runs, error, memory, what became of it."""
    found = one.measurement
    if found is None:
        return ("–", "–", "–", "–", "–", "not measured")
    spread = "–" if found.spread_ns is None else ms(found.spread_ns)
    runs = str(found.runs) if found.runs else "–"
    return (ms(found.median_ns), spread, runs, error_of(one), size(found.temp_bytes), found.status)


def listed(names: Iterable[str]) -> str:
    """The first few."""
    every = list(names)
    return ", ".join(every[:3]) + (f" and {len(every) - 3} more" if len(every) > 3 else "")
