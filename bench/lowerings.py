"""Single convolutions and their gradients under `jax.jit` and under `auto_layout`, in turn in one process.

    python -m bench.lowerings [case ...] [--table FILE] [--out bench/results] [--explain]

Writes lowerings-jax<version>.json and .md into --out after each case; where cases are named, the others' rows stay.
Columns: medians in ms; ratio, the median of pairwise ratios, half its interquartile range, and its target; the lowering
chosen; largest errors against a float64 run, relative to its rms; arithmetic and memory traffic of the tuned function
with their shares of the machine's peaks (`bench.roofline`), and which of the two bounds it. Arithmetic counts products
of two elements, none with a zero of the padding or of a dilation; traffic each operand and result once. The memory
limit is lifted: beside one convolution of XLA's own, which counts none, any temporary memory is much; in a network it
is not.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bench.networks import cost_model, errors_from, normal
from bench.roofline import Peaks, peaks
from bench.rows import compared, write_rows
from bench.timing import machine, paired
from jaxlayout import AutoLayout, Candidate, Outcome, auto_layout
from jaxlayout.convs.primitive import CONVOLUTIONS
from jaxlayout.convs.signature import ConvSignature, written_dims
from jaxlayout.graph.program import equations
from jaxlayout.layout import ConvLayout, KernelLayout
from jaxlayout.measure.jobs import candidate_id
from jaxlayout.measure.reference import reference
from jaxlayout.runtime._compat import eval_equations

SECONDS = 20.0
"""About how long the pairs of one case may take."""

Pass = Literal["forward", "dgrad", "wgrad"]
"""The convolution, its gradient by lhs, its gradient by rhs."""


@dataclass(frozen=True, slots=True)
class Conv:
    """A convolution of float32 arrays in the order of its `layout`; strides and dilations are the same for all axes."""

    lhs: tuple[int, ...]
    rhs: tuple[int, ...]
    layout: str = "NHWC"
    stride: int = 1
    groups: int = 1
    dilation: int = 1
    transposed: int = 1
    """The stride of a transposed convolution: the dilation of lhs."""

    def __call__(self, x: Any, w: Any) -> Any:
        """The convolution; padding as SAME."""
        rank = len(self.lhs) - 2
        numbers = (self.layout, KERNELS[self.layout], self.layout)
        if self.transposed > 1:
            return lax.conv_transpose(x, w, (self.transposed,) * rank, "SAME", dimension_numbers=numbers)
        return lax.conv_general_dilated(
            x,
            w,
            (self.stride,) * rank,
            "SAME",
            rhs_dilation=(self.dilation,) * rank,
            dimension_numbers=numbers,
            feature_group_count=self.groups,
        )

    def build(self, which: Pass) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """A function with this one convolution, or with the one of its gradient, and its arguments."""
        x, w = normal(*self.lhs), normal(*self.rhs, scale=0.1)

        def forward(x: Any, w: Any) -> Any:
            return self(x, w)

        def dgrad(ct: Any, w: Any) -> Any:
            return jax.linear_transpose(lambda x: self(x, w), jax.ShapeDtypeStruct(self.lhs, ct.dtype))(ct)[0]

        def wgrad(ct: Any, x: Any) -> Any:
            return jax.linear_transpose(lambda w: self(x, w), jax.ShapeDtypeStruct(self.rhs, ct.dtype))(ct)[0]

        if which == "forward":
            return forward, (x, w)
        ct = normal(*jax.eval_shape(forward, x, w).shape)
        return (dgrad, (ct, w)) if which == "dgrad" else (wgrad, (ct, x))


KERNELS = {"NHWC": "HWIO", "NCHW": "OIHW", "NWC": "WIO", "NCW": "OIW", "NDHWC": "DHWIO", "NCDHW": "OIDHW"}
"""The kernel that goes with the order of lhs and out."""

CONVS: dict[str, Conv] = {
    "depthwise3x3": Conv((8, 56, 56, 128), (3, 3, 1, 128), groups=128),
    "depthwise7x7": Conv((8, 56, 56, 96), (7, 7, 1, 96), groups=96),
    "grouped3x3": Conv((8, 28, 28, 256), (3, 3, 8, 256), groups=32),
    "conv3d": Conv((1, 16, 32, 32, 32), (3, 3, 3, 32, 32), "NDHWC"),
    "strided3x3": Conv((8, 56, 56, 128), (3, 3, 128, 128), stride=2),
    "transposed4x4": Conv((8, 28, 28, 64), (4, 4, 64, 64), transposed=2),
    "pointwise": Conv((8, 56, 56, 256), (1, 1, 256, 64)),
    "pointwise_nchw": Conv((8, 256, 56, 56), (64, 256, 1, 1), "NCHW"),
    "dense3x3": Conv((8, 56, 56, 64), (3, 3, 64, 64)),
    "stem7x7": Conv((8, 224, 224, 3), (7, 7, 3, 64), stride=2),
    # What users have reported, by the project and the number of the issue.
    "jax23783_transposed1d": Conv((8, 4096, 64), (16, 64, 64), "NWC", transposed=8),
    "jax23713_depthwise_nchw": Conv((1, 256, 124, 124), (256, 1, 3, 3), "NCHW", groups=256),
    "jax13800_depthwise1d": Conv((32, 512, 1024), (512, 1, 5), "NCW", groups=512),
    "jax13800_grouped1d": Conv((32, 512, 1024), (512, 64, 5), "NCW", groups=8),
    "jax26266_depthwise_dilated": Conv((32, 1024, 128), (7, 1, 128), "NWC", groups=128, dilation=2),
    "jax8537_transposed3d": Conv((1, 8, 16, 16, 32), (4, 4, 4, 32, 32), "NDHWC", transposed=2),
    "keras23041_depthwise_nchw": Conv((16, 32, 64, 64), (32, 1, 3, 3), "NCHW", groups=32),
    # What is known to lose from another layout: nothing should be lost.
    "two_groups_nchw": Conv((4, 224, 112, 112), (224, 112, 3, 3), "NCHW", stride=2, groups=2),
}

PASSES: dict[str, tuple[Pass, ...]] = {
    "stem7x7": ("forward", "wgrad"),
    "jax23713_depthwise_nchw": ("forward",),
    "jax13800_depthwise1d": ("wgrad",),
    "jax13800_grouped1d": ("wgrad",),
    "jax26266_depthwise_dilated": ("forward",),
    "jax8537_transposed3d": ("forward",),
    "keras23041_depthwise_nchw": ("forward",),
    "two_groups_nchw": ("forward",),
}
"""Which of them are run, where not all three."""

CASES: dict[str, tuple[Conv, Pass]] = {
    name if which == "forward" else f"{name}_{which}": (conv, which)
    for name, conv in CONVS.items()
    for which in PASSES.get(name, ("forward", "dgrad", "wgrad"))
}

TARGETS: dict[str, tuple[float, float]] = {
    "depthwise3x3": (18, 30),
    "depthwise3x3_dgrad": (18, 30),
    "depthwise3x3_wgrad": (10, 10),
    "depthwise7x7": (14, 14),
    "depthwise7x7_dgrad": (16, 16),
    "depthwise7x7_wgrad": (4, 4),
    "grouped3x3": (2, 4),
    "grouped3x3_wgrad": (140, 140),
    "conv3d": (4.5, 4.5),
    "conv3d_dgrad": (4, 4),
    "conv3d_wgrad": (4, 4),
    "strided3x3_dgrad": (1.6, 6),
    "transposed4x4_wgrad": (15, 15),
    "pointwise": (1.15, 2.5),
}
"""The ratios hoped for under jax 0.12 and under 0.10."""


def target(name: str) -> float | None:
    """That of a case under this jax."""
    if name not in TARGETS:
        return None
    newer, older = TARGETS[name]
    return {"0.12": newer, "0.10": older}.get(".".join(jax.__version__.split(".")[:2]))


def only_convolution(jaxpr: Any) -> tuple[ConvSignature, Candidate]:
    """What the one convolution of a program computes, and how it is written."""
    (eqn,) = (eqn for eqn in equations(jaxpr) if eqn.primitive in CONVOLUTIONS)
    lhs, rhs = (v.aval for v in eqn.invars)
    return ConvSignature.of(lhs, rhs, eqn.params), Candidate("xla", written_dims(eqn.params))


def chosen(outcome: Outcome, written: Candidate) -> Candidate:
    """How the plan computes it."""
    return next((mode.candidate for mode in outcome.plan.choices.values() if mode.candidate is not None), written)


def exact(f: Callable[..., Any], args: tuple[Any, ...]) -> np.ndarray:
    """The output of a function in float64, its convolution by numpy: XLA takes minutes for some of them."""

    def convolved(eqn: Any, operands: Any) -> Any:
        if eqn.primitive not in CONVOLUTIONS:
            return None
        conv, dims = ConvSignature.of(operands[0], operands[1], eqn.params), written_dims(eqn.params)
        last, kernel = ConvLayout.channels_last(conv.rank), KernelLayout.io_last(conv.rank)
        lhs = np.transpose(operands[0], last.permutation_from(dims.lhs))
        rhs = np.transpose(operands[1], kernel.permutation_from(dims.rhs))
        return [jnp.asarray(np.transpose(reference(conv, lhs, rhs), dims.out.permutation_from(last)))]

    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in args]
        return np.asarray(eval_equations(jax.make_jaxpr(f)(*wide), wide, convolved)[0])


def run(name: str, table: str, peak: Peaks, explain: bool = False) -> dict[str, Any]:
    """One row."""
    conv, which = CASES[name]
    f, args = conv.build(which)
    signature, written = only_convolution(jax.make_jaxpr(f)(*args))
    plain, tuned = jax.jit(f), auto_layout(f, table=table, time_budget=math.inf, memory_limit=math.inf)
    found, expected = jax.block_until_ready((tuned(*args), plain(*args)))
    outcome = tuned.outcome(*args)
    if explain:
        print(explained(name, signature, written, tuned, outcome), flush=True)
    error, error_jit = errors_from(exact(f, args), found, expected)
    seen = paired(plain, tuned, *args, seconds=SECONDS)
    wanted, took = target(name), seen.second_ms / 1e3
    flops = 2 * signature.products
    return compared(name, seen, outcome) | {
        "target": wanted,
        "met": None if wanted is None else seen.ratio >= wanted,
        "chosen": str(chosen(outcome, written)),
        "written": str(written),
        "error": error,
        "error_jit": error_jit,
        "gflops_per_s": flops / took / 1e9,
        "flops_share": flops / took / peak.flops_per_s,
        "gbytes_per_s": signature.nbytes / took / 1e9,
        "bytes_share": signature.nbytes / took / peak.bytes_per_s,
        "bound": peak.seconds(flops, signature.nbytes)[1],
        "peaks": asdict(peak),
    }


def explained(name: str, conv: ConvSignature, written: Candidate, tuned: AutoLayout, outcome: Outcome) -> str:
    """All that was measured for a case, the fastest first."""
    model = cost_model(tuned.options.table)
    marks = {candidate_id(written): " (written)"}
    marks[candidate_id(chosen(outcome, written))] = " (chosen)"
    known = sorted(model.known(conv.key).items(), key=lambda item: item[1].median_ns or math.inf)
    lines = [
        f"  {'' if m.median_ns is None else format(m.median_ns / 1e6, '.2f'):>10} ms  {m.status:<6}"
        f"  error {'' if m.error is None else format(m.error, '.1e'):<7}  {one}{marks.get(one, '')}  {m.detail[:60]}"
        for one, m in known
    ]
    return "\n".join([f"{name}: {conv.key}", *lines])


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table."""
    head = (
        "| case | jit ms | auto_layout ms | ratio | target | lowering | error (jit's) | GFLOP/s | GB/s | bound |"
        " verdict |\n|---|---|---|---|---|---|---|---|---|---|---|\n"
    )

    def hoped(row: dict[str, Any]) -> str:
        return "" if row["target"] is None else f"{row['target']:g}x {'met' if row['met'] else 'not met'}"

    lines = [
        f"| {r['case']} | {r['jit_ms']:.2f} | {r['auto_layout_ms']:.2f} | **{r['ratio']:.2f}x** ±{r['spread']:.2f} "
        f"| {hoped(r)} | `{r['chosen']}` | {r['error']:.1e} ({r['error_jit']:.1e}) "
        f"| {r['gflops_per_s']:.1f} ({r['flops_share']:.0%}) | {r['gbytes_per_s']:.1f} ({r['bytes_share']:.0%}) "
        f"| {r['bound']} | {r['reason']} |"
        for r in rows
    ]
    return f"{machine()}, `python -m bench.lowerings`\n\n{head}" + "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Run the cases and write the tables, after each case anew."""
    parser = argparse.ArgumentParser(prog="python -m bench.lowerings", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="case", help=f"default: all of {', '.join(CASES)}")
    parser.add_argument("--table", type=Path, help="cost table, default: none, all is measured anew")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--explain", action="store_true", help="print all measured candidates of each case")
    given = parser.parse_args(argv)
    if unknown := [name for name in given.cases if name not in CASES]:
        parser.error(f"no case {', '.join(unknown)}; there are {', '.join(CASES)}")
    peak = peaks()
    with tempfile.TemporaryDirectory() as scratch:
        table = str(given.table or Path(scratch, "table.sqlite"))
        write_rows(
            given.out / f"lowerings-jax{jax.__version__}",
            given.cases,
            CASES,
            lambda name: run(name, table, peak, given.explain),
            markdown,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
