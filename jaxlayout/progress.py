"""A progress bar on a terminal, nothing elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


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
    """A bar on standard error, gone when done, if that is a terminal."""
    if not sys.stderr.isatty():
        yield Silent()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"jaxlayout {name}", total=None)

        class Shown:
            def stage(self, text: str, steps: int | None = None) -> None:
                bar.reset(task, description=f"jaxlayout {name}: {text}", total=steps)

            def step(self) -> None:
                bar.advance(task)

        yield Shown()
