"""Every strict lowering, in every order it offers, computes what `lax.conv_general_dilated` computes.

Operands hold small integers, so every sum is exact whatever its order and the comparison is `==`: in half
precision too, which holds only where products are summed in float32 and rounded once.
"""

import math

import jax
import numpy as np
import pytest
from drawing import examples
from hypothesis import assume, example, given
from hypothesis import strategies as st
from jax import lax
from jax import numpy as jnp

from jaxlayout.convs.lowering import evaluate, is_relaxed, lowerings
from jaxlayout.convs.lowerings import Dot
from jaxlayout.convs.signature import ConvSignature
from jaxlayout.graph.program import equations
from jaxlayout.layout import ConvDimensionNumbers, ConvLayout, KernelLayout
from jaxlayout.measure.reference import reference

ALL = {name: lowering for name, lowering in lowerings().items() if not lowering.relaxed}
DTYPES = ("float32", "bfloat16", "float16", "int32", "int8", "complex64")


def conv(lhs, rhs, *, dtype="float32", groups=1, batch_groups=1, **params):
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


def last(rank):
    """The order in which everything is drawn and compared."""
    return ConvDimensionNumbers(
        ConvLayout.channels_last(rank), KernelLayout.io_last(rank), ConvLayout.channels_last(rank)
    )


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
    for lowering in ALL.values():
        for dims in lowering.orders(c):
            kernels = [dims.rhs]
            if lowering.any_kernel:
                odd = KernelLayout("I" + dims.rhs.spatial[::-1] + "O")
                kernels = [KernelLayout.io_last(c.rank), KernelLayout.oi_first(c.rank), odd]
            for rhs in dict.fromkeys(kernels):
                order = ConvDimensionNumbers(dims.lhs, rhs, dims.out)
                names = [name for name in lowering.names(c, order) if not is_relaxed(name)]
                yield from ((full, order) for full in dict.fromkeys((names[0], names[-1])))  # one inside, and another


def everything(c, lhs, rhs):
    """XLA's answer and that of each lowering in each order, from one compilation."""

    @jax.jit
    def run(lhs, rhs):
        return plain(c, lhs, rhs), {f"{name} {dims}": through(name, c, dims, lhs, rhs) for name, dims in native(c)}

    return jax.tree.map(np.asarray, run(lhs, rhs))


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
    c = conv(
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
    return c


WINDOW = {"padding": ((1, 1), (1, 1))}


@examples(100)
@given(convs())
@example(conv((2, 9, 9, 40), (3, 3, 1, 40), groups=40, **WINDOW))
@example(conv((2, 9, 9, 40), (5, 5, 1, 80), groups=40, padding=((2, 2), (2, 2)), dtype="bfloat16"))
@example(conv((2, 5, 5, 4), (3, 3, 1, 4), groups=4, padding=((9, -2), (-4, 9))))  # taps that meet no element
@example(conv((2, 50, 4), (40, 1, 4), groups=4))  # a long row of taps
@example(conv((3, 7, 7, 6), (1, 1, 6, 5), strides=(2, 3)))  # a product per image
@example(conv((3, 2, 2, 6), (1, 1, 6, 5)))  # images transposed
@example(conv((1, 3, 3, 6), (1, 1, 6, 5)))
@example(conv((2, 4, 4, 0), (1, 1, 0, 5)))
@example(conv((3, 6, 6, 3), (3, 3, 3, 4), dtype="float16", **WINDOW))
@example(conv((2, 0, 4, 3), (3, 3, 3, 4), **WINDOW))
@example(conv((2, 9, 9, 6), (3, 3, 6, 4), lhs_dilation=(2, 3), padding=((1, 2), (1, 2))))  # phases of unequal size
@example(conv((2, 9, 9, 6), (3, 3, 6, 4), lhs_dilation=(2, 3), rhs_dilation=(3, 2), strides=(2, 2)))
@example(conv((2, 5, 5, 6), (1, 1, 6, 4), lhs_dilation=(2, 2)))  # phases that no tap reaches
@example(conv((4, 8, 8, 3), (15, 15, 3, 6), lhs_dilation=(2, 2), padding=((1, 1), (1, 1))))
@example(conv((1, 5, 6, 7, 4), (2, 3, 3, 4, 5), padding=((1, 1),) * 3, strides=(2, 1, 1), rhs_dilation=(2, 1, 1)))
@example(conv((4, 3, 4, 5, 2), (2, 2, 3, 2, 6), batch_groups=2, padding=((1, 0),) * 3, strides=(2, 1, 1)))
@example(conv((3, 5, 6, 7, 4), (5, 6, 7, 4, 5), padding=((1, 1),) * 3))
@example(conv((3, 5, 6, 7, 4), (5, 6, 7, 4, 5), padding=((1, 1),) * 3, dtype="bfloat16"))
@example(conv((24, 8, 8, 3), (8, 8, 3, 12), batch_groups=6, **WINDOW))  # a gradient to the kernel of groups
@example(conv((6, 9, 97, 2), (4, 48, 2, 6), batch_groups=6, rhs_dilation=(2, 2), dtype="float16"))
@example(conv((400, 3, 40, 1), (3, 40, 1, 400), batch_groups=20, **WINDOW))  # many products to a partial sum
def test_equals_lax(c):
    expected, found = everything(c, *operands(c))
    assert found
    for name, out in found.items():
        np.testing.assert_array_equal(out, expected, err_msg=name)


@examples(40)
@given(convs(kinds=("pointwise", "depthwise", "dense", "gradient"), dtypes=("float64",)))
def test_equals_lax_in_double_precision(c):
    with jax.enable_x64(True):
        expected, found = everything(c, *operands(c))
        for name, out in found.items():
            np.testing.assert_array_equal(out, expected, err_msg=name)


@examples(60)
@given(convs(dtypes=("float64", "int64", "complex128")))
@example(conv((4, 5, 3), (2, 3, 4), batch_groups=2, dtype="float64"))
@example(conv((4, 5, 6, 3), (5, 6, 3, 4), batch_groups=2, dtype="float64", rhs_dilation=(1, 2), **WINDOW))
def test_reference_equals_lax(c):
    lhs, rhs = operands(c)
    with jax.enable_x64(True):
        expected = np.asarray(jax.jit(lambda lhs, rhs: plain(c, lhs, rhs))(lhs, rhs))
    out = reference(c, lhs, rhs)
    assert out.dtype == expected.dtype
    np.testing.assert_array_equal(out, expected)


def test_reference_widens():
    for dtype, wide in (("bfloat16", "float64"), ("int8", "int64"), ("complex64", "complex128")):
        c = conv((1, 3, 300), (1, 300, 1), dtype=dtype)
        ones = operands(c, draw=lambda rng, shape: np.ones(shape))
        out = reference(c, *ones)
        assert out.dtype == wide and (out == 300).all()


GAUSSIAN = (
    conv((2, 14, 14, 48), (1, 1, 48, 32)),
    conv((2, 14, 14, 48), (3, 3, 1, 48), groups=48, **WINDOW),
    conv((2, 14, 14, 48), (7, 7, 1, 48), groups=48, padding=((3, 3), (3, 3)), dtype="float16"),
    conv((2, 14, 14, 24), (3, 3, 24, 32), strides=(2, 2), padding=((0, 1), (0, 1))),
    conv((1, 6, 6, 6, 8), (3, 3, 3, 8, 8), padding=((1, 1),) * 3, dtype="bfloat16"),
    conv((2, 14, 14, 24), (4, 4, 24, 32), lhs_dilation=(2, 2), padding=((2, 2), (2, 2)), dtype="bfloat16"),
    conv((48, 14, 14, 8), (14, 14, 8, 48), batch_groups=48, **WINDOW),
    conv((48, 14, 14, 8), (14, 14, 8, 48), batch_groups=6, dtype="float16", **WINDOW),
)


@pytest.mark.parametrize("c", GAUSSIAN, ids=lambda c: c.key)
def test_rounding_error(c):
    """Of the order of eps sqrt(K) against the reference: half precision rounds the result alone."""
    lhs, rhs = operands(c, draw=lambda rng, shape: rng.standard_normal(shape))
    exact = reference(c, lhs, rhs)
    eps, rounded = np.finfo(np.float32).eps, jnp.finfo(c.out_dtype).eps
    bound = 4 * eps * math.sqrt(c.contraction) * np.abs(exact).max() + rounded * np.abs(exact)
    for name, out in everything(c, lhs, rhs)[1].items():
        assert (np.abs(out.astype(np.float64) - exact) <= bound).all(), name


@examples(60)
@given(convs(dtypes=("float32",)), st.data())
def test_not_a_number_spreads_no_farther(c, data):
    """One in lhs to no output that XLA keeps finite; a weight that is one to its own out feature at most (where it
    meets nothing but padding, XLA's answer depends on how it simplified the convolution)."""
    lhs, rhs = operands(c)
    bad, where = data.draw(st.sampled_from([np.nan, np.inf])), data.draw(st.sampled_from([lhs, rhs]))
    assume(where.size)
    place = data.draw(st.integers(0, where.size - 1))
    where.flat[place] = bad
    expected, found = everything(c, lhs, rhs)
    hit = np.zeros(expected.shape, bool) if where is lhs else np.arange(c.out_features) == place % c.out_features
    for name, out in found.items():
        assert (np.isfinite(out) | ~np.isfinite(expected) | hit).all(), name
        both = np.isfinite(out) & np.isfinite(expected)
        np.testing.assert_array_equal(out[both], expected[both], err_msg=name)


@pytest.mark.parametrize(
    "c",
    [
        conv((2, 6, 6, 4), (1, 1, 4, 3), strides=(2, 1)),
        conv((2, 6, 6, 4), (3, 3, 1, 8), groups=4, **WINDOW),
        conv((2, 6, 6, 4), (4, 4, 1, 4), groups=4, strides=(2, 2), **WINDOW),
        conv((2, 6, 6, 4), (3, 3, 4, 3), **WINDOW),
    ],
    ids=lambda c: c.key,
)
def test_derivatives(c):
    """Through `evaluate`, to either operand, under jit and vmap of grad."""
    lhs, rhs = operands(c)
    weights = np.random.default_rng(1).integers(-3, 4, c.out_shape(last(c.rank).out)).astype(np.float32)
    expected = jax.jit(jax.grad(lambda *a: (plain(c, *a) * weights).sum(), (0, 1)))(lhs, rhs)
    for name, lowering in lowerings().items():
        if name not in ALL:
            continue
        dims = next(iter(lowering.orders(c)), None)
        if dims == last(c.rank):
            loss = jax.grad(lambda *a, n=name, d=dims: (evaluate(n, c, d, *a) * weights).sum(), (0, 1))
            found = jax.jit(jax.vmap(loss))(lhs[None], rhs[None])
            jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b), found, expected)


def test_wider_results():
    """`preferred_element_type`: sums in the wider dtype, not in that of the operands."""
    for dtype, wide in (("int8", "int32"), ("bfloat16", "float32"), ("float16", "float32"), ("int8", "float32")):
        for shapes in (((2, 3, 200), (1, 200, 3)), ((2, 3, 200), (2, 200, 3)), ((2, 40, 3), (30, 1, 3))):
            groups = 3 if shapes[1][1] == 1 else 1
            c = conv(*shapes, dtype=dtype, groups=groups, preferred_element_type=np.dtype(wide))
            lhs, rhs = operands(c, draw=lambda rng, shape: rng.integers(90, 120, shape))
            expected, found = everything(c, lhs, rhs)
            np.testing.assert_array_equal(expected, reference(c, lhs, rhs))
            for name, out in found.items():
                np.testing.assert_array_equal(out, expected, err_msg=name)


def test_integers_wrap():
    for shapes, groups in ((((2, 3, 99), (1, 99, 3)), 1), (((2, 4, 99), (3, 99, 3)), 1), (((2, 40, 3), (30, 1, 3)), 3)):
        c = conv(*shapes, dtype="int8", groups=groups)
        lhs, rhs = operands(c, draw=lambda rng, shape: rng.integers(-128, 128, shape))
        expected, found = everything(c, lhs, rhs)
        np.testing.assert_array_equal(expected, reference(c, lhs, rhs).astype(np.int8))
        for name, out in found.items():
            np.testing.assert_array_equal(out, expected, err_msg=name)


def test_precision_goes_with_its_operand():
    """A dot that takes the kernel first hands on (of lhs, of rhs) the other way round."""
    high, low = lax.Precision.HIGHEST, lax.Precision.DEFAULT
    c = conv((2, 4, 4, 3), (1, 1, 3, 5), precision=(high, low))
    lhs, rhs = operands(c)
    for dims in Dot().orders(c):
        jaxpr = jax.make_jaxpr(lambda lhs, rhs, d=dims: through("dot", c, d, lhs, rhs))(lhs, rhs)
        (dot,) = [eqn for eqn in equations(jaxpr) if eqn.primitive is lax.dot_general_p]
        kernel_first = math.prod(dot.invars[0].aval.shape) == 2 * 3 * 5
        assert dot.params["precision"] == ((low, high) if kernel_first else (high, low)), dims


DENSE, DEPTHWISE = ((2, 8, 8, 6), (3, 3, 6, 4)), ((2, 8, 8, 6), (3, 3, 1, 6))


@pytest.mark.parametrize(
    ("c", "offered"),
    [
        (conv((2, 8, 8, 6), (1, 1, 6, 4)), "dot"),
        (conv((2, 8, 8, 6), (1, 1, 6, 4), strides=(2, 2)), "dot"),
        (conv((2, 8, 8, 6), (1, 1, 6, 4), padding=((0, 1), (0, 0))), "tap_dots"),
        (conv((2, 8, 8, 6), (1, 1, 6, 4), lhs_dilation=(2, 1)), "phases"),
        (conv((2, 8, 8, 6), (1, 1, 3, 4), groups=2), "groups"),
        (conv((4, 8, 8, 6), (1, 1, 6, 4), batch_groups=2), "groups"),
        (conv((2, 6), (6, 4)), "dot"),
        (conv(*DENSE), "im2col tap_dots"),
        (conv(*DENSE, lhs_dilation=(1, 2)), "phases"),
        (conv(*DENSE, lhs_dilation=(9, 9)), ""),
        (conv(*DENSE, batch_groups=2), ""),
        (conv((4, 8, 8, 6), (3, 3, 6, 4), batch_groups=2), "groups"),
        (conv((2, 8, 8, 6), (3, 3, 3, 4), groups=2), "groups"),
        (conv((2, 8, 8, 650), (3, 3, 10, 65), groups=65), ""),
        (conv(*DEPTHWISE, groups=6), "shifted"),
        (conv(*DEPTHWISE, groups=6, lhs_dilation=(2, 2)), "shifted phases"),
        (conv(*DEPTHWISE, groups=6, dtype="bool"), ""),
        (conv((2, 8, 8, 1), (3, 3, 1, 6)), "shifted im2col tap_dots"),
        (conv((2, 300, 6), (128, 1, 6), groups=6), "shifted"),
        (conv((2, 300, 6), (129, 1, 6), groups=6), ""),
        (conv((3, 5, 6, 7, 4), (3, 3, 3, 4, 5)), "im2col tap_dots planes wide_planes"),
        (conv((3, 5, 6, 7, 4), (3, 3, 3, 4, 5), lhs_dilation=(2, 1, 1)), "phases"),
        (conv((3, 5, 6, 7, 4), (3, 3, 3, 4, 5), lhs_dilation=(1, 2, 1)), "phases planes wide_planes"),
        (conv((3, 25, 6, 7, 4), (9, 3, 3, 4, 5)), "im2col"),
        (conv((4, 3, 4, 5, 2), (2, 2, 3, 2, 6), batch_groups=2), "groups"),
        (conv((3, 9, 9, 2), (8, 8, 2, 4)), "im2col tap_dots"),
        (conv((6, 9, 9, 2), (8, 8, 2, 6), batch_groups=6), "rows"),
        (conv((6, 9, 9, 2), (8, 8, 2, 6), batch_groups=6, lhs_dilation=(2, 2)), "phases"),
        (conv((64, 9, 9, 2), (8, 8, 2, 64), batch_groups=2), "groups"),
        (conv((12, 9, 9, 2), (8, 8, 2, 6), batch_groups=6), "groups rows"),
        (conv((3, 300, 9, 2), (280, 1, 2, 3), batch_groups=3), "rows"),
        (conv((3, 300, 9, 2), (150, 8, 2, 3), batch_groups=3), ""),
    ],
    ids=lambda value: value.key if isinstance(value, ConvSignature) else value.replace(" ", "-"),
)
def test_offers(c, offered):
    assert {name for name, lowering in ALL.items() if any(lowering.orders(c))} == {*offered.split(), "xla"}
    for lowering in ALL.values():
        dims = list(lowering.orders(c))
        assert len(dims) == len(set(dims)) or c.rank == 0  # where first is last


def test_a_dot_changes_order_for_free():
    """Channels first to last and back, image by image: no image is transposed."""
    c = conv((2, 8, 8, 6), (1, 1, 6, 4))
    kernel = 6 * 4
    assert len({(str(dims.lhs), str(dims.out)) for dims in Dot().orders(c)}) == 4
    for dims in Dot().orders(c):
        lowering, shapes = Dot(), (c.lhs_shape(dims.lhs), c.rhs_shape(dims.rhs))
        jaxpr = jax.make_jaxpr(lambda lhs, rhs, d=dims, low=lowering: low.apply(c, d, lhs, low.prepare(c, d, rhs)))(
            *(jnp.zeros(shape) for shape in shapes)
        )
        moved = [eqn.invars[0].aval.shape for eqn in jaxpr.eqns if eqn.primitive is lax.transpose_p]
        assert all(math.prod(shape) == kernel for shape in moved), dims
