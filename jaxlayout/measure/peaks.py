"""`Peaks`: what a device does at most, and so the roofline: the time that no candidate can go below."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxlayout.runtime.timing import Run, samples
from jaxlayout.table.measurement import Measurement

KEY = "peaks"
"""That of their records in the table."""
HEADROOM = 1.05
"""How much higher than the best ever seen the peaks are taken to be."""
LONG_NS = 1_000_000
"""Sizes double until one run takes this long: by then what a call costs in itself does not matter."""
SECONDS = 0.02
"""Spent on each of them."""


@dataclass(slots=True)
class Peaks:
    """The most multiply-adds in float32, by a matrix product, and bytes read and written, by a pass in place over what
    may well fit into a cache, that a nanosecond has seen (Williams, Waterman, Patterson 2009, "Roofline").

    Where something else runs beside the first look they come out low. So they are looked at again beside whatever is
    held against them, and the best ever seen counts: what else runs only takes away.
    """

    device: Any
    compiler_options: Mapping[str, Any] | None = None
    records: Mapping[str, Measurement] = field(default_factory=dict)
    """'macs' and 'bytes': the time of a million, in the best run."""
    keep: Callable[[dict[str, Measurement]], None] = lambda found: None
    """Told of better records."""
    _best: list[tuple[str, int, Run]] = field(default_factory=list)

    def least_ns(self, macs: int, nbytes: int) -> float:
        """The time that so much work takes at least; none where nothing is known."""
        work = {"macs": macs, "bytes": nbytes}
        known = {unit: found.median_ns or 0.0 for unit, found in self.records.items()}
        return max(n / 1e6 * known.get(unit, 0.0) / HEADROOM for unit, n in work.items())

    def look(self) -> None:
        """Time both once more; the first time, find the sizes that show them best: about a quarter of a second."""
        if not self._best:
            self._best = [self._climb("macs", self._product), self._climb("bytes", self._sweep)]
        for unit, work, run in self._best:
            self._time(unit, work, run, 0.0)

    def _climb(self, unit: str, sized: Callable[[int], tuple[int, Run]]) -> tuple[str, int, Run]:
        seen, side, ns = [], 512, 0.0
        while ns < LONG_NS:
            work, run = sized(side)
            ns = self._time(unit, work, run, SECONDS)
            seen.append((ns / work, work, run))
            side *= 2
        return unit, *min(seen, key=lambda one: one[0])[1:]

    def _time(self, unit: str, work: int, run: Run, seconds: float) -> float:
        """The fastest of at least three runs; kept where it is a record."""
        times = samples(run, seconds, fewest=3)
        each = max(1, min(times)) / work * 1e6
        known = self.records.get(unit)
        if known is None or each < (known.median_ns or 0.0):
            found = Measurement(
                status="ok",
                median_ns=each,
                spread_ns=0.0,
                runs=len(times),
                error=None,
                temp_bytes=None,
                program="",
                detail="of a million, in the best run",
            )
            self.records = {**self.records, unit: found}
            self.keep({unit: found})
        return min(times)

    def _product(self, side: int) -> tuple[int, Run]:
        x = jax.device_put(jnp.full((side, side), 1 / side, jnp.float32), self.device)
        lowered = jax.jit(partial(jnp.matmul, precision=lax.Precision.DEFAULT)).lower(x, x)
        return side**3, partial(lowered.compile(self._options), x, x)

    def _sweep(self, side: int) -> tuple[int, Run]:
        x = jax.device_put(jnp.ones((side, side), jnp.float32), self.device)
        # In place, or the system's handing out of pages counts too.
        over = jax.jit(lambda x: x * 0.5 + 0.5, donate_argnums=0).lower(x).compile(self._options)

        def run() -> Any:
            nonlocal x
            x = over(x)
            return x

        return 2 * x.nbytes, run

    @property
    def _options(self) -> dict[str, Any] | None:
        return dict(self.compiler_options) if self.compiler_options else None
