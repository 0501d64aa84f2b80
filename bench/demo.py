"""`make demo`: five real networks at real size, under `jax.jit` and under `auto_layout`, a line each.

    python -m bench.demo [model ...] [--size 224] [--batch 8] [--table FILE]

The plans are kept in the cost table: a second run uses them and says so.
"""

from __future__ import annotations

import argparse
import sys
import time

import jax
import numpy as np
from rich.console import Console

from bench.models import MODELS
from bench.timing import machine, paired
from jaxlayout import auto_layout
from jaxlayout.graph.program import count_transposes


def main(argv: list[str] | None = None) -> int:
    """Run it; the exit status is 1 if a result disagrees."""
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", help=f"default: all of {', '.join(MODELS)}")
    parser.add_argument("--size", type=int, default=224, help="side of an image in pixels")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--table", default=None, help="cost table, default: the user's")
    given = parser.parse_args(argv)
    if unknown := set(given.models) - set(MODELS):
        parser.error(f"no such model: {', '.join(sorted(unknown))}")
    say = Console(soft_wrap=True).print
    say(f"{machine()}, batch {given.batch}, {given.size}x{given.size}")
    say("times: medians of runs in turn, ms; ratio: median of pairs; conversions: transposes as written -> tuned")
    say(f"{'model':20} {'jit':>8} {'auto_layout':>12} {'ratio':>13} {'error':>8} {'conversions':>12} {'tuning':>8} ")
    right = True
    for name in given.models or MODELS:
        apply, params, images = MODELS[name].build(given.batch, given.size, jax.random.key(0))
        plain, tuned = jax.jit(apply), auto_layout(apply, table=given.table)
        start = time.monotonic()
        outcome = tuned.outcome(params, images)  # before the call, after which it would be a stored one
        found = jax.block_until_ready(tuned(params, images))
        first_call = time.monotonic() - start
        expected = plain(params, images)
        error = float(np.max(np.abs(found - expected)) / np.sqrt(np.mean(expected**2)))
        written = count_transposes(jax.make_jaxpr(apply)(params, images))
        after = len(outcome.plan.conversions) if outcome.kept else written
        seen = paired(plain, tuned, params, images)
        right &= error < 1e-3
        say(
            f"{name:20} {seen.first_ms:8.1f} {seen.second_ms:12.1f} {seen.ratio:6.2f}x ±{seen.spread:4.2f} "
            f"{error:8.1e} {written:5} -> {after:3} {outcome.seconds:6.1f} s  {outcome.source}"
            f"{f', {outcome.measured} timed' if outcome.source == 'measured' else ''}; {outcome.verdict.reason}"
            f"; first call {first_call:.1f} s"
        )
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
