"""`jaxlayout bench`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from jaxlayout.cli.base import command, print_json, print_text
from jaxlayout.cli.settings import add_options, options_of
from jaxlayout.cli.target import HOW, add_target, target_of
from jaxlayout.cli.tune import KEPT, has_failed

BENCH = f"""\
{HOW}
example:

  $ jaxlayout bench model.py:predict --args f32[8,56,56,64] f32[3,3,1,64]
  jax.jit        24.9 ms
  auto_layout    1.63 ms
  ratio          15.2x ±0.6 (median and half the interquartile range of 15 pairs)
  kept: faster: 15.31x over 3 pairs

A ratio above 1: auto_layout is faster. Where the function is left as it is, both are the same program, and what the
ratio differs from 1 is noise. The function is tuned first if it is not yet. Neither side donates its arguments.

exit codes: 0 whatever the ratio, 1 if tuning failed."""


def add_to(commands: Any) -> None:
    """Declare it."""
    summary = "Time a function under jax.jit against itself under auto_layout, in turn, in this process."
    bench = command(commands, "bench", _bench, summary, BENCH, prints_data=True, interrupted=KEPT)
    add_target(bench)
    bench.add_argument("--pairs", type=_count, default=15, metavar="NUMBER", help="runs of each side (default: 15)")
    text = "seconds to spend; as many pairs as fit, at least 3 (default: 60)"
    bench.add_argument("--seconds", type=float, default=60.0, metavar="NUMBER", help=text)
    add_options(bench)


def _count(text: str) -> int:
    number = int(text)
    if number < 3:
        raise argparse.ArgumentTypeError(f"{text}: at least 3 pairs have a spread")
    return number


def _bench(given: argparse.Namespace) -> int:
    options = options_of(given)

    import jax

    from jaxlayout.measure.turns import Turns
    from jaxlayout.runtime.timing import paired

    fun, args, kwargs = target_of(given)
    args, kwargs = _real((args, kwargs))
    plain, tuned = _contenders(fun, options)
    outcome = tuned.outcome(*args, **kwargs)
    for side in (plain, tuned):  # before the lock, which tuning takes in a thread of its own
        jax.block_until_ready(side(*args, **kwargs))
    with Turns().timing():
        seen = paired(
            lambda: plain(*args, **kwargs), lambda: tuned(*args, **kwargs), pairs=given.pairs, seconds=given.seconds
        )
    if given.json:
        print_json(
            {
                "target": given.target,
                **seen.to_json("jit", "auto_layout"),
                "kept": outcome.kept,
                "reason": outcome.verdict.reason,
            }
        )
    else:
        what = f"median and half the interquartile range of {seen.pairs} pairs"
        print_text(
            f"jax.jit        {seen.first_ms:.3g} ms",
            f"auto_layout    {seen.second_ms:.3g} ms",
            f"ratio          {seen.ratio:.3g}x ±{seen.spread:.2g} ({what})",
            f"{'kept' if outcome.kept else 'left as it is'}: {outcome.verdict.reason}",
        )
    return int(has_failed(outcome))


def _contenders(fun: Any, options: dict[str, Any]) -> tuple[Callable[..., Any], Any]:
    """A function, whatever it is wrapped in, under `jax.jit` and under `auto_layout`, and neither donates."""
    import dataclasses

    import jax

    from jaxlayout import AutoLayout, auto_layout
    from jaxlayout.api.wrapped import is_jitted, jit_settings

    jit_keywords: dict[str, Any] = {}
    more: dict[str, Any] = {}
    if isinstance(fun, AutoLayout):
        own = {field.name: getattr(fun.options, field.name) for field in dataclasses.fields(fun.options)}
        fun, jit_keywords, more, options = fun.__wrapped__, fun.jit, {"plan": fun.pinned}, own | options
    if is_jitted(fun):
        fun, jit_keywords = fun.__wrapped__, jit_settings(fun)
    jit_keywords = {name: value for name, value in jit_keywords.items() if not name.startswith("donate")}
    return jax.jit(fun, **jit_keywords), auto_layout(fun, **jit_keywords, **options, **more)


def _real(tree: Any) -> Any:
    """Arrays in place of mere types, drawn as the verifier draws them."""
    import jax

    from jaxlayout.verify.accept import draws

    leaves, structure = jax.tree.flatten(tree)
    drawn = iter(next(draws([leaf for leaf in leaves if isinstance(leaf, jax.ShapeDtypeStruct)])))
    leaves = [next(drawn) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf for leaf in leaves]
    return jax.tree.unflatten(structure, leaves)
