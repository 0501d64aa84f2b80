"""Convolutions as signatures: written down, drawn by hypothesis, and computed through a lowering."""

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st
from jax import lax
from jax import numpy as jnp

from jaxlayout.convs.lowering import evaluate, is_relaxed, lowerings
from jaxlayout.convs.signature import ConvSignature
from jaxlayout.layout import ConvDimensionNumbers, KernelLayout

STRICT = {name: lowering for name, lowering in lowerings().items() if not lowering.relaxed}
DTYPES = ("float32", "bfloat16", "float16", "int32", "int8", "complex64")
DENSE, LARGE = ((2, 9, 9, 8), (3, 3, 8, 8)), ((2, 24, 24, 2), (11, 11, 2, 3))
"""The shapes of two convolutions, that `winograd2` and `fft` are for."""


def signature(lhs, rhs, *, dtype="float32", groups=1, batch_groups=1, **params):
    """A signature from channels-last shapes; strides, padding and dilations default to none."""
    rank = len(lhs) - 2
    defaults = {"strides": (1,) * rank, "padding": ((0, 0),) * rank}
    defaults |= {"lhs_dilation": (1,) * rank, "rhs_dilation": (1,) * rank}
    return ConvSignature(
        batch=lhs[0],
        in_features=lhs[-1],
        out_features=rhs[-1],
        spatial=tuple(lhs[1:-1]),
        kernel=tuple(rhs[:-2]),
        feature_groups=groups,
        batch_groups=batch_groups,
        lhs_dtype=jnp.dtype(dtype),
        rhs_dtype=jnp.dtype(dtype),
        **defaults | params,
    )


last = ConvDimensionNumbers.channels_last
"""The order in which everything is drawn and compared."""


def operands(c, seed=0, draw=lambda rng, shape: rng.integers(-4, 5, shape)):
    """lhs and rhs, channels last."""
    rng = np.random.default_rng(seed)
    shapes = c.lhs_shape(last(c.rank).lhs), c.rhs_shape(last(c.rank).rhs)
    return tuple(np.asarray(draw(rng, shape)).astype(c.lhs_dtype) for shape in shapes)


def plain(c, lhs, rhs):
    """What all others have to equal: XLA's own, of what is left of lhs where the padding of an axis cuts and adds, as
    some versions compute that wrongly (`test_crossing`)."""
    if c.crosses:
        return evaluate("cropped", c, last(c.rank), lhs, rhs)
    return lax.conv_general_dilated(lhs, rhs, dimension_numbers=last(c.rank).to_lax(), **c.params)


def through(name, c, dims, lhs, rhs):
    """From channels last through a lowering in its own orders back to channels last."""
    home = last(c.rank)
    lhs = lax.transpose(lhs, dims.lhs.permutation_from(home.lhs))
    rhs = lax.transpose(rhs, dims.rhs.permutation_from(home.rhs))
    assert lhs.shape == c.lhs_shape(dims.lhs) and rhs.shape == c.rhs_shape(dims.rhs)
    out = evaluate(name, c, dims, lhs, rhs)
    assert out.shape == c.out_shape(dims.out) and out.dtype == c.out_dtype
    return lax.transpose(out, home.out.permutation_from(dims.out))


def native(c):
    """Every lowering in every order it is native in, of any kernel orders the two common ones and an odd one."""
    for lowering in STRICT.values():
        for dims in lowering.dimension_numbers(c):
            kernels = [dims.rhs]
            if lowering.any_kernel:
                odd = KernelLayout("I" + dims.rhs.spatial[::-1] + "O")
                kernels = [KernelLayout.io_last(c.rank), KernelLayout.oi_first(c.rank), odd]
            for rhs in dict.fromkeys(kernels):
                order = ConvDimensionNumbers(dims.lhs, rhs, dims.out)
                names = [name for name in lowering.names(c, order) if not is_relaxed(name)]
                yield from ((full, order) for full in dict.fromkeys((*names[:1], *names[-1:])))  # of those inside, two


@st.composite
def convs(draw, kinds=("pointwise", "depthwise", "dense", "grouped", "batch", "gradient"), dtypes=DTYPES):
    """Convolutions of 0 to 3 spatial axes, small enough that every sum is exact."""
    kind, rank, dtype = draw(st.sampled_from(kinds)), draw(st.integers(0, 3)), draw(st.sampled_from(dtypes))

    def per_axis(values):
        return tuple(draw(st.lists(values, min_size=rank, max_size=rank)))

    size = st.integers(0, 7 if rank < 3 else 4)
    batch, spatial, strides = draw(st.integers(0, 3)), per_axis(size), per_axis(st.integers(1, 3))
    kernel = per_axis(st.integers(1, 4 if rank < 3 else 2))
    padding = per_axis(st.tuples(st.integers(-2, 3), st.integers(-2, 3)))
    dilations = {"lhs_dilation": per_axis(st.integers(1, 2)), "rhs_dilation": per_axis(st.integers(1, 3))}
    groups = batch_groups = 1
    features, out = draw(st.integers(1, 5)), draw(st.integers(0 if kind in ("pointwise", "dense") else 1, 5))
    if kind == "pointwise":
        kernel, padding, dilations = (1,) * rank, ((0, 0),) * rank, {}
    elif kind == "depthwise":
        groups, out = features, features * draw(st.integers(1, 3))
        if draw(st.booleans()):
            dilations.pop("lhs_dilation")
    elif kind == "dense" and draw(st.booleans()):
        dilations = {"rhs_dilation": dilations["rhs_dilation"]}
    elif kind == "grouped":
        groups = draw(st.integers(2, 3))
        features, out = 2 * groups, out * groups
    elif kind == "batch":
        batch_groups = draw(st.integers(2, 3))
        batch, out = batch * batch_groups, out * batch_groups
    elif kind == "gradient":  # of a kernel, grouped or not: the cotangent is as large as the input
        batch_groups = draw(st.integers(1, 4))
        kernel = tuple(max(1, s + draw(st.integers(-1, 1))) for s in spatial)
        batch, out = batch * batch_groups, out * batch_groups
        dilations = {"rhs_dilation": dilations["rhs_dilation"]} if draw(st.booleans()) else {}
    c = signature(
        (batch, *spatial, features),
        (*kernel, features // groups, out),
        dtype=dtype,
        groups=groups,
        batch_groups=batch_groups,
        strides=strides,
        padding=padding,
        **dilations,
    )
    reach = [(s - 1) * d + 1 + sum(p) for s, d, p in zip(c.spatial, c.lhs_dilation, c.padding, strict=True)]
    assume(all(r >= 0 for r in reach))  # lax refuses to cut more than there is
    assume(not any(c.misread))  # XLA may end the process, as it is written
    return c
