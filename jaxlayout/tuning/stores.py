"""Where tuning keeps things: the process's tables, the proofs beside them, and the plans of one program."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from jaxlayout.convs.candidates import Candidate
from jaxlayout.graph.program import ProgramKey
from jaxlayout.measure.compiled import CompilerOptions, with_options
from jaxlayout.measure.contained import Proofs, never
from jaxlayout.runtime.threads import default_device
from jaxlayout.table.table import CostTable
from jaxlayout.tuning.options import Options
from jaxlayout.tuning.outcome import Outcome

logger = logging.getLogger("jaxlayout")


@dataclass(frozen=True, slots=True)
class Stores:
    """What a process holds: its tables, and what is for no table."""

    tables: dict[str | None, CostTable] = field(default_factory=dict)
    """By the path that was asked for: one each."""
    provisional: dict[tuple[Any, ...], Outcome] = field(default_factory=dict)
    """What was decided without all measurements, since the budget was spent: as good as it gets in this process."""

    def table(self, path: str | None, file: str | None = None) -> CostTable:
        """The table for a path, which is in this file where that is another one."""
        return self.tables.setdefault(path, CostTable(file or path))


process_stores = Stores()


def open_table(path: str | None) -> CostTable:
    """The process's one table for a path."""
    return process_stores.table(path)


def proofs_of(
    options: Options, compiler_options: CompilerOptions, extra: Mapping[str, str], stop: threading.Event | None = None
) -> Proofs:
    """Who says what may run of what may crash: by a file beside the table's, which stays on this machine."""
    path = open_table(options.table).asked if options.policy == "auto" else ":memory:"
    table = process_stores.table(f"proofs {path}", ":memory:" if str(path) == ":memory:" else f"{path}.proofs")
    return Proofs.of(
        table, default_device(), with_options(compiler_options, extra), options.relax, stop.is_set if stop else never
    )


@dataclass(frozen=True, slots=True)
class PlanStore:
    """What was decided of one program, under one environment and some options."""

    table: CostTable
    environment: str
    key: ProgramKey
    options: Options

    def load(self, check: Callable[[Outcome], None]) -> Outcome | None:
        """What was decided before, if anything. `check`: raises ValueError for an outcome that is not of this very
        program, or cannot be had here."""
        text = self.table.load_plan(self.environment, self.key.function)
        found = None if text is None else self._parsed(text, check)
        return process_stores.provisional.get(self.place) if found is None else replace(found, source="stored")

    def store(self, outcome: Outcome) -> None:
        """Keep it, in this process alone where not all of it was measured."""
        if outcome.source == "heuristic":
            process_stores.provisional[self.place] = outcome
            return
        sizes, payload = json.dumps(self.key.sizes), json.dumps(outcome.to_json())
        self.table.store_plan(self.environment, self.key.function, self.key.skeleton, sizes, payload)

    def nearest(self) -> frozenset[Candidate]:
        """The candidates that the plan of the same program at the nearest sizes chose; none if there is no such."""

        def distance(sizes: Sequence[int]) -> float:
            ratios = np.log(np.maximum(sizes, 1)) - np.log(np.maximum(self.key.sizes, 1))
            return float(np.abs(ratios).sum())

        found = [
            (distance(json.loads(sizes)), outcome)
            for function, sizes, payload in self.table.plans_like(self.environment, self.key.skeleton)
            if function != self.key.function  # else it has been refused: no hint either
            if len(json.loads(sizes)) == len(self.key.sizes) and (outcome := self._parsed(payload)) is not None
        ]
        if not found:
            return frozenset()
        choices = min(found, key=lambda pair: pair[0])[1].plan.choices
        return frozenset(mode.candidate for mode in choices.values() if mode.candidate is not None)

    @property
    def place(self) -> tuple[Any, ...]:
        """What tells it from all others in this process."""
        return self.table.path, self.environment, self.key.function, self.options

    def _parsed(self, text: str, check: Callable[[Outcome], None] = lambda outcome: None) -> Outcome | None:
        """What a stored text says, if it makes sense."""
        try:
            outcome = Outcome.from_json(json.loads(text))
            check(outcome)
            return outcome
        except (ValueError, RecursionError) as error:
            logger.warning("a stored plan cannot be used and is made anew: %.500s", error)
            return None
