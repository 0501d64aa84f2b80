"""What `auto_layout` costs beside `jax.jit`: warm calls, the import, a start with the plan stored, a process for what
may crash, and planning.

    python -m bench.overhead

Warm calls: in turn, in blocks, in one process; the figure is the median of the differences between neighbouring blocks.
Start: fresh processes, in turn; tracing and lowering ResNet-50 (with importing jaxlayout, reading the plan, retracing),
that is all until the first result but XLA's compilation. Planning: graph and solution of a chain of convolutions with
residuals, everything measured before.
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
from jax import lax

from bench.models import MODELS
from bench.networks import restricted_plan
from bench.timing import machine
from jaxlayout import auto_layout
from jaxlayout.convs.candidates import candidates
from jaxlayout.graph.build import build_graph
from jaxlayout.measure import contained

BLOCKS, CALLS = 400, 200
STARTS = 5
START = """
import sys, time, jax
from bench.models import MODELS
model = MODELS[sys.argv[1]]
f, *args = model.build(model.batch, model.size, jax.random.key(0))
jax.block_until_ready(args)
start = time.perf_counter()
if sys.argv[2] == "auto_layout":
    from jaxlayout import auto_layout
    auto_layout(f, on_miss="error").lower(*args)
else:
    jax.jit(f).lower(*args)
print(time.perf_counter() - start)
"""


def main() -> None:
    """Print a table."""
    table = os.environ["JAXLAYOUT_TABLE"] = os.path.join(tempfile.mkdtemp(), "table.sqlite")
    print(f"{machine()}, Python {sys.version.split()[0]}, `python -m bench.overhead`")
    print(f"{'warm call':<34}{'jax.jit us':>12}{'auto_layout us':>16}{'difference us':>15}")
    x = jnp.ones(4)
    tree = {f"layer{i}": {"kernel": jnp.ones(4), "bias": jnp.ones(4)} for i in range(150)}
    for name, fun, args in (
        ("a tiny function", tiny, (x,)),
        ("300 parameters", lambda tree, x: x + tree["layer0"]["bias"], (tree, x)),
        ("a keyword, a static argument", lambda x, n, *, y: x * n + y, (x,)),
    ):
        static: dict[str, Any] = {"static_argnames": "n"} if "static" in name else {}
        named = {"n": 2, "y": x} if static else {}
        plain = jax.jit(fun, **static)
        for how, tuned in (("", auto_layout(fun, **static)), (", jitted", auto_layout(jax.jit(fun, **static)))):
            first, second, difference = compared(plain, tuned, args, named)
            print(f"{name + how:<34}{first:>12.2f}{second:>16.2f}{difference:>+15.2f}")
    print(f"import jaxlayout beyond import jax: {import_seconds() * 1e3:.0f} ms")
    helpers = statistics.median(contained.start_seconds() for _ in range(STARTS))
    print(f"a process for what may crash, where there is such a lowering: {helpers:.2f} s to start")
    plain, tuned = start_seconds("resnet50")
    print(f"start of ResNet-50, its plan stored: {plain:.2f} s with jit, {tuned:.2f} s with auto_layout")
    for depth in (100, 200, 400, 800):
        build, whole = planning_seconds(depth, table)
        print(f"planning a chain of {depth} convolutions: {whole:.2f} s, of which tracing and graph {build:.2f} s")


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

    block(first)
    block(second)
    pairs = []
    for n in range(BLOCKS):
        times = [block(f) for f in ((first, second) if n % 2 else (second, first))]
        pairs.append(times if n % 2 else times[::-1])
    return (
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(b - a for a, b in pairs),
    )


def chain(depth: int) -> Any:
    """A jaxpr of NCHW convolutions, a residual around every second one."""

    def f(x: jax.Array, w: jax.Array) -> jax.Array:
        for _ in range(depth // 2):
            y = jax.nn.relu(lax.conv_general_dilated(x, w, (1, 1), "SAME"))
            x = x + lax.conv_general_dilated(y, w, (1, 1), "SAME")
        return x

    return jax.make_jaxpr(f)(jnp.ones((1, 16, 16, 16)), jnp.ones((16, 16, 3, 3)))


def planning_seconds(depth: int, table: str) -> tuple[float, float]:
    """Tracing and the graph; these and the solution. The second time, when nothing is left to be measured."""
    restricted_plan(chain(depth), table, lambda candidate, written: True)
    start = time.perf_counter()
    jaxpr = chain(depth)
    build_graph(jaxpr, candidates)
    build = time.perf_counter() - start
    restricted_plan(jaxpr, table, lambda candidate, written: True)
    return build, time.perf_counter() - start - build


def start_seconds(name: str) -> tuple[float, float]:
    """Medians of fresh processes with jit and with auto_layout, the plan having been made in this one."""
    model = MODELS[name]
    f, *args = model.build(model.batch, model.size, jax.random.key(0))
    auto_layout(f).lower(*args)

    def run(how: str) -> float:
        command = [sys.executable, "-c", START, name, how]
        return float(subprocess.run(command, capture_output=True, check=True).stdout)

    runs = [(run("jit"), run("auto_layout")) for _ in range(STARTS)]
    return statistics.median(a for a, _ in runs), statistics.median(b for _, b in runs)


def import_seconds() -> float:
    """Of fresh processes that have imported jax already, the median."""
    script = "import jax, time; t = time.perf_counter(); import jaxlayout.public; print(time.perf_counter() - t)"
    runs = [subprocess.run([sys.executable, "-c", script], capture_output=True, check=True) for _ in range(5)]
    return statistics.median(float(run.stdout) for run in runs)


if __name__ == "__main__":
    main()
