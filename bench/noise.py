"""What a busy machine does to a plan: measured while another process keeps a core busy, judged by quiet measurements.

    python -m bench.noise [case ...] [--table DIR] [--small] [--budget S] [--out bench/results]

Writes noise-jax<version>.json and .md into --out; where cases are named, the others' rows stay. Each network is planned
three times from an empty table: `quiet`; `again`, as quiet, to see what two equal runs differ by; and `busy`, beside a
process for every core but one that multiplies matrices. Columns: the cost of the other two plans by the quiet table's
times, relative to the quiet plan's, how many convolutions they compute in another way; the cost of the busy plan
relative to the quiet one by the times of the table that neither was made from, `again` (by its own table each plan is
the best there is, noise included; 1.05 at most is aimed at in both); the three functions and `jax.jit` in turn on the
quiet machine, medians in ms; and how much slower the busy plan runs than the quiet one, as the median of rounds.
--table: a folder for the three tables of each network, which are kept there and not measured again; default: a new one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from bench.models import ALL_MODELS
from bench.networks import cost_model
from bench.rows import Row, arguments, parsed, write_rows
from bench.timing import CORES, in_turn, machine, middle
from jaxlayout import Plan, auto_layout
from jaxlayout.graph.build import LayoutGraph, build_graph
from jaxlayout.measure.trials import measure
from jaxlayout.tuning.model import CostModel

CASES = ("mobilenet_v2", "mobilenet_v2_nchw", "resnet50", "efficientnet_b0", "vae3d_decoder")
ROUNDS = 9
ALLOWED = 1.05
BURN = "import numpy as np\nx = np.ones((512, 512), np.float32) / 512\nwhile True: x = x @ x"


@contextmanager
def company() -> Iterator[None]:
    """Other processes that keep all cores but one busy."""
    alone = os.environ | {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
    others = [subprocess.Popen([sys.executable, "-c", BURN], env=alone) for _ in range(max(1, CORES - 1))]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def cost_ns(graph: LayoutGraph, plan: Plan, model: CostModel) -> float:
    """What a plan costs by the times that a table has, which may measure conversions for it."""
    for job, found in measure(model.missing_conversions(plan), device=jax.devices()[0]):
        model.record(job.key, found)
    nodes = sum(node.times * model.node_ns(node, plan.choices.get(node.path, node.modes[0])) for node in graph.nodes)
    return nodes + sum(c.times * model.conversion_ns(c.shape, c.dtype, c.held, c.wanted) for c in plan.conversions)


def run(name: str, folder: Path, budget: float, small: bool) -> Row:
    """One row."""
    model = ALL_MODELS[name]
    f, *args = model.build(1 if small else model.batch, min(32, model.size) if small else model.size, jax.random.key(0))

    def plan(kind: str) -> Plan:
        tuned = auto_layout(f, table=str(folder / f"{name}-{kind}.sqlite"), verdict=False, time_budget=budget)
        return tuned.plan(*args)

    plans = {"quiet": plan("quiet"), "again": plan("again")}
    with company():
        plans["busy"] = plan("busy")
    quiet, again = (cost_model(str(folder / f"{name}-{kind}.sqlite")) for kind in ("quiet", "again"))
    graph = build_graph(jax.make_jaxpr(f)(*args), lambda conv, w: quiet.candidates(conv, w, relaxed=False))
    costs = {kind: cost_ns(graph, plan, quiet) for kind, plan in plans.items()}
    sites = [node.path for node in graph.sites]

    def other(kind: str) -> int:
        return sum(plans[kind].choices.get(path) != plans["quiet"].choices.get(path) for path in sites)

    functions: dict[str, Callable[..., Any]] = {"jit": jax.jit(f)}
    functions |= {kind: auto_layout(f, plan=plan) for kind, plan in plans.items()}
    calls = {kind: lambda run=run: jax.block_until_ready(run(*args)) for kind, run in functions.items()}
    seconds = in_turn(calls, ROUNDS)
    slower = middle([b / q for b, q in zip(seconds["busy"], seconds["quiet"], strict=True)])
    return {
        "case": name,
        "convolutions": len(sites),
        **{f"{kind}_cost": costs[kind] / costs["quiet"] for kind in ("again", "busy")},
        "busy_cost_again": cost_ns(graph, plans["busy"], again) / cost_ns(graph, plans["quiet"], again),
        **{f"{kind}_other": other(kind) for kind in ("again", "busy")},
        **{f"{kind}_ms": 1e3 * middle(times)[0] for kind, times in seconds.items()},
        "slower": slower[0],
        "slower_spread": slower[1],
    }


def markdown(rows: list[Row]) -> str:
    """The table."""
    head = (
        "| network | convolutions | again: cost, others | busy: cost, others | busy, by again's table | jit ms "
        "| quiet ms | again ms | busy ms | busy / quiet |\n|---|---|---|---|---|---|---|---|---|---|\n"
    )

    def aimed(cost: float) -> str:
        return f"**{cost:.3f}** ({'met' if cost <= ALLOWED else 'MISSED'})"

    lines = [
        f"| {r['case']} | {r['convolutions']} | {r['again_cost']:.3f}, {r['again_other']} "
        f"| {aimed(r['busy_cost'])}, {r['busy_other']} | {aimed(r['busy_cost_again'])} "
        f"| {r['jit_ms']:.1f} | {r['quiet_ms']:.1f} | {r['again_ms']:.1f} | {r['busy_ms']:.1f} "
        f"| {r['slower']:.2f} ±{r['slower_spread']:.2f} |"
        for r in rows
    ]
    where = f"{machine()}, `python -m bench.noise`"
    return f"{where}\n\n{head}" + "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Run the cases and write the tables, after each case anew."""
    given = parsed(arguments("noise", __doc__, CASES), CASES, argv)
    folder = Path(given.table or tempfile.mkdtemp())
    stem = given.out / f"noise-jax{jax.__version__}{'-small' * given.small}"
    write_rows(stem, given.cases, CASES, lambda name: run(name, folder, given.budget, given.small), markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
