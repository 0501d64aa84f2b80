"""Many functions under `jax.jit` and under `auto_layout`, in turn in one process: is one slower, what is rewritten?

    python -m bench.corpus [case ...] [--table FILE] [--small] [--budget S] [--out bench/results]

Writes corpus-jax<version>.json and .md into --out, after each case anew; where cases are named, the others' rows stay.
`pip install jaxlayout[corpus]` for the packages that networks come from; where one does not import, its cases say so. A
case that fails says so too, the rest goes on, and the exit status is 1.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import math
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.extend.core import jaxprs_in_params

from bench import networks, scenarios, training
from bench.models import ALL_MODELS, packages, zoo
from bench.models.packages import Program, flax_program, graded
from bench.networks import errors_from, in_float64, normal
from bench.rows import Row, arguments, compared, parsed, write_rows
from bench.timing import first_call, machine, paired
from jaxlayout import auto_layout
from jaxlayout.convs.primitive import CONVOLUTIONS
from jaxlayout.convs.signature import ConvSignature
from jaxlayout.graph.program import equations
from jaxlayout.runtime._compat import open_jaxpr

PAIRS, SECONDS = 61, 7.0
"""At most so many pairs, in about so long."""
WIDE_SECONDS, WIDE_TIMES = 15.0, 4.0
"""A float64 run may take so long, and takes so many times a float32 one."""
FLOOR = 1e-3
"""Of the largest gradient's rms: what an error is relative to where a gradient is smaller."""
NOT_SLOWER = 0.97
HEAVY = 0.9

ABOUT = f"""\
Columns: the group that a function is of (`bench`, the networks of `bench.models`; `user`, what users wrote and
reported; `negative`, where little or nothing should be gained; `flax`, networks of the literature in flax; else the
package that it comes from); inference, loss and gradients with respect to the parameters, which are arguments, or steps
of training in a scan; whether it is conv-heavy, computed from the program as written: its convolutions do at least
{HEAVY:.0%} of the multiply-adds of convolutions and dots (none counted with a zero of a padding or dilation), and more
of them than all other equations compute elements, each counted as often as its scan runs. Medians in ms; ratio, the
median of pairwise ratios, and half its interquartile range; whether the program was rewritten or kept as it was, and
why: one that was kept is the same program on both sides, and its ratio is noise. The largest difference between the two
results, each array's relative to its rms (a gradient's to {FLOOR:g} of the largest one's, where that is more: some are
rounding alone); where rewritten, their errors against a float64 run, where there is one within {WIDE_SECONDS:.0f} s
(Keras computes in float32 whatever it is given); temporary memory, tuned / written; seconds of the first call but for
one run, nothing cached, the plan stored (of jit); seconds of tuning, and how many convolutions and transposes were
timed: fewer where cases before had the same."""


What = Literal["inference", "gradient", "training"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A function of the corpus."""

    group: str
    build: Callable[[bool], Program]
    """Makes it, small or not, and its arguments."""
    what: What = "inference"
    needs: str | None = None
    """A package that may not be there."""


# The networks of bench.models


def model(name: str, batch: int, size: int, gradient: bool, small: bool) -> Program:
    found = ALL_MODELS[name]
    volume = found.depth is not None
    batch, size = (1, 8 if name == "vae3d_decoder" else 16 if volume else 32) if small else (batch, size)
    apply, variables, images = found.build(batch, size, jax.random.key(0))
    if not gradient:
        return apply, (variables, images)
    train = found.train_apply
    assert train is not None
    variables = dict(variables)
    params = variables.pop("params")
    return graded(lambda p, state, x: train({"params": p, **state}, x)[0]), (params, variables, images)


# What users wrote


def loop(case: training.Case) -> Program:
    return case.fun, case.args


def alphazero_scan(small: bool) -> Program:
    """As `bench.training`'s, an eighth of its batch."""
    batch, steps, side = 4 if small else 8, 2, 9

    def loss(out: Any, searched: jax.Array, outcome: jax.Array) -> jax.Array:
        policy, value = out
        return optax.softmax_cross_entropy(policy, searched).mean() + jnp.square(value - outcome).mean()

    searched = jax.nn.softmax(normal(steps, batch, side * side + 1, scale=3.0))
    boards, outcomes = normal(steps, batch, side, side, 17), jnp.sign(normal(steps, batch))
    tower = training.AlphaZero(blocks=1 if small else 3)
    return loop(training.trained(tower, optax.adam(1e-3), loss, boards, searched, outcomes))


def keras23041_depthwise(small: bool) -> Program:
    """Depthwise in NCHW, and its gradients."""
    batch, features, side = (1, 4, 8) if small else (16, 32, 64)

    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.square(lax.conv_general_dilated(x, w, (1, 1), "SAME", feature_group_count=features)).mean()

    return jax.value_and_grad(loss, (0, 1)), (normal(features, 1, 3, 3), normal(batch, features, side, side))


def nchw_autoencoder(small: bool) -> Program:
    """NCHW down by strides and up by transposed convolutions, and the gradients."""
    batch, side, widths = (1, 16, (3, 4, 8)) if small else (4, 64, (3, 32, 64, 128))

    def loss(weights: Any, x: jax.Array) -> jax.Array:
        down, up = weights
        y = x
        for w in down:
            y = jax.nn.relu(lax.conv_general_dilated(y, w, (2, 2), ((1, 1), (1, 1))))
        for n, w in enumerate(up):
            numbers = ("NCHW", "OIHW", "NCHW")
            pads = ((2, 2), (2, 2))
            y = lax.conv_general_dilated(y, w, (1, 1), pads, lhs_dilation=(2, 2), dimension_numbers=numbers)
            y = jax.nn.relu(y) if n + 1 < len(up) else y
        return jnp.square(y - x).mean()

    pairs = list(pairwise(widths))
    down = [normal(o, i, 4, 4, scale=(8 * i) ** -0.5) for i, o in pairs]
    up = [normal(i, o, 4, 4, scale=(2 * o) ** -0.5) for i, o in reversed(pairs)]
    return jax.value_and_grad(loss), ((down, up), normal(batch, 3, side, side))


# Where nothing, or little, is to be gained


def resnet_block(small: bool) -> Program:
    """A residual block in NHWC, 3x3 and stored statistics folded: as XLA likes it."""
    batch, side, features = (1, 8, 4) if small else (4, 28, 128)

    def run(weights: Any, x: jax.Array) -> jax.Array:
        y = x
        for n, (w, bias) in enumerate(weights):
            y = scenarios.conv(y, w, "NHWC") + bias
            y = jax.nn.relu(y) if n == 0 else y
        return jax.nn.relu(x + y)

    weights = [(normal(3, 3, features, features, scale=(9 * features) ** -0.5), normal(features)) for _ in range(2)]
    return run, (weights, normal(batch, side, side, features))


def while_conv(small: bool) -> Program:
    """Smooths an image until it hardly changes: nobody knows how often."""
    side, features = (8, 2) if small else (64, 8)

    def run(w: jax.Array, x: jax.Array) -> jax.Array:
        def moved(state: Any) -> jax.Array:
            return state[1] > 1e-3

        def step(state: Any) -> Any:
            y = 0.5 * state[0] + 0.5 * scenarios.conv(state[0], w, "NHWC")
            return y, jnp.abs(y - state[0]).max()

        return lax.while_loop(moved, step, (x, jnp.float32(jnp.inf)))[0]

    w = jnp.abs(normal(3, 3, features, features))
    return run, (w / w.sum((0, 1, 2)), normal(1, side, side, features))


def fourier_layers(small: bool) -> Program:
    """Four layers of a Fourier neural operator (arXiv:2010.08895): convolution by spectra, and none of lax's."""
    batch, side, features, modes = (1, 16, 4, 4) if small else (4, 64, 32, 12)

    def run(weights: Any, x: jax.Array) -> jax.Array:
        for real, imaginary, mix in weights:
            seen = jnp.fft.rfft2(x, axes=(1, 2))
            low = jnp.einsum("bhwi,hwio->bhwo", seen[:, :modes, :modes], lax.complex(real, imaginary))
            seen = jnp.zeros_like(seen).at[:, :modes, :modes].set(low)
            x = jax.nn.gelu(jnp.fft.irfft2(seen, s=x.shape[1:3], axes=(1, 2)) + x @ mix)
        return x

    shape, scale = (modes, modes, features, features), features**-0.5
    weights = [
        (normal(*shape, scale=scale), normal(*shape, scale=scale), normal(features, features, scale=scale))
        for _ in range(4)
    ]
    return run, (weights, normal(batch, side, side, features))


def lstm(small: bool) -> Program:
    """A recurrent network in a scan, and its gradients."""
    length, batch, width = (4, 2, 8) if small else (32, 16, 256)

    def loss(weights: Any, x: jax.Array) -> jax.Array:
        taken, recurrent, bias = weights

        def step(state: Any, x: jax.Array) -> Any:
            h, c = state
            i, f, g, o = jnp.split(x @ taken + h @ recurrent + bias, 4, axis=-1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        start = jnp.zeros((batch, width))
        return jnp.square(lax.scan(step, (start, start), x)[1]).mean()

    weights = [normal(width, 4 * width, scale=width**-0.5) for _ in range(2)]
    return jax.value_and_grad(loss), ((*weights, jnp.zeros(4 * width)), normal(length, batch, width))


# The cases


def kind(gradient: bool) -> What:
    return "gradient" if gradient else "inference"


def bench_case(name: str, gradient: bool = False, batch: int = 2, size: int = 128) -> Case:
    return Case(group="bench", build=partial(model, name, batch, size, gradient), what=kind(gradient))


def flax_case(
    module: Any, shape: tuple[int, ...], tiny: tuple[int, ...], gradient: bool = False, group: str = "flax"
) -> Case:
    def build(small: bool) -> Program:
        return flax_program(module, normal(*(tiny if small else shape)), gradient)

    return Case(group=group, build=build, what=kind(gradient))


def package_case(group: str, name: str, gradient: bool = False, side: int = 128, tiny: int = 32) -> Case:
    """A network of images from a package."""

    def build(small: bool) -> Program:
        images = normal(1, tiny, tiny, 3) if small else normal(2, side, side, 3)
        return packages.BUILDERS[group](name, images, gradient)

    return Case(group=group, build=build, what=kind(gradient), needs=group)


def equinox_case(
    make: Callable[[], Any], shape: tuple[int, ...], tiny: tuple[int, ...], gradient: bool = False
) -> Case:
    def build(small: bool) -> Program:
        return packages.equinox_program(make(), normal(*(tiny if small else shape)), gradient)

    return Case(group="equinox", build=build, what=kind(gradient), needs="equinox")


BENCH = {
    "mobilenet_v2": bench_case("mobilenet_v2"),
    "mobilenet_v2_nchw": bench_case("mobilenet_v2_nchw"),
    "efficientnet_b0": bench_case("efficientnet_b0"),
    "resnet50": bench_case("resnet50"),
    "resnet50_nchw": bench_case("resnet50_nchw"),
    "convnext_tiny": bench_case("convnext_tiny"),
    "unet3d": bench_case("unet3d", batch=1, size=32),
    "vae3d_decoder": bench_case("vae3d_decoder", batch=1, size=8),
    "mobilenet_v2_grad": bench_case("mobilenet_v2", True),
    "resnet50_grad": bench_case("resnet50", True),
    "convnext_tiny_grad": bench_case("convnext_tiny", True, size=96),
    "unet3d_grad": bench_case("unet3d", True, batch=1, size=16),
}
USER = {
    "jax13800_backward": Case(group="user", build=lambda s: scenarios.jax13800_backward(s).written, what="gradient"),
    "jax31662_transposed3d_grad": Case(
        group="user", build=lambda s: scenarios.jax31662_transposed3d_grad(s).written, what="gradient"
    ),
    "equinox432_step": Case(group="user", build=lambda s: scenarios.equinox432_step(s).written, what="gradient"),
    "keras23041_depthwise": Case(group="user", build=keras23041_depthwise, what="gradient"),
    "instance_norm_unet3d": Case(group="user", build=lambda s: scenarios.instance_norm_unet3d(s).written),
    "nchw_autoencoder": Case(group="user", build=nchw_autoencoder, what="gradient"),
    "nchw_scan": Case(group="user", build=lambda s: loop(training.nchw_scan(s))),
    "flax_scan": Case(group="user", build=lambda s: loop(training.flax_scan(s)), what="training"),
    "alphazero_scan": Case(group="user", build=alphazero_scan, what="training"),
}
NEGATIVE = {
    "mlp": Case(group="negative", build=lambda small: networks.mlp()),
    "optimal": Case(group="negative", build=lambda small: networks.optimal()),
    "resnet_block": Case(group="negative", build=resnet_block),
    "one_among_many": Case(group="negative", build=lambda small: networks.one_among_many()),
    "nearest_upsampling": Case(group="negative", build=lambda s: scenarios.nearest_upsampling(s).written),
    "vit": flax_case(zoo.ViT(), (4, 128, 128, 3), (1, 32, 32, 3), group="negative"),
    "vit_grad": flax_case(zoo.ViT(), (4, 128, 128, 3), (1, 32, 32, 3), True, group="negative"),
    "lenet": flax_case(zoo.LeNet(), (1, 28, 28, 1), (1, 28, 28, 1), group="negative"),
    "while_conv": Case(group="negative", build=while_conv),
    "fourier_layers": Case(group="negative", build=fourier_layers),
    "lstm": Case(group="negative", build=lstm, what="gradient"),
}
FLAX = {
    "dcgan": flax_case(zoo.DCGAN(), (8, 1, 1, 100), (1, 1, 1, 100)),
    "dcgan_grad": flax_case(zoo.DCGAN(), (8, 1, 1, 100), (2, 1, 1, 100), True),
    "deeplab": flax_case(zoo.DeepLab(), (2, 160, 160, 3), (1, 32, 32, 3)),
    "glow": flax_case(zoo.Glow(), (8, 32, 32, 3), (1, 8, 8, 3)),
    "squeezenet": flax_case(zoo.SqueezeNet(), (2, 128, 128, 3), (1, 32, 32, 3)),
    "shufflenet": flax_case(zoo.ShuffleNet(), (2, 128, 128, 3), (1, 32, 32, 3)),
    "edsr": flax_case(zoo.EDSR(), (1, 64, 64, 3), (1, 8, 8, 3)),
    "fsrcnn": flax_case(zoo.FSRCNN(), (1, 96, 96, 1), (1, 8, 8, 1)),
    "ddpm": flax_case(zoo.DDPM(), (2, 32, 32, 3), (1, 8, 8, 3)),
    "ddpm_grad": flax_case(zoo.DDPM(), (2, 32, 32, 3), (1, 8, 8, 3), True),
    "wavenet": flax_case(zoo.WaveNet(), (1, 4096, 1), (1, 16, 1)),
    "quartznet": flax_case(zoo.QuartzNet(), (2, 400, 64), (1, 16, 64)),
    "convtasnet_grad": flax_case(zoo.ConvTasNet(), (2, 8000, 1), (1, 64, 1), True),
}
PACKAGES = {
    "keras_mobilenet": package_case("keras", "MobileNet"),
    "keras_mobilenet_v2": package_case("keras", "MobileNetV2"),
    "keras_mobilenet_v3": package_case("keras", "MobileNetV3Small"),
    "keras_efficientnet_v2": package_case("keras", "EfficientNetV2B0"),
    "keras_densenet": package_case("keras", "DenseNet121", side=96),
    "keras_xception": package_case("keras", "Xception", tiny=71),
    "keras_resnet_v2": package_case("keras", "ResNet50V2"),
    "keras_convnext": package_case("keras", "ConvNeXtTiny", side=96),
    "keras_mobilenet_grad": package_case("keras", "MobileNet", True),
    "keras_mobilenet_v2_grad": package_case("keras", "MobileNetV2", True),
    "haiku_mobilenet": package_case("haiku", "MobileNetV1"),
    "haiku_resnet18": package_case("haiku", "ResNet18"),
    "haiku_resnet18_grad": package_case("haiku", "ResNet18", True),
    "flaxmodels_resnet18": package_case("flaxmodels", "ResNet18"),
    "flaxmodels_vgg16": package_case("flaxmodels", "VGG16", side=96),
    "jax_resnet_resnext50": package_case("jax_resnet", "ResNeXt50"),
    "jax_resnet_resnet18_grad": package_case("jax_resnet", "ResNet18", True),
    "equinox_unet": equinox_case(packages.equinox_unet, (2, 3, 96, 96), (1, 3, 8, 8)),
    "equinox_unet_grad": equinox_case(packages.equinox_unet, (2, 3, 96, 96), (1, 3, 8, 8), True),
    "equinox_vocoder": equinox_case(packages.equinox_vocoder, (1, 80, 48), (1, 80, 4)),
    "equinox_vocoder_grad": equinox_case(packages.equinox_vocoder, (1, 80, 32), (1, 80, 4), True),
}
CASES: dict[str, Case] = BENCH | USER | NEGATIVE | FLAX | PACKAGES
INSTALLED = {"haiku": "dm-haiku", "jax_resnet": "jax-resnet"}
"""What is called otherwise where it is installed from."""


def work(jaxpr: Any) -> tuple[int, int, int]:
    """Multiply-adds of convolutions and of dots, and elements that everything else computes. A `while` runs once here,
    and of a `cond` every branch."""
    total = np.zeros(3, np.int64)
    for eqn in open_jaxpr(jaxpr).eqns:
        inner = list(jaxprs_in_params(eqn.params))
        if eqn.primitive in CONVOLUTIONS:
            total[0] += ConvSignature.of(*(v.aval for v in eqn.invars), eqn.params).products
        elif eqn.primitive.name == "dot_general":
            lhs, contracted = eqn.invars[0].aval, eqn.params["dimension_numbers"][0][0]
            total[1] += math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs.shape[axis] for axis in contracted)
        elif inner:
            total += eqn.params.get("length", 1) * np.sum([work(sub) for sub in inner], axis=0)
        else:
            total[2] += sum(math.prod(v.aval.shape) for v in eqn.outvars)
    convolutions, dots, elements = total.tolist()
    return convolutions, dots, elements


def is_heavy(convolutions: int, dots: int, elements: int) -> bool:
    """Whether a program is mostly convolutions."""
    return convolutions >= HEAVY * (convolutions + dots) and convolutions > elements


def all_wide(fun: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether a function computes in float64 when given that: some cast to float32 what they are given."""

    def widened(x: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, np.float64 if jnp.issubdtype(x.dtype, np.floating) else x.dtype)

    with jax.enable_x64(True):
        jaxpr = jax.make_jaxpr(fun)(*jax.tree.map(widened, args))
    inside = [v.aval for eqn in equations(jaxpr) if eqn.primitive in CONVOLUTIONS for v in eqn.invars]
    return all(x.dtype == np.float64 for x in (*inside, *jaxpr.out_avals) if jnp.issubdtype(x.dtype, np.floating))


def apart(exact: Any, out: Any, gradient: bool) -> float:
    """The largest difference of any array, relative to its rms. That of a loss is none of the gradients' beside it."""
    pairs = zip(exact, out, strict=True) if isinstance(exact, tuple) else [(exact, out)]
    return max(errors_from(e, o, floor=FLOOR * gradient)[0] for e, o in pairs)


def run(name: str, table: str | None, small: bool, budget: float) -> Row:
    """One row; without a ratio where its package is not there, or the case fails."""
    case = CASES[name]
    row = {"case": name, "group": case.group, "what": case.what}
    if case.needs is not None:
        try:
            importlib.import_module(case.needs)
        except ImportError as error:
            return row | {"missing": str(error)}
        package = INSTALLED.get(case.needs, case.needs)
        row["package"] = f"{package} {importlib.metadata.version(package)}"
    try:
        return row | measured(name, *case.build(small), case.what == "gradient", table, small, budget)
    except Exception as error:
        traceback.print_exc()
        return row | {"failed": repr(error)}
    finally:
        jax.clear_caches()


def measured(
    name: str,
    fun: Callable[..., Any],
    args: tuple[Any, ...],
    gradient: bool,
    table: str | None,
    small: bool,
    budget: float,
) -> Row:
    """What is timed and compared of a function."""
    convolutions, dots, elements = work(jax.make_jaxpr(fun)(*args))
    tune = partial(auto_layout, fun, table=table, time_budget=budget)
    outcome = tune().outcome(*args)
    jax.clear_caches()
    expected, plain_s = first_call(jax.jit(fun), *args)
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), expected)
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(wide)):
        raise ValueError("the case is of no use: its results are not finite")
    jax.clear_caches()
    tuned, plain = tune(), jax.jit(fun)
    found, tuned_s = first_call(tuned, *args)
    jax.block_until_ready(plain(*args))
    seen = paired(plain, tuned, *args, pairs=3) if small else paired(plain, tuned, *args, pairs=PAIRS, seconds=SECONDS)
    row = compared(name, seen, outcome) | {
        "multiply_adds": {"convolutions": convolutions, "dots": dots},
        "elements": elements,
        "heavy": is_heavy(convolutions, dots, elements),
        "apart": apart(wide, found, gradient),
        "error": None,
        "error_jit": None,
        "compile_s": max(0.0, tuned_s - seen.second_ms / 1e3),
        "compile_jit_s": max(0.0, plain_s - seen.first_ms / 1e3),
    }
    if outcome.kept and plain_s + WIDE_TIMES * seen.first_ms / 1e3 < WIDE_SECONDS and all_wide(fun, args):
        exact = in_float64(fun, args)
        row["error"], row["error_jit"] = apart(exact, found, gradient), apart(exact, expected, gradient)
    return row


def markdown(rows: list[Row]) -> str:
    """The table, and what it comes to."""
    head = (
        "| case | group | what | conv-heavy | jit ms | auto_layout ms | ratio | program | apart | error (jit's) |"
        " memory | compile s (jit's) | tuning s (timed) |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|\n"
    )

    def optional(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    def line(r: Row) -> str:
        start = f"| {r['case']} | {r['group']} | {r['what']} "
        if "ratio" not in r:
            said = f"not installed: {r['missing']}" if "missing" in r else f"failed: {r['failed']}"
            return f"{start}| – | – | – | – | {said} | – | – | – | – | – |"
        errors = f"{r['error']:.1e} ({r['error_jit']:.1e})" if r["error"] is not None else "–"
        return (
            f"{start}| {'yes' if r['heavy'] else 'no'} | {r['jit_ms']:.2f} | {r['auto_layout_ms']:.2f} "
            f"| **{r['ratio']:.2f}x** ±{r['spread']:.2f} | {'rewritten' if r['kept'] else 'kept'}: {r['reason']} "
            f"| {r['apart']:.0e} | {errors} | {optional(r['memory'], '.2f')} "
            f"| {r['compile_s']:.1f} ({r['compile_jit_s']:.1f}) | {r['tuning_s']:.0f} ({r['timed']}) |"
        )

    versions = sorted({row["package"] for row in rows if "package" in row})
    top = ", ".join((machine(), *versions, "`python -m bench.corpus`"))
    return "\n\n".join((top, ABOUT, head + "\n".join(map(line, rows)), summary(rows))) + "\n"


def summary(rows: list[Row]) -> str:
    """What the table comes to."""
    seen = [row for row in rows if "ratio" in row]
    rewritten = [row for row in seen if row["kept"]]
    heavy = [row for row in seen if row["heavy"]]
    lines = [f"{len(rows)} cases: {len(rewritten)} rewritten, {len(seen) - len(rewritten)} kept"]
    for key, said in (("missing", "not installed"), ("failed", "failed")):
        if names := [row["case"] for row in rows if key in row]:
            lines[0] += f", {len(names)} {said} ({', '.join(names)})"
    lines.append(f"of {len(heavy)} conv-heavy ones {sum(row['kept'] for row in heavy)} rewritten")
    if rewritten:
        mean = math.exp(sum(math.log(row["ratio"]) for row in rewritten) / len(rewritten))
        lines.append(f"geometric mean of the rewritten ones' ratios {mean:.2f}x")
    if seen:
        least = min(seen, key=lambda row: row["ratio"])
        lines.append(f"least ratio {least['ratio']:.3f}x, {said_of(least)}")
    slower = [row for row in seen if row["ratio"] < NOT_SLOWER]
    said = ": " + ", ".join(f"{said_of(row)} {row['ratio']:.3f}x" for row in slower) if slower else ""
    lines.append(f"{len(slower)} below {NOT_SLOWER}x{said}")
    return "\n".join(f"- {line}" for line in lines)


def said_of(row: Row) -> str:
    return f"{row['case']} ({'rewritten' if row['kept'] else 'kept'})"


def main(argv: list[str] | None = None) -> int:
    """Run the cases and write the tables, after each case anew; the exit status is 1 if a case failed."""
    given = parsed(arguments("corpus", __doc__, CASES, 7200.0), CASES, argv)
    failed = False

    def one(name: str) -> Row:
        nonlocal failed
        row = run(name, given.table, given.small, given.budget)
        failed |= "failed" in row
        return row

    write_rows(given.out / f"corpus-jax{jax.__version__}{'-small' * given.small}", given.cases, CASES, one, markdown)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
