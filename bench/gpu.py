"""Single convolutions, networks and training on the GPU that is there, under `jax.jit` and under `auto_layout`.

    python -m bench.gpu [case ...] [--table FILE] [--budget S] [--platform gpu] [--small] [--out bench/results]

Nobody has run it on a GPU yet: only, with small shapes, on a CPU (`--platform cpu --small`), to see that it works.

Writes gpu-<device>-jax<version>.json and .md into --out; where cases are named, the others' rows stay. The cases are
those of `bench.lowerings`, of `bench.networks` and of `bench.training`, its single steps as `step_...`. XLA chooses
layouts of its own on a GPU, so that many forms come to one program: where what is compiled is the same text for both,
the row says `same program` for a ratio, and what is left between the times is noise.

Columns: medians in ms; ratio, the median of pairwise ratios, and half its interquartile range; the largest difference
between the two results, relative to their rms; temporary memory tuned / written; seconds of tuning and how many
convolutions and transposes were timed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from bench import lowerings, networks, training
from bench.models import MODELS
from bench.networks import errors_from
from bench.rows import Row, arguments, compared, parsed, write_rows
from bench.scenarios import Program
from bench.timing import paired
from jaxlayout import auto_layout
from jaxlayout.measure.compiled import program_hash
from jaxlayout.measure.environment import current_environment

SECONDS = 10.0
"""About how long the pairs of one case may take."""
SHOWN = ("device_kind", "platform_version", "jax", "jaxlib")
"""Of the environment, in every row."""


def convolution(name: str, small: bool) -> Program:
    conv, which = lowerings.CASES[name]
    if small:  # one image of 8 to a side
        sides = zip(conv.layout, conv.lhs, strict=True)
        lhs = tuple(1 if axis == "N" else size if axis == "C" else min(size, 8) for axis, size in sides)
        conv = replace(conv, lhs=lhs)
    return conv.build(which)


def network(name: str, small: bool) -> Program:
    if not small or name not in MODELS:
        return networks.CASES[name]()
    apply, params, images = MODELS[name].build(1, 32, jax.random.key(0))
    return apply, (params, images)


def trained(name: str, small: bool) -> Program:
    case = training.CASES[name](small)
    return case.fun, case.args


CASES: dict[str, Callable[[bool], Program]] = (
    {name: partial(convolution, name) for name in lowerings.CASES}
    | {name: partial(network, name) for name in networks.CASES}
    | {build.__name__: partial(trained, build.__name__) for build in training.LOOPS}
    | {f"step_{name}": partial(trained, name) for name in training.STEPS}
)


def run(name: str, table: str | None, small: bool, budget: float) -> Row:
    """One row."""
    fun, args = CASES[name](small)
    plain, tuned = jax.jit(fun), auto_layout(fun, table=table, time_budget=budget)
    found, expected = jax.block_until_ready((tuned(*args), plain(*args)))
    programs = {program_hash(f.lower(*args).compile()) for f in (plain, tuned)}
    seen = paired(plain, tuned, *args, pairs=3) if small else paired(plain, tuned, *args, seconds=SECONDS)
    environment = current_environment().to_json()
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, expected)
    row = compared(name, seen, tuned.outcome(*args)) | {
        "same": len(programs) == 1,
        "apart": errors_from(wide, found)[0],
        "environment": {key: environment[key] for key in SHOWN},
    }
    jax.clear_caches()
    return row


def markdown(rows: list[Row]) -> str:
    """The table."""
    head = (
        "| case | jit ms | auto_layout ms | ratio | apart | memory | tuning s (timed) | verdict |\n"
        "|---|---|---|---|---|---|---|---|\n"
    )

    def ratio(row: Row) -> str:
        return "same program" if row["same"] else f"**{row['ratio']:.2f}x** ±{row['spread']:.2f}"

    lines = [
        f"| {r['case']} | {r['jit_ms']:.3f} | {r['auto_layout_ms']:.3f} | {ratio(r)} | {r['apart']:.0e} "
        f"| {'–' if r['memory'] is None else format(r['memory'], '.2f')} | {r['tuning_s']:.0f} ({r['timed']}) "
        f"| {r['reason']} |"
        for r in rows
    ]
    where = "; ".join(dict.fromkeys(", ".join(f"{k} {v}" for k, v in r["environment"].items()) for r in rows))
    return f"{' '.join(where.split())}, `python -m bench.gpu`\n\n{head}" + "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Run the cases and write the tables, after each case anew."""
    parser = arguments("gpu", __doc__, CASES, 7200.0)
    parser.add_argument("--platform", default="gpu", help="as JAX names it; cpu: to see that this program works")
    given = parsed(parser, CASES, argv)
    try:
        device = jax.devices(given.platform)[0]
    except RuntimeError:
        parser.error(f"no {given.platform} here: JAX sees {', '.join(map(str, jax.devices()))} only")
    kind = re.sub(r"\W+", "_", device.device_kind).strip("_").lower()
    with jax.default_device(device):
        write_rows(
            given.out / f"gpu-{kind}-jax{jax.__version__}{'-small' * given.small}",
            given.cases,
            CASES,
            lambda name: run(name, given.table, given.small, given.budget),
            markdown,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
