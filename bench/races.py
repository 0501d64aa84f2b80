"""How often the judge is wrong: programs raced against themselves, and against others that are 5% slower.

    python -m bench.races [case ...] [--races 300] [--small] [--out bench/results]

Writes races-jax<version>.json and .md into --out; where cases are named, the others' rows stay. In each race two
programs, compiled anew, are timed by what decides whether a rewritten function is kept (`jaxlayout.verify.race`). A
program is STEPS products of matrices, one after the other: `short` of small ones, `long` of larger ones. In `same` both
sides are one compiled program, in `twice` it is compiled twice, and in `faster` the first has 5% more products than the
second.
Columns: how many of the races the second program won, and so would have been kept; what is aimed at, 5% at most where
the two are equal, 90% at least where the second is faster; milliseconds of a call; the median of the races' ratios, and
half the interquartile range of the pairs in one; pairs and seconds that a race took, the median and the most.
"""

from __future__ import annotations

import statistics
import sys
import time

import jax
import jax.numpy as jnp
from jax import lax

from bench.rows import Row, arguments, parsed, write_rows
from bench.timing import machine
from jaxlayout.measure.compiled import Compiled, compile_in
from jaxlayout.verify.race import race

STEPS = 100
SIDES = {"short": 64, "long": 192}
CASES = tuple(f"{kind}_{size}" for kind in ("same", "twice", "faster") for size in SIDES)
WRONG, RIGHT = 0.05, 0.9


def products(steps: int, x: jax.Array) -> Compiled:
    """So many products with a matrix, in a loop, compiled."""

    def run(x: jax.Array) -> jax.Array:
        return lax.scan(lambda y, _: (y @ x, None), x, None, length=steps)[0]

    return compile_in("entry", run, [x])


def run(name: str, races: int, small: bool) -> Row:
    """One row."""
    kind, size = name.split("_")
    side = 16 if small else SIDES[size]
    x = jnp.full((side, side), 1 / side, jnp.float32)  # its own square
    kept, seen, seconds = 0, [], []
    for _ in range(races):
        first = products(STEPS * 105 // 100 if kind == "faster" else STEPS, x)
        second = first if kind == "same" else products(STEPS, x)
        for program in (first, second):
            jax.block_until_ready(program(x))
        start = time.perf_counter()
        faster, times = race(lambda: first(x), lambda: second(x))  # noqa: B023
        seconds.append(time.perf_counter() - start)
        seen.append(times)
        kept += faster
    return {
        "case": name,
        "races": races,
        "kept": kept,
        "met": kept >= RIGHT * races if kind == "faster" else kept <= WRONG * races,
        "ms": statistics.median(times.second_ms for times in seen),
        "median_ratio": statistics.median(times.ratio for times in seen),
        "spread": statistics.median(times.spread for times in seen),
        "pairs": statistics.median(times.pairs for times in seen),
        "most_pairs": max(times.pairs for times in seen),
        "seconds": statistics.median(seconds),
        "most_seconds": max(seconds),
    }


def markdown(rows: list[Row]) -> str:
    """The table."""
    head = (
        "| case | races | kept | aimed at | ms | ratio | pairs, at most | seconds, at most |\n"
        "|---|---|---|---|---|---|---|---|\n"
    )

    def aim(row: Row) -> str:
        return f"{RIGHT:.0%} or more" if row["case"].startswith("faster") else f"{WRONG:.0%} or less"

    lines = [
        f"| {r['case']} | {r['races']} | **{r['kept']}**, {r['kept'] / r['races']:.1%} "
        f"| {aim(r)} ({'met' if r['met'] else 'MISSED'}) | {r['ms']:.2f} | {r['median_ratio']:.3f} ±{r['spread']:.3f} "
        f"| {r['pairs']:.0f}, {r['most_pairs']} | {r['seconds']:.2f}, {r['most_seconds']:.2f} |"
        for r in rows
    ]
    return f"{machine()}, `python -m bench.races`\n\n{head}" + "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Run the cases and write the table, after each case anew."""
    parser = arguments("races", __doc__, CASES)
    parser.add_argument("--races", type=int, default=300)
    given = parsed(parser, CASES, argv)
    races = 1 if given.small else given.races
    stem = given.out / f"races-jax{jax.__version__}{'-small' * given.small}"
    write_rows(stem, given.cases, CASES, lambda name: run(name, races, given.small), markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
