"""Whole functions under `jax.jit` and under `auto_layout`, in turn in one process, with two ablations.

    python -m bench.networks [case ...] [--table FILE] [--out bench/results]

Writes networks-jax<version>.json and .md into --out; where cases are named, the others' rows stay. Columns: medians in
ms; ratio, the median of pairwise ratios, and half its interquartile range; errors against a float64 run, relative to
its rms; transposes in the program as written and tuned; temporary memory tuned / written; seconds of lowering and
compiling under either, nothing cached, the plan given; seconds of tuning and how many convolutions and transposes were
timed. `frozen`: jit's time over that with the weights of a network frozen. `layouts alone`: only XLA's own convolution,
in any order. `lowerings alone`: any lowering, orders as written. Both without compiler options.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bench.models import MODELS
from bench.rows import compared, write_rows
from bench.timing import first_call, machine, paired
from jaxlayout import Candidate, Options, auto_layout
from jaxlayout.convs.candidates import candidates
from jaxlayout.graph.build import build_graph
from jaxlayout.graph.plan import Plan
from jaxlayout.graph.program import count_transposes
from jaxlayout.graph.solve import solve
from jaxlayout.measure.trials import measure
from jaxlayout.tuning import model
from jaxlayout.tuning.model import CostModel

Case = Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]
"""Builds a function and its arguments."""


def normal(*shape: int, scale: float = 1.0) -> jax.Array:
    """Ordinary numbers of a shape, others at each call."""
    return jnp.asarray(scale * _rng.standard_normal(shape, np.float32))


_rng = np.random.default_rng(0)


def optimal() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Two convolutions as XLA likes them best."""

    def f(x: Any, v: Any, w: Any) -> Any:
        numbers = ("NHWC", "HWIO", "NHWC")
        y = jax.nn.relu(lax.conv_general_dilated(x, v, (1, 1), "SAME", dimension_numbers=numbers))
        return lax.conv_general_dilated(y, w, (1, 1), "SAME", dimension_numbers=numbers)

    return f, (normal(8, 56, 56, 64), normal(3, 3, 64, 64, scale=0.05), normal(3, 3, 64, 65, scale=0.05))


def mlp() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """No convolution at all."""

    def f(x: Any, *weights: Any) -> Any:
        for w in weights:
            x = jax.nn.relu(x @ w)
        return x

    return f, (normal(256, 1024), *(normal(1024, 1024, scale=0.04) for _ in range(4)))


def one_among_many() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """One NCHW convolution among 300 other operations."""

    def f(x: Any, w: Any) -> Any:
        y = lax.conv_general_dilated(x, w, (1, 1), "SAME")
        for i in range(150):
            y = y * (1.0 + 1e-3 * i) + jnp.roll(y, 1, axis=3) * 1e-3 if i % 50 == 0 else jnp.tanh(y) + 0.1 * y
        return y.mean((2, 3))

    return f, (normal(8, 16, 56, 56), normal(16, 16, 3, 3, scale=0.1))


def _model(name: str) -> Case:
    def build() -> tuple[Callable[..., Any], tuple[Any, ...]]:
        model = MODELS[name]
        apply, params, images = model.build(model.batch, model.size, jax.random.key(0))
        return apply, (params, images)

    return build


CASES: dict[str, Case] = {name: _model(name) for name in MODELS} | {
    "optimal": optimal,
    "mlp": mlp,
    "one_among_many": one_among_many,
}


def cost_model(table: str | None) -> CostModel:
    """What `auto_layout` has measured into a table, without compiler options."""
    return model.cost_model(Options(table=table), jax.devices()[0], "entry", None)


def restricted_plan(jaxpr: Any, table: str | None, keep: Callable[[Candidate, Candidate], bool]) -> Plan:
    """The best plan whose candidates, beside the written one, all pass `keep(candidate, written)`."""
    device, model = jax.devices()[0], cost_model(table)
    graph = build_graph(jaxpr, lambda conv, w: [c for c in candidates(conv, w) if c == w or keep(c, w)])
    while True:
        plan = solve(graph, model.node_ns, model.conversion_ns)
        missing = [*model.missing_convolutions(graph), *model.missing_conversions(plan)]
        if not missing:
            return plan
        for job, found in measure(missing, device=device):
            model.record(job.key, found)


def errors(f: Callable[..., Any], args: tuple[Any, ...], *outs: Any) -> list[float]:
    """The largest errors of outputs against a float64 run, each array's relative to its rms."""
    return errors_from(in_float64(f, args), *outs)


def in_float64(f: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """What a function gives in float64, as NumPy arrays."""

    def wide(x: Any) -> Any:
        return x.astype(np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x

    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, jax.jit(f)(*jax.tree.map(lambda x: jnp.asarray(wide(np.asarray(x))), args)))


def errors_from(exact: Any, *outs: Any, floor: float = 0.0) -> list[float]:
    """The largest errors of outputs, each array's relative to the rms of the exact one, or to this share of the largest
    rms of all arrays where that is more: a gradient may be nothing but rounding."""

    def rms(exact: np.ndarray) -> float:
        return float(np.sqrt(np.mean(np.square(exact, dtype=np.float64))))

    least = floor * max(map(rms, jax.tree.leaves(exact)))

    def one(exact: np.ndarray, out: Any) -> float:
        return float(np.max(np.abs(np.asarray(out, np.float64) - exact))) / (max(least, rms(exact)) or 1.0)

    return [max(jax.tree.leaves(jax.tree.map(one, exact, out))) for out in outs]


def compile_seconds(*makes: Callable[[], Any], args: tuple[Any, ...], runs: int = 3) -> list[float]:
    """The least seconds that lowering and compiling each takes, made anew, in turn, with nothing cached."""

    def seconds(make: Callable[[], Any]) -> float:
        jax.clear_caches()
        start = time.perf_counter()
        make().lower(*args).compile()
        return time.perf_counter() - start

    return [min(times) for times in zip(*([seconds(make) for make in makes] for _ in range(runs)), strict=True)]


def run(name: str, table: str | None, ablations: bool) -> dict[str, Any]:
    """One row."""
    f, args = CASES[name]()
    plain, tuned = jax.jit(f), auto_layout(f, table=table)
    found, tuned_s = first_call(tuned, *args)
    expected = jax.block_until_ready(plain(*args))
    outcome = tuned.outcome(*args)
    jaxpr = jax.make_jaxpr(f)(*args)
    seen = paired(plain, tuned, *args)
    error, error_jit = errors(f, args, found, expected)
    row = compared(name, seen, outcome) | {
        "error": error,
        "error_jit": error_jit,
        "transposes_written": count_transposes(jaxpr),
        "transposes_tuned": len(outcome.plan.conversions) if outcome.kept else count_transposes(jaxpr),
        "optimal": outcome.plan.exact,
        "predicted_ms": outcome.plan.predicted_ns / 1e6,
        "first_call_s": tuned_s,
    }
    if name in MODELS:
        frozen = auto_layout(f, table=table).freeze(args[0])
        jax.block_until_ready(frozen(args[1]))
        row["frozen"] = paired(plain, lambda _, images: frozen(images), *args).ratio
    plan = outcome.plan if outcome.kept else Plan()
    row["compile_s_jit"], row["compile_s"] = compile_seconds(
        lambda: jax.jit(f), lambda: auto_layout(f, plan=plan), args=args
    )
    if ablations and outcome.kept:
        for label, keep in (
            ("layouts_alone", lambda c, w: c.lowering == "xla"),
            ("lowerings_alone", lambda c, w: c.dims == w.dims),
        ):
            alone = auto_layout(f, table=table, plan=restricted_plan(jaxpr, table, keep))
            jax.block_until_ready(alone(*args))
            row[label] = paired(plain, alone, *args, pairs=9).ratio
    return row


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table."""
    head = (
        "| case | jit ms | auto_layout ms | ratio | frozen | layouts alone | lowerings alone | error (jit's) |"
        " transposes | memory | compile s: jit → auto_layout | tuning s (timed) | verdict |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|\n"
    )

    def times(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}x"

    def compiling(row: dict[str, Any]) -> str:
        return f"{row['compile_s_jit']:.1f} → {row['compile_s']:.1f}" if "compile_s" in row else ""

    lines = [
        f"| {r['case']} | {r['jit_ms']:.1f} | {r['auto_layout_ms']:.1f} | **{r['ratio']:.2f}x** ±{r['spread']:.2f} "
        f"| {times(r.get('frozen'))} | {times(r.get('layouts_alone'))} | {times(r.get('lowerings_alone'))} "
        f"| {r['error']:.1e} ({r['error_jit']:.1e}) | {r['transposes_written']} → {r['transposes_tuned']} "
        f"| {times(r['memory'])} | {compiling(r)} | {r['tuning_s']:.0f} ({r['timed']}) | {r['reason']} |"
        for r in rows
    ]
    return f"{machine()}, `python -m bench.networks`\n\n{head}" + "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Run the cases and write the tables, after each case anew."""
    parser = argparse.ArgumentParser(prog="python -m bench.networks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", help=f"default: all of {', '.join(CASES)}")
    parser.add_argument("--table", default=None, help="cost table, default: the user's")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--no-ablations", action="store_true")
    given = parser.parse_args(argv)
    write_rows(
        given.out / f"networks-jax{jax.__version__}",
        given.cases,
        CASES,
        lambda name: run(name, given.table, not given.no_ablations),
        markdown,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
