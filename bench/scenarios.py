"""What a fixed layout costs, a video decoder, and what users have reported, under `jax.jit` and under `auto_layout`.

    python -m bench.scenarios [case ...] [--table FILE] [--small] [--budget S] [--out bench/results]

Writes scenarios-jax<version>.json and .md into --out; where cases are named, the others' rows stay.

The four layout scenarios, float32 unless said: `native`, a 3x3 convolution in NHWC, XLA:CPU's own order; `other`, in
NCHW; `five`, five operations in NCHW (convolution, normalisation by stored statistics, relu, convolution, pooling);
`mixed`, a chain of bfloat16 convolutions by turns in NCHW and NHWC, with casts to float32 for what is between them and
a transpose at each change of order. Each in the entry computation and, `..._loop`, as the body of a `lax.scan` over
other images each time. XLA:CPU repairs orders in the entry computation itself: what is expected from a change of
layout is expected in the loop, and of the entry computation the table says what was left. `by hand`: the same written
in NHWC throughout, its arguments in that order already, without a transpose, under `jax.jit`: its time over
auto_layout's (below 1: by hand is faster).

`video_...`: a causal decoder of volumes in NCDHW (`bench.models.video`). `jax...`, `equinox...`: as users reported
them, by the project and the number of the issue, sizes scaled to two cores; more of them are single convolutions, and
in `bench.lowerings`, and one is a loop of its own, in `bench.training`. The last are known to lose from channels last
elsewhere: nothing should be lost.

Columns: medians in ms; ratio, the median of pairwise ratios, and half its interquartile range; the share of time
saved; what was expected (`not slower`: 0.97x, for noise) and whether it is met, and that the program was left unchanged
where it was: then around 1 is noise; where another plan is chosen without the limit on memory, how many times faster
than jit that is, and its temporary memory; the largest difference between the two results, relative to their rms;
temporary memory tuned / written; seconds of tuning and how many convolutions and transposes were timed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bench.lowerings import KERNELS
from bench.models import video
from bench.networks import errors_from, normal
from bench.rows import Row, arguments, compared, parsed, write_rows
from bench.timing import machine, paired
from jaxlayout import auto_layout

SECONDS = 20.0
"""About how long the pairs of one comparison may take."""
ITERATIONS = 3
"""Of a loop."""
NOT_SLOWER = 0.97

Program = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function and its arguments."""


@dataclass(frozen=True, slots=True)
class Case:
    """What is timed."""

    written: Program
    by_hand: Program | None = None
    """The same as one who knows XLA:CPU would have written it, on arguments in that order."""


# The layout scenarios: a body in either order, of (weights, images)


def conv(x: jax.Array, w: jax.Array, order: str) -> jax.Array:
    """A convolution that keeps the size."""
    rank = len(order) - 2
    return lax.conv_general_dilated(x, w, (1,) * rank, "SAME", dimension_numbers=(order, KERNELS[order], order))


def single(order: str, weights: Any, x: jax.Array) -> jax.Array:
    return conv(x, weights[0], order)


def five(order: str, weights: Any, x: jax.Array) -> jax.Array:
    first, scale, shift, second = weights
    x = conv(x, first, order)
    x = x * per_feature(scale, order) + per_feature(shift, order)
    x = conv(jax.nn.relu(x), second, order)
    window = tuple(1 if axis in "NC" else 2 for axis in order)
    return lax.reduce_window(x, -jnp.inf, lax.max, window, window, "VALID")


def mixed(order: str, weights: Any, x: jax.Array) -> jax.Array:
    """Residual blocks of two convolutions: the first in `order`, the second in NHWC always."""
    for first, scale, second in weights:
        y = x - x.mean(order.index("C"), keepdims=True)
        y = conv(y.astype(jnp.bfloat16), first, order).astype(jnp.float32)
        y = jax.nn.silu(y * per_feature(scale, order))
        y = conv(transposed(y, order, "NHWC").astype(jnp.bfloat16), second, "NHWC").astype(jnp.float32)
        x = x + transposed(y, "NHWC", order)
    return x


def per_feature(vector: jax.Array, order: str) -> jax.Array:
    """To be multiplied with images in an order."""
    return vector.reshape([-1 if axis == "C" else 1 for axis in order])


def transposed(x: jax.Array, held: str, wanted: str) -> jax.Array:
    return x.transpose([held.index(axis) for axis in wanted])


def kernel(order: str, features: int, dtype: Any = jnp.float32) -> jax.Array:
    sizes = {"H": 3, "W": 3, "I": features, "O": features}
    return normal(*(sizes[axis] for axis in KERNELS[order]), scale=(9 * features) ** -0.5).astype(dtype)


def weights_of(body: Any, order: str, features: int) -> Any:
    """Those that a body takes in an order."""
    if body is single:
        return (kernel(order, features),)
    if body is five:
        return kernel(order, features), 1 + normal(features, scale=0.1), normal(features), kernel(order, features)
    half = jnp.bfloat16
    block = (kernel(order, features, half), 1 + normal(features, scale=0.1), kernel("NHWC", features, half))
    return (block,)


def scenario(body: Any, order: str, looped: bool, small: bool) -> Case:
    batch, side, features = (1, 8, 4) if small else (4, 28, 64) if looped else (8, 56, 64)

    def written_in(order: str) -> Program:
        sizes = {"N": batch, "H": side, "W": side, "C": features}
        shape = [sizes[axis] for axis in order]
        weights, fun = weights_of(body, order, features), partial(body, order)
        if not looped:
            return fun, (weights, normal(*shape))

        def loop(weights: Any, images: jax.Array) -> jax.Array:
            return lax.scan(lambda carry, x: (carry, fun(weights, x)), None, images)[1]

        return loop, (weights, normal(ITERATIONS, *shape))

    return Case(written_in(order), None if order == "NHWC" else written_in("NHWC"))


# Video


def decoder(dtype: Any, small: bool) -> Case:
    return Case((video.decode, video.build(small, dtype)))


# As reported


def jax31662_transposed3d_grad(small: bool) -> Case:
    """The gradient of a transposed convolution's weights, per example (there: a volume of 64x64x32)."""
    features, *sides = (4, 6, 6, 4) if small else (64, 32, 32, 16)
    numbers, pads = ("NCDHW", "OIDHW", "NCDHW"), ((1, 2),) * 3

    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        y = lax.conv_general_dilated(x[None], w, (1, 1, 1), pads, lhs_dilation=(2, 2, 2), dimension_numbers=numbers)
        return y.mean()

    w, x = normal(1, features, 3, 3, 3, scale=0.05), normal(1, features, *sides)
    return Case((jax.vmap(jax.grad(loss), (None, 0)), (w.astype(jnp.bfloat16), x.astype(jnp.bfloat16))))


def jax13800_backward(small: bool) -> Case:
    """Gradients through twelve grouped convolutions of sequences (there: a batch of 32)."""
    layers, batch, features, groups, length = (2, 1, 8, 2, 16) if small else (12, 2, 512, 8, 1024)

    def loss(kernels: Any, x: jax.Array) -> jax.Array:
        for w in kernels:
            numbers = ("NCW", "OIW", "NCW")
            x = lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=numbers, feature_group_count=groups)
            x = jax.nn.relu(x)
        return jnp.square(x).mean()

    width = features // groups
    kernels = tuple(normal(features, width, 5, scale=(2.5 * width) ** -0.5) for _ in range(layers))
    return Case((jax.grad(loss), (kernels, normal(batch, features, length))))


def equinox432_step(small: bool) -> Case:
    """Convolutions that know no batch, CHW, under vmap: the gradients of a small classifier."""
    batch, side, widths = (2, 8, (3, 4, 8)) if small else (32, 64, (3, 32, 64, 64))

    def logits(weights: Any, image: jax.Array) -> jax.Array:
        *kernels, head = weights
        x = image
        for w in kernels:
            numbers = ("NCHW", "OIHW", "NCHW")
            x = jax.nn.relu(lax.conv_general_dilated(x[None], w, (1, 1), "SAME", dimension_numbers=numbers)[0])
            x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2), (1, 2, 2), "VALID")
        return x.mean((1, 2)) @ head

    def loss(weights: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        found = jax.vmap(logits, (None, 0))(weights, images)
        return -jnp.take_along_axis(jax.nn.log_softmax(found), labels[:, None], 1).mean()

    kernels = [normal(o, i, 3, 3, scale=(4.5 * i) ** -0.5) for i, o in pairwise(widths)]
    weights = (*kernels, normal(widths[-1], 10, scale=widths[-1] ** -0.5))
    return Case((jax.grad(loss), (weights, normal(batch, 3, side, side), jnp.arange(batch) % 10)))


# Known to lose from channels last


def instance_norm_unet3d(small: bool) -> Case:
    """Two levels down and up again, NCDHW, an instance norm after each convolution."""
    widths, sides = ((2, 4, 8), (4, 4, 4)) if small else ((16, 32, 64), (16, 48, 48))

    def block(x: jax.Array, w: jax.Array) -> jax.Array:
        x = conv(x, w, "NCDHW")
        mean, var = x.mean((2, 3, 4), keepdims=True), x.var((2, 3, 4), keepdims=True)
        return jax.nn.leaky_relu((x - mean) * lax.rsqrt(var + 1e-5))

    def run(down: Any, up: Any, head: Any, x: jax.Array) -> jax.Array:
        skipped = []
        for level, kernels in enumerate(down):
            if level:
                skipped.append(x)
                x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 2, 2, 2), (1, 1, 2, 2, 2), "VALID")
            for w in kernels:
                x = block(x, w)
        for w in up:
            for axis in (2, 3, 4):
                x = jnp.repeat(x, 2, axis=axis)
            x = block(jnp.concatenate((skipped.pop(), x), axis=1), w)
        return conv(x, head, "NCDHW")

    def filled(out: int, features: int) -> jax.Array:
        return normal(out, features, 3, 3, 3, scale=(13.5 * features) ** -0.5)

    pairs = list(zip((1, *widths), widths, strict=False))
    down = tuple((filled(o, i), filled(o, o)) for i, o in pairs)
    up = tuple(filled(i, i + o) for i, o in reversed(pairs[1:]))
    return Case((run, (down, up, filled(3, widths[0]), normal(1, 1, *sides))))


def nearest_upsampling(small: bool) -> Case:
    """NHWC images doubled by nearest neighbours, a convolution after each."""
    batch, side, features = (1, 4, 4) if small else (4, 28, 64)

    def run(kernels: Any, x: jax.Array) -> jax.Array:
        for w in kernels:
            batch, height, width, features = x.shape
            x = jax.image.resize(x, (batch, 2 * height, 2 * width, features), "nearest")
            x = jax.nn.relu(conv(x, w, "NHWC"))
        return x

    return Case((run, ((kernel("NHWC", features), kernel("NHWC", features)), normal(batch, side, side, features))))


SCENARIOS = {"native": (single, "NHWC"), "other": (single, "NCHW"), "five": (five, "NCHW"), "mixed": (mixed, "NCHW")}
VIDEO = {"video_f32": jnp.float32, "video_bf16": jnp.bfloat16}
REPORTED = (jax31662_transposed3d_grad, jax13800_backward, equinox432_step)
NEGATIVE = (instance_norm_unet3d, nearest_upsampling)

CASES: dict[str, Callable[[bool], Case]] = (
    {
        name + "_loop" * looped: partial(scenario, body, order, looped)
        for name, (body, order) in SCENARIOS.items()
        for looped in (False, True)
    }
    | {name: partial(decoder, dtype) for name, dtype in VIDEO.items()}
    | {build.__name__: build for build in (*REPORTED, *NEGATIVE)}
)

EXPECTED = {"other_loop": 1 / (1 - 0.20), "five_loop": 1 / (1 - 0.27), "mixed_loop": 1 / (1 - 0.40)}
EXPECTED |= dict.fromkeys(VIDEO, 1.22)
"""How many times faster than jit each is to be; the others not slower."""


def run(name: str, table: str | None, small: bool, budget: float) -> Row:
    """One row."""
    case = CASES[name](small)
    fun, args = case.written
    compare = partial(paired, pairs=3) if small else partial(paired, seconds=SECONDS)
    plain, tuned = jax.jit(fun), auto_layout(fun, table=table, time_budget=budget)
    found, expected = jax.block_until_ready((tuned(*args), plain(*args)))
    outcome = tuned.outcome(*args)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), expected)
    row = compared(name, seen := compare(plain, tuned, *args), outcome)
    wanted = EXPECTED.get(name, NOT_SLOWER)
    row |= {
        "goal": wanted,
        "met": seen.ratio >= wanted or (wanted == NOT_SLOWER and not outcome.kept),
        "apart": errors_from(wide, found)[0],
    }
    lifted = auto_layout(fun, table=table, time_budget=budget, memory_limit=math.inf)
    if (free := lifted.outcome(*args)).applied.choices != outcome.applied.choices:
        jax.block_until_ready(lifted(*args))
        row["lifted"] = compared(name, compare(plain, lifted, *args), free)
    if case.by_hand is not None:
        best, other = jax.jit(case.by_hand[0]), case.by_hand[1]
        jax.block_until_ready(best(*other))
        against = compare(lambda *_: best(*other), tuned, *args)
        row["by_hand"] = {"ms": against.first_ms, "ratio": against.ratio, "spread": against.spread}
    jax.clear_caches()
    return row


def markdown(rows: list[Row]) -> str:
    """The table."""
    head = (
        "| case | jit ms | auto_layout ms | ratio | time saved | expected | without memory limit (memory) |"
        " by hand ms | by hand / auto_layout | apart | memory | tuning s (timed) | verdict |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|\n"
    )

    def expected(row: Row) -> str:
        if row["goal"] == NOT_SLOWER:
            return f"not slower: {'met' if row['met'] else 'missed'}{'' if row['kept'] else ', unchanged'}"
        share = f", {1 - 1 / row['goal']:.0%} saved" if row["case"] not in VIDEO else ""
        return f"{row['goal']:.2f}x{share}: {'met' if row['met'] else 'missed'}"

    def optional(value: float | None) -> str:
        return "–" if value is None else f"{value:.2f}"

    def lifted(row: Row) -> str:
        other = row.get("lifted")
        return f"{other['ratio']:.2f}x ±{other['spread']:.2f} ({optional(other['memory'])})" if other else "the same"

    def by_hand(row: Row) -> str:
        other = row.get("by_hand")
        return f"{other['ms']:.1f} | {other['ratio']:.2f}x ±{other['spread']:.2f}" if other else "– | –"

    lines = [
        f"| {r['case']} | {r['jit_ms']:.1f} | {r['auto_layout_ms']:.1f} | **{r['ratio']:.2f}x** ±{r['spread']:.2f} "
        f"| {1 - 1 / r['ratio']:.0%} | {expected(r)} | {lifted(r)} | {by_hand(r)} | {r['apart']:.0e} "
        f"| {optional(r['memory'])} | {r['tuning_s']:.0f} ({r['timed']}) | {r['reason']} |"
        for r in rows
    ]
    return f"{machine()}, `python -m bench.scenarios`\n\n{head}" + "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Run the cases and write the tables, after each case anew."""
    given = parsed(arguments("scenarios", __doc__, CASES), CASES, argv)
    write_rows(
        given.out / f"scenarios-jax{jax.__version__}{'-small' * given.small}",
        given.cases,
        CASES,
        lambda name: run(name, given.table, given.small, given.budget),
        markdown,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
