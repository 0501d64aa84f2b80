"""`Budget`: the seconds of measuring that a process has spent."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from jaxlayout.runtime.process import OfProcess


class Budget:
    """Threads may spend at the same time: time during which several do counts once, and all of it counts."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._before = self._since = 0.0
        self._active: set[Spender] = set()

    def spent(self) -> float:
        """So far, the measuring under way included."""
        with self._lock:
            return self._spent()

    def spender(self) -> Spender:
        """Somebody who may spend of it."""
        return Spender(self)

    def _spent(self) -> float:
        return self._before + (self._clock() - self._since if self._active else 0.0)

    def _note(self, spender: Spender, spending: int = 0, waiting: int = 0) -> None:
        """Somebody begins to spend or to wait, or ends it."""
        with self._lock:
            self._before, self._since = self._spent(), self._clock()
            spender.spends += spending
            spender.waits += waiting
            if spender.spends and not spender.waits:
                self._active.add(spender)
            else:
                self._active.discard(spender)


class Spender:
    """One who measures, perhaps with threads of his own."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self.spends = self.waits = 0

    @contextmanager
    def spending(self) -> Iterator[None]:
        """Counts the time of a `with` block."""
        self._budget._note(self, spending=1)
        try:
            yield
        finally:
            self._budget._note(self, spending=-1)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """But for this time: one of his threads waits for somebody else, and so, sooner or later, do the others."""
        self._budget._note(self, waiting=1)
        try:
            yield
        finally:
            self._budget._note(self, waiting=-1)


process_budget = OfProcess(Budget)
