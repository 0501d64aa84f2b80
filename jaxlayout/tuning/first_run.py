"""`FirstRun`: of a whole program that has what may crash in it, on this machine. Each form of it has come through by
itself; the program is a new composition."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from jaxlayout.graph.plan import Plan
from jaxlayout.graph.program import program_key
from jaxlayout.measure.contained import Proofs
from jaxlayout.measure.marker import Marker
from jaxlayout.table.measurement import Measurement, failed
from jaxlayout.tuning.proofs import needs_proof


class FirstRun:
    """What is known of it is in the table of proofs, under the program and its plan."""

    def __init__(self, jaxpr: Any, plan: Plan, proofs: Proofs):
        self._table, self._environment = proofs.table, proofs.environment
        self._program = f"program {program_key(jaxpr).function}"
        data = plan.to_json()
        chosen = [data[name] for name in ("choices", "compiler_options", "materialised_bytes")]
        self._plan = hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:16]
        self._marker = Marker.of(proofs.table.asked, proofs.environment, self._program, self._plan)
        self.awaited = True
        """Whether it has still to return for the first time."""
        self._under_way = ExitStack()
        self._start = 0

    @classmethod
    def of(cls, jaxpr: Any, plan: Plan, proofs: Callable[[], Proofs]) -> FirstRun | None:
        """The first run of a program under a plan. None where it has returned here before, or nothing of the plan may
        crash; then nobody asks for the proofs."""
        if not needs_proof(plan):
            return None
        first = cls(jaxpr, plan, proofs())
        known = first._known()
        return None if known is not None and known.status == "ok" else first

    def died(self) -> str:
        """What says that it took a process down; '' where nothing does."""
        known = self._known()
        if known is None and (left := self._marker.left()):
            known = failed("failed", f"{left}: it is not tried again")
            self._record(known)
            self._marker.clear()
        return "" if known is None else known.detail

    def begin(self) -> None:
        """It is going to run."""
        self._under_way.enter_context(self._marker.on("run for the first time"))
        self._start = time.perf_counter_ns()

    def returned(self) -> None:
        """It has given its results."""
        ns = float(max(1, time.perf_counter_ns() - self._start))
        self._record(replace(failed("ok", ""), median_ns=ns, runs=1))
        self.awaited = False

    def over(self) -> None:
        """The process is still there."""
        self._under_way.close()

    def _known(self) -> Measurement | None:
        return self._table.measurements(self._environment, self._program).get(self._plan)

    def _record(self, found: Measurement) -> None:
        self._table.record(self._environment, self._program, self._plan, found)
