"""Training under `jax.jit` and under `auto_layout`, in turn in one process: whole loops, and single steps.

    python -m bench.training [case ...] [--table FILE] [--small] [--budget S] [--keep-memory] [--out bench/results]

Writes training-jax<version>.json and .md into --out; where cases are named, the others' rows stay. `--keep-memory`:
all of it, jit and PyTorch too, after `jaxlayout.keep_freed_memory()`, into training-kept-jax<version>.

`..._scan` are loops: several steps in a `lax.scan`, jitted as one function of (state, batches). `jax12868` is the loop
of that issue of JAX, also paired with what its author could have written: the loop unrolled, or channels last. The rest
are one step outside a loop, batch 4, 224x224, in training mode, gradient descent.

Columns: medians in ms; ratio, the median of pairwise ratios, and half its interquartile range; where only the loss is
decorated and differentiated inside a plain jit, its time over that of the decorated step (above 1: decorate the step);
errors of state and losses against a float64 run, each array's relative to its rms (a dash where that run would take
over a minute); temporary memory tuned / written; seconds of tuning, and how many convolutions and transposes were
timed; seconds of the first call but for one run, with the plan stored (of jit). PyTorch, where it is installed: the
same step in eager mode, channels last, its time over auto_layout's.
"""

from __future__ import annotations

import importlib.util
import math
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from bench.models import ALL_MODELS
from bench.networks import errors, normal
from bench.rows import arguments, compared, parsed, write_rows
from bench.timing import CORES, Contender, first_call, in_turn, machine, middle, paired
from jaxlayout import auto_layout, keep_freed_memory

Transform = Callable[[Callable[..., Any]], Callable[..., Any]]

RATE = 0.01
WIDE_SECONDS, WIDE_TIMES = 60.0, 4.0
"""A float64 run may take so long, and takes so many times a float32 one."""
SECONDS = 60.0
"""Of pairs, for each comparison."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is timed."""

    fun: Callable[..., Any]
    args: tuple[Any, ...]
    inside: Callable[[Transform], Callable[..., Any]] | None = None
    """The same function, its loss transformed before it is differentiated."""
    rivals: Mapping[str, Contender] = field(default_factory=dict)
    """Other ways to write it, jitted."""
    quick: Callable[..., Any] | None = None
    """The same function, if another form of it is quicker in float64."""
    torch: Callable[[], tuple[Any, Callable[[], float]]] | None = None
    """The network and the step in PyTorch."""


# Loops


def trained(module: nn.Module, tx: Any, loss: Callable[..., Any], x: jax.Array, *targets: jax.Array) -> Case:
    """As many steps as batches in (x, *targets); `loss` is of what the module gives and the targets."""
    seeds = iter(range(1000))

    def filled(leaf: jax.ShapeDtypeStruct) -> jax.Array:  # a network's init is slow to compile
        rng = np.random.default_rng(next(seeds))
        if leaf.ndim < 2:
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
        return jnp.asarray(rng.standard_normal(leaf.shape) / math.prod(leaf.shape[:-1]) ** 0.5, leaf.dtype)

    variables = jax.tree.map(filled, jax.eval_shape(module.init, jax.random.key(0), x[0]))
    params = variables.pop("params")

    def step(state: Any, batch: Any) -> Any:
        params, stats, moments = state

        def of(params: Any) -> Any:
            out, changed = module.apply({"params": params, **stats}, batch[0], mutable=["batch_stats"])
            return loss(out, *batch[1:]), changed

        (value, stats), grads = jax.value_and_grad(of, has_aux=True)(params)
        updates, moments = tx.update(grads, moments, params)
        return (optax.apply_updates(params, updates), stats, moments), value

    return Case(
        fun=lambda state, batches: lax.scan(step, state, batches),
        args=((params, variables, tx.init(params)), (x, *targets)),
    )


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def integers(limit: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).integers(0, limit, shape), jnp.int32)


class Small(nn.Module):
    """Three convolutions with group norm."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(3):
            x = nn.relu(nn.GroupNorm(8)(nn.Conv(32, (3, 3))(x)))
        return nn.Dense(10)(x.mean((1, 2)))


def flax_scan(small: bool) -> Case:
    batch = 2 if small else 16
    return trained(Small(), optax.adam(1e-3), cross_entropy, normal(4, batch, 24, 24, 8), integers(10, 4, batch))


class AlphaZero(nn.Module):
    """A residual tower over a board, with a policy and a value: Silver et al. (arXiv:1712.01815), narrow."""

    blocks: int = 5
    width: int = 64

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        def normed(x: jax.Array, features: int, kernel: int) -> jax.Array:
            x = nn.Conv(features, (kernel, kernel), use_bias=False)(x)
            return nn.BatchNorm(use_running_average=False, momentum=0.9)(x)

        x = nn.relu(normed(x, self.width, 3))
        for _ in range(self.blocks):
            y = nn.relu(normed(x, self.width, 3))
            x = nn.relu(x + normed(y, self.width, 3))
        policy = nn.relu(normed(x, 2, 1)).reshape(len(x), -1)
        value = nn.relu(normed(x, 1, 1)).reshape(len(x), -1)
        value = nn.Dense(1)(nn.relu(nn.Dense(self.width)(value)))
        return nn.Dense(x.shape[1] * x.shape[2] + 1)(policy), jnp.tanh(value[:, 0])


def alphazero_scan(small: bool) -> Case:
    batch, steps, side = 4 if small else 64, 3, 9

    def loss(out: Any, searched: jax.Array, outcome: jax.Array) -> jax.Array:
        policy, value = out
        return optax.softmax_cross_entropy(policy, searched).mean() + jnp.square(value - outcome).mean()

    boards = normal(steps, batch, side, side, 17)
    searched = jax.nn.softmax(normal(steps, batch, side * side + 1, scale=3.0))
    outcomes = integers(3, steps, batch).astype(jnp.float32) - 1
    tower = AlphaZero(blocks=1) if small else AlphaZero()
    return trained(tower, optax.adam(1e-3), loss, boards, searched, outcomes)


class Impala(nn.Module):
    """The deep network of Espeholt et al. (arXiv:1802.01561), without its memory."""

    actions: int = 15

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        for features in (16, 32, 32):
            x = nn.Conv(features, (3, 3))(x)
            x = nn.max_pool(x, (3, 3), (2, 2), padding="SAME")
            for _ in range(2):
                y = nn.Conv(features, (3, 3))(nn.relu(x))
                x = x + nn.Conv(features, (3, 3))(nn.relu(y))
        x = nn.relu(nn.Dense(256)(nn.relu(x).reshape(len(x), -1)))
        return nn.Dense(self.actions)(x), nn.Dense(1)(x)[:, 0]


def impala_scan(small: bool) -> Case:
    batch, steps, side = 2 if small else 16, 3, 32 if small else 64

    def loss(out: Any, actions: jax.Array, returns: jax.Array) -> jax.Array:
        policy, value = out
        logp = jax.nn.log_softmax(policy)
        advantage = lax.stop_gradient(returns - value)
        chosen = jnp.take_along_axis(logp, actions[:, None], axis=1)[:, 0]
        entropy = -(jnp.exp(logp) * logp).sum(1)
        return (0.5 * jnp.square(returns - value) - chosen * advantage - 0.01 * entropy).mean()

    frames = normal(steps, batch, side, side, 3)
    tx = optax.rmsprop(1e-3, decay=0.99, eps=1e-3)
    return trained(Impala(), tx, loss, frames, integers(15, steps, batch), normal(steps, batch))


def nchw_scan(small: bool) -> Case:
    def run(kernels: Any, images: jax.Array) -> jax.Array:
        def step(carry: None, x: jax.Array) -> tuple[None, jax.Array]:
            for kernel in kernels:
                x = jax.nn.relu(lax.conv_general_dilated(x, kernel, (1, 1), "SAME"))
            return carry, x

        return lax.scan(step, None, images)[1]

    kernels = tuple(normal(64, 64, 3, 3, scale=0.06) for _ in range(2))
    return Case(fun=run, args=(kernels, normal(4, 1 if small else 8, 64, 28, 28)))


def jax12868(small: bool) -> Case:
    """https://github.com/jax-ml/jax/issues/12868"""
    features = 100 if small else 1000
    x, kernel = normal(1, features, 1024), normal(features, features, 1, scale=features**-0.5)

    def loop(conv: Callable[..., Any], x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.fori_loop(0, 2, lambda _, carry: (conv(*carry), carry[1]), (x, kernel))[0]

    def written(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv(x, kernel, (1,), "VALID")

    def last(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(x, kernel, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))

    def twice(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return written(written(x, kernel), kernel)

    unrolled = jax.jit(twice)
    channels_last = jax.jit(partial(loop, last))
    turned = x.transpose(0, 2, 1), kernel.transpose(2, 1, 0)
    return Case(
        fun=partial(loop, written),
        args=(x, kernel),
        quick=twice,
        rivals={"unrolled": lambda: unrolled(x, kernel), "channels last": lambda: channels_last(*turned)},
    )


# Steps


def step(name: str, small: bool) -> Case:
    """One step of a network of `bench.models`."""
    model = ALL_MODELS[name]
    batch, size = 4, 64 if small else 224
    _, variables, images = model.build(batch, size, jax.random.key(0))
    labels = integers(1000, batch)

    def loss(params: Any, stats: Any, images: jax.Array, labels: jax.Array) -> Any:
        assert model.train_apply is not None
        logits, changed = model.train_apply({"params": params, **stats}, images)
        return cross_entropy(logits, labels), changed

    def with_loss(transform: Transform) -> Callable[..., Any]:
        of = jax.value_and_grad(transform(loss), has_aux=True)

        def train(variables: Any, images: jax.Array, labels: jax.Array) -> Any:
            params, stats = variables["params"], {k: v for k, v in variables.items() if k != "params"}
            (value, changed), grads = of(params, stats, images, labels)
            return {"params": jax.tree.map(lambda p, g: p - RATE * g, params, grads), **changed}, value

        return train

    def torch() -> tuple[Any, Callable[[], float]]:
        from bench.torch_models import training

        return training(name, variables, images, labels, RATE)

    args = variables, images, labels
    return Case(fun=with_loss(lambda loss: loss), args=args, inside=with_loss, torch=torch)


LOOPS = (flax_scan, alphazero_scan, impala_scan, nchw_scan, jax12868)
STEPS = ("mobilenet_v2", "efficientnet_b0", "convnext_tiny", "resnet50")
CASES: dict[str, Callable[[bool], Case]] = {build.__name__: build for build in LOOPS} | {
    name: partial(step, name) for name in STEPS
}
GOALS = {"flax_scan": 40.0, "alphazero_scan": 15.0, "impala_scan": 15.0, "nchw_scan": 20.0}
GOALS |= {"mobilenet_v2": 6.0, "efficientnet_b0": 6.0, "convnext_tiny": 2.5, "resnet50": 1.3}
"""How many times faster than jit each is to be. (jax12868: within 1.2 times of the fastest plain form.)"""


def run(name: str, table: str | None, small: bool, budget: float) -> dict[str, Any]:
    """One row."""
    case = CASES[name](small)
    args = case.args
    tune = partial(auto_layout, table=table, time_budget=budget)
    compare = partial(paired, pairs=3) if small else partial(paired, seconds=SECONDS)
    outcome = tune(case.fun).outcome(*args)
    plain, tuned = jax.jit(case.fun), tune(case.fun)
    found, tuned_s = first_call(tuned, *args)
    expected, plain_s = first_call(plain, *args)
    seen = compare(plain, tuned, *args)
    row = compared(name, seen, outcome) | {
        "goal": GOALS.get(name),
        "error": None,
        "error_jit": None,
        "compile_s": max(0.0, tuned_s - seen.second_ms / 1e3),
        "compile_jit_s": max(0.0, plain_s - seen.first_ms / 1e3),
        "rivals": {},
    }
    if case.inside is not None:
        inside = jax.jit(case.inside(tune))
        jax.block_until_ready(inside(*args))
        other = compare(inside, tuned, *args)
        row |= {"inside_ms": other.first_ms, "inside_ratio": other.ratio, "inside_spread": other.spread}
    for label, rival in case.rivals.items():
        jax.block_until_ready(rival())
        other = compare(lambda *_, rival=rival: rival(), tuned, *args)
        row["rivals"][label] = {"ms": other.first_ms, "ratio": other.ratio, "spread": other.spread}
    if case.quick is not None or plain_s + WIDE_TIMES * seen.first_ms / 1e3 < WIDE_SECONDS:
        row["error"], row["error_jit"] = errors(case.quick or case.fun, args, found, expected)
    if case.torch is not None and importlib.util.find_spec("torch") is not None:
        row |= against_torch(case.torch, lambda: jax.block_until_ready(tuned(*args)), float(expected[1]), small)
    jax.clear_caches()
    return row


def against_torch(make: Any, ours: Contender, loss: float, small: bool) -> dict[str, Any]:
    """The columns of PyTorch, which has to find the same loss at the first step."""
    import torch

    torch.set_num_threads(CORES)
    _, theirs = make()
    if not math.isclose(first := theirs(), loss, rel_tol=1e-2):
        raise AssertionError(f"the loss is {loss} in JAX, {first} in PyTorch")
    seconds = in_turn({"auto_layout": ours, "torch": theirs}, 3 if small else 11)
    if not math.isfinite(theirs()):
        raise AssertionError("PyTorch's loss is not finite")
    ratio, spread = middle([a / b for a, b in zip(seconds["torch"], seconds["auto_layout"], strict=True)])
    milliseconds = 1e3 * statistics.median(seconds["torch"])
    return {"torch": torch.__version__, "torch_ms": milliseconds, "torch_ratio": ratio, "torch_spread": spread}


def markdown(rows: list[dict[str, Any]], command: str) -> str:
    """The table, and what its loops are held against."""
    head = (
        "| case | jit ms | auto_layout ms | ratio | goal | loss decorated / step decorated | error (jit's) | memory |"
        " tuning s (timed) | compile s (jit's) | torch ms | torch / auto_layout | verdict |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|\n"
    )

    def times(row: dict[str, Any], key: str) -> str:
        return f"{row[f'{key}_ratio']:.2f}x ±{row[f'{key}_spread']:.2f}" if f"{key}_ratio" in row else "–"

    def optional(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    def goal(row: dict[str, Any]) -> str:
        return f"{row['goal']:g}x {'met' if row['ratio'] >= row['goal'] else 'not met'}" if row["goal"] else ""

    lines = [
        f"| {r['case']} | {r['jit_ms']:.1f} | {r['auto_layout_ms']:.1f} | **{r['ratio']:.2f}x** ±{r['spread']:.2f} "
        f"| {goal(r)} | {times(r, 'inside')} | {optional(r['error'], '.1e')} ({optional(r['error_jit'], '.1e')}) "
        f"| {optional(r['memory'], '.2f')} | {r['tuning_s']:.0f} ({r['timed']}) "
        f"| {r['compile_s']:.1f} ({r['compile_jit_s']:.1f}) | {optional(r.get('torch_ms'), '.1f')} "
        f"| {times(r, 'torch')} | {r['reason']} |"
        for r in rows
    ]
    rivals = [
        f"- {r['case']}: "
        + ", ".join(f"{k} {v['ms']:.1f} ms, {v['ratio']:.2f}x ±{v['spread']:.2f}" for k, v in r["rivals"].items())
        + f" of auto_layout's time; the fastest plain form: {min(r['rivals'], key=lambda k: r['rivals'][k]['ms'])}"
        for r in rows
        if r["rivals"]
    ]
    torch = next((f", torch {r['torch']}" for r in rows if "torch" in r), "")
    top = f"{machine()}{torch}, `{command}`"
    return "\n\n".join((top, head + "\n".join(lines), *(["\n".join(rivals)] if rivals else []))) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Run the cases and write the tables, after each case anew."""
    parser = arguments("training", __doc__, CASES, 7200.0)
    parser.add_argument("--keep-memory", action="store_true", help="after jaxlayout.keep_freed_memory()")
    given = parsed(parser, CASES, argv)
    if given.keep_memory and not keep_freed_memory():
        parser.error("--keep-memory: this C library does not know how")
    write_rows(
        given.out / f"training{'-kept' * given.keep_memory}-jax{jax.__version__}{'-small' * given.small}",
        given.cases,
        CASES,
        lambda name: run(name, given.table, given.small, given.budget),
        partial(markdown, command="python -m bench.training" + " --keep-memory" * given.keep_memory),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
