"""Which convolutions XLA gets wrong where it divides them among devices.

    XLA_FLAGS=--xla_force_host_platform_device_count=2 python -m bench.partitioner [--lowerings]

Small convolutions of whole numbers, forward and as derivatives have them, plain and grouped; lhs and rhs divided along
each pair of axes, on two devices. Plain `lax.conv_general_dilated` in several dimension numbers, and with `--lowerings`
all candidates that are no such convolution and that `Lowering.divisible` lets pass, in fewer pairs. One line for each
that has wrong numbers or does not compile; then how many there were.

On jaxlib 0.10.2, 0.11.2 and 0.12.0 plain convolutions are right where out is laid out as lhs is. Of the others those
with feature groups divided are wrong, and those with the positions of a dilated lhs divided. Not tried here are grouped
ones that are products of matrices (1x1, stride 1): with features divided they give wrong numbers or end the process, on
all of these versions ("free(): invalid pointer").
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlayout import Candidate, ConvDimensionNumbers, ConvSignature
from jaxlayout.convs.candidates import candidates
from jaxlayout.convs.lowering import evaluate, lowering_named

WRITTEN = {2: "NCHW,OIHW->NCHW", 3: "NCDHW,OIDHW->NCDHW"}
ALIKE = ("NHWC,HWIO->NHWC", "NHWC,OIHW->NHWC", "NCHW,OIHW->NCHW", "CNHW,IOHW->CNHW")
OTHERS = ("CHWN,IHWO->HWNC", "NCHW,OIHW->NHWC", "NHWC,HWIO->NCHW", "CNHW,IOHW->NHWC")
FEW = [("N", ""), ("C", ""), ("C", "I"), ("C", "O"), ("", "O"), ("", "I"), ("H", ""), ("W", "H")]


def kind(lhs: Any, rhs: Any, groups: int = 1, batch_groups: int = 1, pad: Any = 1, **more: Any) -> Any:
    """Shapes of lhs and rhs, and parameters."""
    rank = len(lhs) - 2
    spread = {name: (more.get(name, 1),) * rank for name in ("window_strides", "lhs_dilation", "rhs_dilation")}
    counts = {"feature_group_count": groups, "batch_group_count": batch_groups}
    return lhs, rhs, {"padding": ((pad, pad),) * rank, **spread, **counts}


KINDS = {
    "dense": kind((4, 4, 6, 8), (8, 4, 2, 4)),
    "strided": kind((4, 4, 6, 8), (8, 4, 2, 4), window_strides=2),
    "pointwise": kind((4, 4, 6, 8), (8, 4, 1, 1), pad=0),
    "grouped": kind((4, 4, 6, 8), (8, 2, 2, 4), 2),
    "more groups": kind((4, 8, 6, 8), (8, 2, 2, 4), 4),
    "depthwise": kind((4, 4, 6, 8), (4, 1, 2, 4), 4),
    "depthwise, doubled": kind((4, 4, 6, 8), (8, 1, 2, 4), 4),
    "batch groups": kind((4, 4, 6, 8), (8, 4, 2, 4), batch_groups=2),
    "each in a batch group": kind((4, 1, 6, 8), (4, 1, 2, 4), batch_groups=4),
    "input gradient": kind((4, 4, 6, 8), (8, 4, 2, 4), lhs_dilation=2),
    "kernel gradient": kind((4, 4, 8, 8), (8, 4, 6, 6), pad=0),
    "strided kernel gradient": kind((4, 4, 8, 8), (8, 4, 4, 4), rhs_dilation=2),
    "grouped kernel gradients": kind((4, 4, 8, 8), (8, 2, 8, 8), 2),
    "batched kernel gradients": kind((4, 4, 8, 8), (8, 1, 8, 8), 4),
    "kernel gradients by batch": kind((4, 2, 8, 8), (8, 2, 8, 8), batch_groups=4),
    "grouped pointwise, dilated": kind((4, 4, 6, 8), (8, 2, 1, 1), 2, pad=0, lhs_dilation=2),
    "volume": kind((4, 4, 4, 4, 6), (8, 4, 3, 3, 3)),
    "depthwise volume": kind((4, 4, 4, 4, 6), (4, 1, 3, 3, 3), 4),
    "depthwise along the depth": kind((4, 4, 4, 4, 6), (4, 1, 3, 1, 1), 4, pad=0),
    "input gradient of a volume": kind((4, 4, 4, 4, 6), (8, 4, 3, 3, 3), lhs_dilation=2),
    "kernel gradient of a volume": kind((4, 4, 4, 4, 6), (8, 4, 4, 4, 6)),
}


def forms(name: str, lowerings: bool) -> Iterator[tuple[ConvSignature, Candidate]]:
    """The signature of a kind, with each way to compute it that is to be tried."""
    lhs, rhs, params = KINDS[name]
    written = ConvDimensionNumbers.parse(WRITTEN[len(lhs) - 2])
    params |= {"dimension_numbers": written.to_lax(), "precision": None, "preferred_element_type": None}
    images, kernel = (jax.ShapeDtypeStruct(shape, np.float32) for shape in (lhs, rhs))
    conv = ConvSignature.of(images, kernel, params)
    if lowerings:
        found = candidates(conv, Candidate("xla", written), relaxed=True)
        ours = (candidate for candidate in found if candidate.lowering != "xla")
        yield from (
            (conv, candidate)
            for candidate in ours
            if lowering_named(candidate.lowering).divisible(conv, candidate.dims)
        )
    elif len(lhs) == 4:
        yield from ((conv, Candidate("xla", ConvDimensionNumbers.parse(dims))) for dims in (*ALIKE, *OTHERS))


def wrong(conv: ConvSignature, candidate: Candidate, pairs: Any) -> Iterator[tuple[str, str, str]]:
    """Pairs of axes along which lhs and rhs are divided, and what is wrong then; '' for nothing."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    written, dims = ConvDimensionNumbers.parse(WRITTEN[conv.rank]), candidate.dims
    random = np.random.default_rng(0)
    lhs, rhs = (random.integers(-3, 4, shape) for shape in (conv.lhs_shape(written.lhs), conv.rhs_shape(written.rhs)))
    lhs = jnp.transpose(lhs.astype("f"), dims.lhs.permutation_from(written.lhs))
    rhs = jnp.transpose(rhs.astype("f"), dims.rhs.permutation_from(written.rhs))

    def run(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return evaluate(candidate.lowering, conv, dims, lhs, rhs)

    expected = lax.conv_general_dilated(lhs, rhs, dimension_numbers=dims.to_lax(), **conv.params)
    for one, two in pairs:
        layouts = (one, dims.lhs.axes), (two, dims.rhs.axes)
        places = (tuple("d" if a == axis else None for a in axes) for axis, axes in layouts)
        placed = [NamedSharding(mesh, P(*place)) for place in places]
        if any(s.spec[a] and x.shape[a] % 2 for x, s in ((lhs, placed[0]), (rhs, placed[1])) for a in range(x.ndim)):
            continue
        try:
            found = jax.jit(run)(*map(jax.device_put, (lhs, rhs), placed))
            error = float(jnp.abs(found - expected).max())
            yield one, two, "" if error < 1e-2 else f"wrong by {error:.2g}"
        except Exception as failure:
            yield one, two, repr(failure)[:100]


def main(argv: list[str] | None = None) -> int:
    """Try all of them."""
    lowerings = "--lowerings" in (sys.argv[1:] if argv is None else argv)
    pairs = FEW if lowerings else list(itertools.product(("", "N", "C", "H", "W"), ("", "O", "I", "H", "W")))[1:]
    tried = bad = 0
    for name in KINDS:
        for conv, candidate in forms(name, lowerings):
            for one, two, what in wrong(conv, candidate, pairs):
                tried, bad = tried + 1, bad + bool(what)
                if what:
                    print(f"{name}: {candidate}, lhs by {one or '-'}, rhs by {two or '-'}: {what}", flush=True)
    print(f"jax {jax.__version__}: {bad} of {tried} wrong")
    return 0


if __name__ == "__main__":
    sys.exit(main())
