"""The two peaks of this machine as JAX reaches them: float32 arithmetic, and memory.

    python -m bench.roofline

Arithmetic: a large square matrix product. Memory: y = a * x + b in place over an array much larger than any cache,
every element read once and written once. The best of several runs each: what else runs here only takes away.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from bench.timing import machine

SIDE = 4096
"""Rows and columns of the matrices."""
ELEMENTS = 2**27
"""Of the array that is passed over: 512 MiB."""
RUNS = 7


@dataclass(frozen=True, slots=True)
class Peaks:
    """What nothing here is faster than."""

    flops_per_s: float
    bytes_per_s: float

    def seconds(self, flops: float, nbytes: float) -> tuple[float, str]:
        """The least time for so much work, and what bounds it: compute or memory."""
        return max((flops / self.flops_per_s, "compute"), (nbytes / self.bytes_per_s, "memory"))


def peaks() -> Peaks:
    """Measure both; a few seconds."""
    return Peaks(flops_per_s=flops_per_s(), bytes_per_s=bytes_per_s())


def flops_per_s() -> float:
    """Of a large float32 matrix product, an addition and a multiplication counting as two."""
    x = jnp.full((SIDE, SIDE), 1 / SIDE, jnp.float32)  # its own square: repeating keeps the numbers as they are
    return 2 * SIDE**3 / _best_seconds(jax.jit(jnp.matmul), x, x)


def bytes_per_s() -> float:
    """Of a large elementwise pass, reads and writes. In place, or the system's handing out of pages counts too."""
    x = jnp.ones(ELEMENTS, jnp.float32)

    @partial(jax.jit, donate_argnums=0)
    def over(x: jax.Array) -> jax.Array:
        return x * 0.5 + 0.5

    def turn() -> None:
        nonlocal x
        x = jax.block_until_ready(over(x))

    return 2 * x.nbytes / _best_seconds(turn)


def _best_seconds(f: Callable[..., Any], *args: Any) -> float:
    def timed() -> float:
        start = time.perf_counter()
        jax.block_until_ready(f(*args))
        return time.perf_counter() - start

    timed()
    return min(timed() for _ in range(RUNS))


def main() -> None:
    """Print them."""
    found = peaks()
    print(machine())
    print(f"float32 matrix product  {found.flops_per_s / 1e9:8.1f} GFLOP/s")
    print(f"elementwise pass        {found.bytes_per_s / 1e9:8.1f} GB/s")
    print(f"balance                 {found.flops_per_s / found.bytes_per_s:8.1f} FLOP per byte")


if __name__ == "__main__":
    main()
