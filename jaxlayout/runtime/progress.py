"""A progress bar on a terminal, nothing elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol


class Progress(Protocol):
    """What the line of stages tells while it works."""

    def stage(self, text: str, steps: int | None = None) -> None:
        """A stage of so many steps begins."""

    def step(self) -> None:
        """One of them is done."""


class Silent:
    """Tells nothing."""

    def stage(self, text: str, steps: int | None = None) -> None: ...

    def step(self) -> None: ...


@contextmanager
def progress_bar(name: str) -> Iterator[Progress]:
    """A bar on standard error from the first stage on, gone when done, if that is a terminal."""
    if not _on_terminal(sys.stderr):
        yield Silent()
        return
    with ExitStack() as stack:
        yield _Shown(name, stack)


def _on_terminal(stream: Any) -> bool:
    """Whether a stream is a terminal. Programs put all kinds of things in place of standard error, or close it."""
    try:
        return stream.isatty()
    except (AttributeError, ValueError):
        return False


class _Shown:
    def __init__(self, name: str, stack: ExitStack):
        self._name, self._stack = name, stack
        self._bar: Any = None
        self._task: Any = None

    def stage(self, text: str, steps: int | None = None) -> None:
        if self._bar is None:
            self._bar = self._stack.enter_context(_bar())
            self._task = self._bar.add_task("")
        self._bar.reset(self._task, description=f"jaxlayout {self._name}: {text}", total=steps)

    def step(self) -> None:
        self._bar.advance(self._task)


def _bar() -> Any:
    from rich.console import Console  # slow to import, and seldom needed
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=Console(stderr=True), transient=True)
