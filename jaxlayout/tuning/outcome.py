"""`Outcome`: what tuning came to, as a value that is stored and shown."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from typing import Any

from jaxlayout.graph.plan import Plan
from jaxlayout.runtime.plain_data import check_format, flag, integer, number, one_of, shown
from jaxlayout.verify.accept import Verdict

logger = logging.getLogger("jaxlayout")

FORMAT = 1
"""The number of the form that `to_json` gives, the verdict in it included; the plan has its own."""
SOURCES = ("measured", "stored", "pinned", "nearest", "heuristic", "forced", "none")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What tuning a program came to."""

    plan: Plan
    verdict: Verdict
    source: str
    """Where the plan came from: measured, stored, pinned, nearest (measured, starting from the plan of another
    shape), heuristic (not all was measured), forced (by the policy 'channels_last'), or none."""
    seconds: float = 0.0
    """Spent on tuning when the plan was made."""
    measured: int = 0
    """How many convolutions, transposes and other equations were timed for it."""
    folded: bool = False
    """Whether the plan is for a program with scales folded into its kernels."""

    @property
    def kept(self) -> bool:
        """Whether the rewritten function runs."""
        return self.verdict.kept and (self.folded or not self.plan.trivial)

    @property
    def applied(self) -> Plan:
        """What runs: the plan, or the empty one."""
        return self.plan if self.kept else Plan()

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        rest = {name: getattr(self, name) for name in ("source", "seconds", "measured", "folded")}
        return {"format": FORMAT} | rest | {"plan": self.plan.to_json(), "verdict": self.verdict.to_json()}

    @classmethod
    def from_json(cls, data: Any) -> Outcome:
        """The inverse of `to_json`; ValueError, saying why, for anything else."""
        check_format("an outcome", data, FORMAT)
        if data.keys() - {"format"} != {field.name for field in fields(cls)}:
            raise ValueError(f"not an outcome: {shown(data)}")
        return cls(
            plan=Plan.from_json(data["plan"]),
            verdict=Verdict.from_json(data["verdict"]),
            source=one_of("source", data["source"], SOURCES),
            seconds=number("seconds", data["seconds"], 1e9),
            measured=integer("measured", data["measured"], 10**9),
            folded=flag("folded", data["folded"]),
        )


def untouched(reason: str, cause: str = "untried") -> Outcome:
    """The outcome for a program that is left as it is."""
    return Outcome(plan=Plan(), verdict=Verdict(kept=False, reason=reason, cause=cause), source="none")


def postponed(name: str, late: Exception) -> Outcome:
    """The outcome of a call that had no turn to measure; the log says so."""
    logger.warning("%s is not tuned this time, and the next call tries again: %s", name, late)
    return untouched(f"not tuned this time: {late}", "failure")
