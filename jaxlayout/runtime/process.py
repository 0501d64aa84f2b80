"""`OfProcess`: what each process has one of."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class OfProcess(Generic[Value]):
    """A value that a fork of this process makes anew: it has none of its parent's threads, locks and children."""

    def __init__(self, make: Callable[[], Value]):
        self.value = make()
        self._make, self._of_parents = make, []
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._begin_anew)

    def _begin_anew(self) -> None:
        self._of_parents.append(self.value)  # not ours to end, as it would be once nobody holds it
        self.value = self._make()
