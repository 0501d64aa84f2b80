"""What `auto_layout` costs beside `jax.jit` where there is nothing to gain: warm calls, and the import.

    python -m bench.overhead

Calls in turn, in blocks, in one process; the figure is the median of the differences between neighbouring blocks.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp

from jaxlayout import auto_layout

BLOCKS, CALLS = 400, 200


def main() -> None:
    """Print a table."""
    os.environ["JAXLAYOUT_TABLE"] = os.path.join(tempfile.mkdtemp(), "table.sqlite")
    print(f"jax {jax.__version__}, Python {sys.version.split()[0]}, {jax.devices()[0].device_kind}")
    print(f"{'warm call':<34}{'jax.jit us':>12}{'auto_layout us':>16}{'difference us':>15}")
    x = jnp.ones(4)
    tree = {f"layer{i}": {"kernel": jnp.ones(4), "bias": jnp.ones(4)} for i in range(150)}
    for name, fun, args in (
        ("a tiny function", tiny, (x,)),
        ("300 parameters", lambda tree, x: x + tree["layer0"]["bias"], (tree, x)),
        ("a keyword, a static argument", lambda x, n, *, y: x * n + y, (x,)),
    ):
        static = {"static_argnames": "n"} if "static" in name else {}
        named = {"n": 2, "y": x} if static else {}
        plain = jax.jit(fun, **static)
        for how, tuned in (("", auto_layout(fun, **static)), (", jitted", auto_layout(jax.jit(fun, **static)))):
            first, second, difference = compared(plain, tuned, args, named)
            print(f"{name + how:<34}{first:>12.2f}{second:>16.2f}{difference:>+15.2f}")
    print(f"import jaxlayout beyond import jax: {import_seconds() * 1e3:.0f} ms")


def tiny(x: jax.Array) -> jax.Array:
    """Nothing to tune."""
    return x + 1


def compared(first: Any, second: Any, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[float, float, float]:
    """Microseconds a call: medians of both, and of the differences."""

    def block(f: Any) -> float:
        start = time.perf_counter()
        for _ in range(CALLS):
            f(*args, **named)
        return (time.perf_counter() - start) / CALLS * 1e6

    block(first), block(second)
    pairs = []
    for n in range(BLOCKS):
        times = [block(f) for f in ((first, second) if n % 2 else (second, first))]
        pairs.append(times if n % 2 else times[::-1])
    return (
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(b - a for a, b in pairs),
    )


def import_seconds() -> float:
    """Of fresh processes that have imported jax already, the median."""
    script = "import jax, time; t = time.perf_counter(); import jaxlayout; print(time.perf_counter() - t)"
    runs = [subprocess.run([sys.executable, "-c", script], capture_output=True, check=True) for _ in range(5)]
    return statistics.median(float(run.stdout) for run in runs)


if __name__ == "__main__":
    main()
