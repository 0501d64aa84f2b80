"""`Explanation`: the facts of a program, and how they are shown. What draws is imported where it is first asked for."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from jaxlayout.report.value import Facts, SiteFacts
from jaxlayout.report.words import headline, why_nothing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Site(SiteFacts):
    """One convolution and what became of it. Prints as the table of its candidates."""

    def __rich__(self) -> Any:
        from jaxlayout.report.terminal import of_site

        return of_site(self)

    def __str__(self) -> str:
        from jaxlayout.report.terminal import plain_text

        return plain_text(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation(Facts):
    """What was chosen for a function and why. Prints as a report: text in a terminal, HTML in a notebook."""

    sites: tuple[Site, ...]

    @property
    def nothing_gained(self) -> str:
        """Why the function runs as it was written, in one sentence; '' where it does not."""
        return why_nothing(self)

    def to_json(self) -> dict[str, Any]:
        """Plain data: numbers, strings, lists and dictionaries with these keys.

        - format, name.
        - kept: whether the rewritten function runs. nothing_gained: a sentence why not, or "".
        - provisional, source, tuning_s, timed: how the plan came about (see `Outcome`).
        - measured: original_ns and tuned_ns of the whole functions, ratio, spread, pairs, original_temp and tuned_temp
          in bytes, difference between outputs relative to their rms; null what was not seen. noise: outputs that
          are rounding noise, whose difference is not among these. saved_ns, break_even (calls).
        - predicted: written_ns and tuned_ns of convolutions and conversions, bound_ns, optimal, gap (a share, null if
          unknown).
        - compiler_options.
        - convolutions: path, line, caller, scope, kind, lhs, rhs, out (shapes), dtype, signature, times, written,
          chosen, and candidates: candidate, lowering, orders, written, chosen, status, median_ns, spread_ns, runs,
          error ("inf" for no number), temp_bytes, detail.
        - conversions: shape, dtype, held, wanted, held_by, wanted_by, times, ns, measured.
        - transposes: line, shape, permutation, absorbed, times.
        - barriers: name, count, lines.
        - graph: kind, label, inputs (which of these), order, site (which of convolutions), ns, times.
        """
        outcome, plan, verdict = self.outcome, self.outcome.plan, self.outcome.verdict
        seen = ("original_ns", "tuned_ns", "ratio", "spread", "pairs", "original_temp", "tuned_temp")
        difference = "inf" if verdict.difference == math.inf else verdict.difference
        return {
            "format": FORMAT,
            "name": self.name,
            "kept": outcome.kept,
            "nothing_gained": self.nothing_gained,
            "provisional": self.provisional,
            "source": outcome.source,
            "tuning_s": outcome.seconds,
            "timed": outcome.measured,
            "measured": {
                **{name: getattr(verdict, name) for name in seen},
                "difference": difference,
                "noise": list(verdict.noise),
                "saved_ns": self.saved_ns,
                "break_even": self.break_even,
            },
            "predicted": {
                "written_ns": plan.written_ns,
                "tuned_ns": plan.predicted_ns,
                "bound_ns": plan.bound_ns,
                "optimal": plan.exact,
                "gap": plan.gap if math.isfinite(plan.gap) else None,
            },
            "compiler_options": dict(plan.compiler_options),
            "convolutions": [site.to_json() for site in self.sites],
            "conversions": [_listed(move) for move in self.moves],
            "transposes": [_listed(transpose) for transpose in self.transposes],
            "barriers": [_listed(barrier) for barrier in self.barriers],
            "graph": [_listed(step) for step in self.steps],
        }

    def plot_costs(self, site: int) -> Figure:
        """The measured times of one of `sites`, lowerings by orders. Needs matplotlib, as all plots; ImportError
        without. A notebook shows the figure after `%matplotlib inline`."""
        from jaxlayout.report.plots import costs

        return costs(self.sites[site])

    def plot_graph(self) -> Figure:
        """The program as the plan has it, time downwards, one column for each branch, coloured by axis order."""
        from jaxlayout.report.plots import graph

        return graph(self)

    def plot_predicted(self) -> Figure:
        """The convolutions as written and as chosen, and the whole function predicted and measured."""
        from jaxlayout.report.plots import predicted

        return predicted(self)

    def __rich__(self) -> Any:
        from jaxlayout.report.terminal import of_explanation

        return of_explanation(self)

    def __str__(self) -> str:
        from jaxlayout.report.terminal import plain_text

        return plain_text(self)

    def __repr__(self) -> str:
        return f"<Explanation of {self.name}: {headline(self)}; {len(self.sites)} convolutions; print it for all>"

    def _repr_html_(self) -> str:
        from jaxlayout.report.html import of_explanation

        return of_explanation(self)


def _listed(value: Any) -> dict[str, Any]:
    return {name: list(held) if isinstance(held, tuple) else held for name, held in asdict(value).items()}
