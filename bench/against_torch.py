"""Whole networks against PyTorch on the same cores, in turn in one process: inference, float32, the same weights.

    pip install 'jaxlayout[torch]'
    python -m bench.against_torch [model ...] [--rounds 11] [--table FILE] [--small] [--budget S] [--out bench/results]

Writes torch-jax<version>.json and .md into --out; where models are named, the others' rows stay. Contenders: `jax.jit`;
`auto_layout`, and the same under `numerics="relaxed"`, which allows Winograd's convolutions, both frozen; eager
PyTorch, channels last; `torch.compile`, channels last and with the weights frozen, or the reason why it did not run. On
each run parameters and multiply-adds must be equal, and so must the results. Columns: medians in ms and half their
interquartile range; the faster PyTorch's time over ours, above 1: ours is faster, as the median over rounds; how much
of the machine's peak both reach, which is the best time of a large matrix product in the same rounds; the largest
difference from jit's results, relative to their rms.

The machine should be idle: PyTorch's threads spin while they wait for each other, and where other programs run, that
makes it many times slower. OMP_WAIT_POLICY=passive makes it robust (and a little slower where it is idle); the table
says if it was set, and what glibc's malloc was told: MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2000000000
MALLOC_ARENA_MAX=1 makes it keep the pages of large arrays instead of handing them back and having them zeroed anew.
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch._inductor.config

from bench.models import ALL_MODELS
from bench.rows import Row, arguments, parsed, write_rows
from bench.timing import CORES, Contender, in_turn, machine, middle
from bench.torch_models import TORCH_MODELS, channels_first, check, load
from jaxlayout import auto_layout

OURS, THEIRS = ("auto_layout", "relaxed"), ("eager", "compile")
PEAK_SIDE = 3072
#: what the table says where it is set
TOLD = ("OMP_WAIT_POLICY", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX")
#: sides for --small, where it is not 64
SMALL = {"unet3d": 16, "vae3d_decoder": 4}

#: What results may differ by, relative to their rms: enough to tell one network from another. How well each is computed
#: is another matter; EfficientNet with random weights makes 1e-3 of a rounding.
SAME = 1e-2


def peak() -> Contender:
    """A large matrix product."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((PEAK_SIDE, PEAK_SIDE), np.float32))
    product = jax.jit(jnp.matmul)
    return lambda: jax.block_until_ready(product(x, x))


def contenders_of(
    name: str, batch: int, size: int, table: str | None, budget: float
) -> tuple[dict[str, Contender], dict[str, Any]]:
    """What is to be timed, and facts about it."""
    apply, params, images = ALL_MODELS[name].build(batch, size, jax.random.key(0))
    plain = jax.jit(apply)
    strict, relaxed = (
        auto_layout(apply, table=table, time_budget=budget, numerics=numerics).freeze(params)
        for numerics in ("strict", "relaxed")
    )
    module, pixels = load(name, params), channels_first(images)
    calls: dict[str, Contender] = {
        "jit": lambda: jax.block_until_ready(plain(params, images)),
        "auto_layout": lambda: jax.block_until_ready(strict(images)),
        "relaxed": lambda: jax.block_until_ready(relaxed(images)),
        "eager": lambda: module(pixels),
    }
    facts: dict[str, Any] = {"compile_failed": None}
    torch.compiler.reset()
    compiled = torch.compile(module)
    try:
        compiled(pixels)
        calls["compile"] = lambda: compiled(pixels)
    except Exception as error:  # no C++ compiler, most likely
        facts["compile_failed"] = " of ".join(type(e).__name__ for e in (error, error.__cause__) if e is not None)
    return calls, facts


def apart(found: Any, expected: np.ndarray) -> float:
    """The largest difference, relative to the rms."""
    if isinstance(found, torch.Tensor):
        found = found.movedim(1, -1).numpy()
    return float(np.max(np.abs(np.asarray(found) - expected)) / np.sqrt(np.mean(expected**2)))


def run(name: str, table: str | None, rounds: int, small: bool, budget: float) -> Row:
    """One row."""
    model = ALL_MODELS[name]
    batch, size = (1, SMALL.get(name, 64)) if small else (model.batch, model.size)
    parameters, macs = check(model, batch, size)
    calls, facts = contenders_of(name, batch, size, table, budget)
    expected = np.asarray(calls["jit"]())
    errors = {key: apart(call(), expected) for key, call in calls.items()}
    if not max(errors.values()) < SAME:
        raise AssertionError(f"{name}: the results disagree: {errors}")
    seconds = in_turn(calls | {"peak": peak()}, rounds)
    faster = min((key for key in THEIRS if key in seconds), key=lambda key: statistics.median(seconds[key]))
    ratios = {key: middle([a / b for a, b in zip(seconds[faster], seconds[key], strict=True)]) for key in OURS}
    gflops = 2 * PEAK_SIDE**3 / min(seconds.pop("peak")) / 1e9
    times = {key: middle([1e3 * s for s in values]) for key, values in seconds.items()}
    return {
        "case": name,
        "input": model.images(batch, size).shape,
        "parameters": parameters,
        "macs": macs,
        "ms": {key: median for key, (median, _) in times.items()},
        "ms_spread": {key: spread for key, (_, spread) in times.items()},
        "faster_torch": faster,
        "ratio": ratios["auto_layout"][0],
        "spread": ratios["auto_layout"][1],
        "relaxed_ratio": ratios["relaxed"][0],
        "relaxed_spread": ratios["relaxed"][1],
        "peak_gflops": gflops,
        "of_peak": {key: 2 * macs / (1e6 * median) / gflops for key, (median, _) in times.items()},
        "apart": errors,
        **facts,
    }


def markdown(rows: list[Row], command: str) -> str:
    """The table, and in words who is faster."""

    def ms(row: dict[str, Any], key: str) -> str:
        return f"{row['ms'][key]:.1f} ±{row['ms_spread'][key]:.1f}" if key in row["ms"] else row["compile_failed"]

    head = (
        "| network | input | Mparameters | GMACs | jit ms | auto_layout ms | relaxed ms | torch ms | torch.compile ms |"
        " torch / auto_layout | torch / relaxed | of peak: auto_layout, torch | apart: auto_layout, relaxed, torch |\n"
        f"{'|---' * 13}|\n"
    )
    lines = [
        f"| {r['case']} | {'x'.join(map(str, r['input']))} | {r['parameters'] / 1e6:.2f} | {r['macs'] / 1e9:.2f} "
        f"| {' | '.join(ms(r, key) for key in ('jit', *OURS, *THEIRS))} | **{r['ratio']:.2f}x** ±{r['spread']:.2f} "
        f"| **{r['relaxed_ratio']:.2f}x** ±{r['relaxed_spread']:.2f} "
        f"| {r['of_peak']['auto_layout']:.0%}, {r['of_peak'][r['faster_torch']]:.0%} of {r['peak_gflops']:.0f} GFLOP/s "
        f"| {', '.join(format(r['apart'][key], '.0e') for key in (*OURS, r['faster_torch']))} |"
        for r in rows
    ]

    def named(prefix: str, which: Callable[[float, float], bool]) -> str:
        pairs = [(r["case"], r[f"{prefix}ratio"], r[f"{prefix}spread"]) for r in rows]
        return ", ".join(f"{case} ({ratio:.2f}x)" for case, ratio, spread in pairs if which(ratio, spread)) or "none"

    verdicts = [
        f"- {who} is {what} the faster PyTorch: {named(prefix, which)}"
        for who, prefix in (("auto_layout", ""), ("relaxed", "relaxed_"))
        for what, which in (
            ("slower than", lambda ratio, spread: ratio + spread < 1),
            ("within the spread of", lambda ratio, spread: abs(ratio - 1) <= spread),
            ("faster than", lambda ratio, spread: ratio - spread > 1),
        )
    ]
    told = "".join(f"{name}={value} " for name in TOLD if (value := os.environ.get(name)))
    where = f"{machine()}, torch {torch.__version__}, weights frozen, `{''.join(told)}{command}`"
    return f"{where}\n\n{head}" + "\n".join(lines) + "\n\n" + "\n".join(verdicts) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Run the models and write the tables, after each model anew."""
    parser = arguments("against_torch", __doc__, TORCH_MODELS)
    parser.add_argument("--rounds", type=int, default=11)
    given = parsed(parser, TORCH_MODELS, argv)
    torch.set_num_threads(CORES)
    torch._inductor.config.freezing = True

    def row(name: str) -> Row:
        with torch.no_grad():
            found = run(name, given.table, given.rounds, given.small, given.budget)
        jax.clear_caches()
        gc.collect()
        return found

    stem = given.out / f"torch-jax{jax.__version__}{'-small' * given.small}"
    command = "python -m bench.against_torch" + " --small" * given.small
    write_rows(stem, given.cases, TORCH_MODELS, row, partial(markdown, command=command))
    return 0


if __name__ == "__main__":
    sys.exit(main())
