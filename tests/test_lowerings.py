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
from signatures import STRICT, convs, last, native, operands, plain, signature, through

from jaxlayout.convs.lowering import evaluate, lowerings
from jaxlayout.convs.lowerings import Dot
from jaxlayout.convs.signature import ConvSignature
from jaxlayout.graph.program import equations
from jaxlayout.measure.reference import reference


def everything(c, lhs, rhs):
    """XLA's answer and that of each lowering in each order, from one compilation."""

    @jax.jit
    def run(lhs, rhs):
        return plain(c, lhs, rhs), {f"{name} {dims}": through(name, c, dims, lhs, rhs) for name, dims in native(c)}

    return jax.tree.map(np.asarray, run(lhs, rhs))


WINDOW = {"padding": ((1, 1), (1, 1))}


@examples(100)
@given(convs())
@example(signature((2, 9, 9, 40), (3, 3, 1, 40), groups=40, **WINDOW))
@example(signature((2, 9, 9, 40), (5, 5, 1, 80), groups=40, padding=((2, 2), (2, 2)), dtype="bfloat16"))
@example(signature((2, 5, 5, 4), (3, 3, 1, 4), groups=4, padding=((9, -2), (-4, 9))))  # taps that meet no element
@example(signature((2, 50, 4), (40, 1, 4), groups=4))  # a long row of taps
@example(signature((3, 7, 7, 6), (1, 1, 6, 5), strides=(2, 3)))  # a product per image
@example(signature((3, 2, 2, 6), (1, 1, 6, 5)))  # images transposed
@example(signature((1, 3, 3, 6), (1, 1, 6, 5)))
@example(signature((2, 4, 4, 0), (1, 1, 0, 5)))
@example(signature((3, 6, 6, 3), (3, 3, 3, 4), dtype="float16", **WINDOW))
@example(signature((2, 0, 4, 3), (3, 3, 3, 4), **WINDOW))
@example(signature((2, 9, 9, 6), (3, 3, 6, 4), lhs_dilation=(2, 3), padding=((1, 2), (1, 2))))  # phases of unequal size
@example(signature((2, 9, 9, 6), (3, 3, 6, 4), lhs_dilation=(2, 3), rhs_dilation=(3, 2), strides=(2, 2)))
@example(signature((2, 9, 9, 6), (3, 3, 6, 4), lhs_dilation=(2, 4), rhs_dilation=(2, 6)))  # phases of neighbouring taps
@example(signature((2, 5, 5, 6), (1, 1, 6, 4), lhs_dilation=(2, 2)))  # phases that no tap reaches
@example(signature((4, 8, 8, 3), (15, 15, 3, 6), lhs_dilation=(2, 2), padding=((1, 1), (1, 1))))
@example(signature((1, 5, 6, 7, 4), (2, 3, 3, 4, 5), padding=((1, 1),) * 3, strides=(2, 1, 1), rhs_dilation=(2, 1, 1)))
@example(signature((4, 3, 4, 5, 2), (2, 2, 3, 2, 6), batch_groups=2, padding=((1, 0),) * 3, strides=(2, 1, 1)))
@example(signature((3, 5, 6, 7, 4), (5, 6, 7, 4, 5), padding=((1, 1),) * 3))
@example(signature((3, 5, 6, 7, 4), (5, 6, 7, 4, 5), padding=((1, 1),) * 3, dtype="bfloat16"))
@example(signature((24, 8, 8, 3), (8, 8, 3, 12), batch_groups=6, **WINDOW))  # a gradient to the kernel of groups
@example(signature((6, 9, 97, 2), (4, 48, 2, 6), batch_groups=6, rhs_dilation=(2, 2), dtype="float16"))
@example(signature((400, 3, 40, 1), (3, 40, 1, 400), batch_groups=20, **WINDOW))  # many products to a partial sum
@example(signature((2, 1, 3, 4), (3, 2, 2, 6), groups=2, lhs_dilation=(1, 2), padding=((0, 3), (0, 0))))  # see below
def test_equals_lax(c):
    expected, found = everything(c, *operands(c))
    assert found
    for name, out in found.items():
        np.testing.assert_array_equal(out, expected, err_msg=name)


MISREAD = (
    signature((2, 1, 3, 4), (3, 2, 4, 5), lhs_dilation=(1, 2), padding=((0, 3), (0, 0))),
    signature((2, 1, 5, 4), (3, 3, 4, 5), lhs_dilation=(1, 3), padding=((0, 3), (0, 0)), strides=(1, 2)),
    signature((2, 3, 1, 4, 3), (2, 3, 2, 3, 5), lhs_dilation=(2, 1, 2), padding=((0, 0), (2, 2), (0, 0))),
)


@pytest.mark.parametrize("c", MISREAD, ids=lambda c: c.key)
def test_an_axis_that_xla_takes_for_one_of_groups(c):
    """As written such a convolution ends the process while it is compiled. Groups of a larger one can be such, too."""
    lhs, rhs = operands(c)
    assert any(c.misread)
    for name, dims in native(c):
        out = jax.jit(lambda lhs, rhs, name=name, dims=dims: through(name, c, dims, lhs, rhs))(lhs, rhs)
        np.testing.assert_array_equal(out, reference(c, lhs, rhs), err_msg=f"{name} {dims}")


@examples(40)
@given(convs(kinds=("pointwise", "depthwise", "dense", "gradient"), dtypes=("float64",)))
def test_equals_lax_in_double_precision(c):
    with jax.enable_x64(True):
        expected, found = everything(c, *operands(c))
        for name, out in found.items():
            np.testing.assert_array_equal(out, expected, err_msg=name)


@examples(60)
@given(convs(dtypes=("float64", "int64", "complex128")))
@example(signature((4, 5, 3), (2, 3, 4), batch_groups=2, dtype="float64"))
@example(signature((4, 5, 6, 3), (5, 6, 3, 4), batch_groups=2, dtype="float64", rhs_dilation=(1, 2), **WINDOW))
def test_reference_equals_lax(c):
    lhs, rhs = operands(c)
    with jax.enable_x64(True):
        expected = np.asarray(jax.jit(lambda lhs, rhs: plain(c, lhs, rhs))(lhs, rhs))
    out = reference(c, lhs, rhs)
    assert out.dtype == expected.dtype
    np.testing.assert_array_equal(out, expected)


def test_reference_widens():
    for dtype, wide in (("bfloat16", "float64"), ("int8", "int64"), ("complex64", "complex128")):
        c = signature((1, 3, 300), (1, 300, 1), dtype=dtype)
        ones = operands(c, draw=lambda rng, shape: np.ones(shape))
        out = reference(c, *ones)
        assert out.dtype == wide and (out == 300).all()


GAUSSIAN = (
    signature((2, 14, 14, 48), (1, 1, 48, 32)),
    signature((2, 14, 14, 48), (3, 3, 1, 48), groups=48, **WINDOW),
    signature((2, 14, 14, 48), (7, 7, 1, 48), groups=48, padding=((3, 3), (3, 3)), dtype="float16"),
    signature((2, 14, 14, 24), (3, 3, 24, 32), strides=(2, 2), padding=((0, 1), (0, 1))),
    signature((1, 6, 6, 6, 8), (3, 3, 3, 8, 8), padding=((1, 1),) * 3, dtype="bfloat16"),
    signature((2, 14, 14, 24), (4, 4, 24, 32), lhs_dilation=(2, 2), padding=((2, 2), (2, 2)), dtype="bfloat16"),
    signature((48, 14, 14, 8), (14, 14, 8, 48), batch_groups=48, **WINDOW),
    signature((48, 14, 14, 8), (14, 14, 8, 48), batch_groups=6, dtype="float16", **WINDOW),
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


def test_not_a_number_stays_in_its_group_of_images():
    """XLA computes every group with the kernels of all, and masks the rest; not this one, but its phases."""
    c = signature(
        (4, 1, 3, 1), (3, 2, 1, 2), strides=(1, 3), padding=((0, 3), (0, 0)), lhs_dilation=(1, 2), batch_groups=2
    )
    lhs, rhs = operands(c)
    rhs[0, 0, 0, 0] = np.nan
    expected, found = everything(c, lhs, rhs)
    assert np.isfinite(expected[..., 1]).all()
    for name, out in found.items():
        np.testing.assert_array_equal(out[..., 1], expected[..., 1], err_msg=name)


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
        signature((2, 6, 6, 4), (1, 1, 4, 3), strides=(2, 1)),
        signature((2, 6, 6, 4), (3, 3, 1, 8), groups=4, **WINDOW),
        signature((2, 6, 6, 4), (4, 4, 1, 4), groups=4, strides=(2, 2), **WINDOW),
        signature((2, 6, 6, 4), (3, 3, 4, 3), **WINDOW),
    ],
    ids=lambda c: c.key,
)
def test_derivatives(c):
    """Through `evaluate`, to either operand, under jit and vmap of grad."""
    lhs, rhs = operands(c)
    weights = np.random.default_rng(1).integers(-3, 4, c.out_shape(last(c.rank).out)).astype(np.float32)
    expected = jax.jit(jax.grad(lambda *a: (plain(c, *a) * weights).sum(), (0, 1)))(lhs, rhs)
    for name, lowering in lowerings().items():
        if name not in STRICT:
            continue
        dims = next(iter(lowering.dimension_numbers(c)), None)
        if dims == last(c.rank):
            loss = jax.grad(lambda *a, n=name, d=dims: (evaluate(n, c, d, *a) * weights).sum(), (0, 1))
            found = jax.jit(jax.vmap(loss))(lhs[None], rhs[None])
            jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b), found, expected)


def test_wider_results():
    """`preferred_element_type`: sums in the wider dtype, not in that of the operands."""
    for dtype, wide in (("int8", "int32"), ("bfloat16", "float32"), ("float16", "float32"), ("int8", "float32")):
        for shapes in (((2, 3, 200), (1, 200, 3)), ((2, 3, 200), (2, 200, 3)), ((2, 40, 3), (30, 1, 3))):
            groups = 3 if shapes[1][1] == 1 else 1
            c = signature(*shapes, dtype=dtype, groups=groups, preferred_element_type=np.dtype(wide))
            lhs, rhs = operands(c, draw=lambda rng, shape: rng.integers(90, 120, shape))
            expected, found = everything(c, lhs, rhs)
            np.testing.assert_array_equal(expected, reference(c, lhs, rhs))
            for name, out in found.items():
                np.testing.assert_array_equal(out, expected, err_msg=name)


def test_integers_wrap():
    for shapes, groups in ((((2, 3, 99), (1, 99, 3)), 1), (((2, 4, 99), (3, 99, 3)), 1), (((2, 40, 3), (30, 1, 3)), 3)):
        c = signature(*shapes, dtype="int8", groups=groups)
        lhs, rhs = operands(c, draw=lambda rng, shape: rng.integers(-128, 128, shape))
        expected, found = everything(c, lhs, rhs)
        np.testing.assert_array_equal(expected, reference(c, lhs, rhs).astype(np.int8))
        for name, out in found.items():
            np.testing.assert_array_equal(out, expected, err_msg=name)


def test_precision_goes_with_its_operand():
    """A dot that takes the kernel first hands on (of lhs, of rhs) the other way round."""
    high, low = lax.Precision.HIGHEST, lax.Precision.DEFAULT
    c = signature((2, 4, 4, 3), (1, 1, 3, 5), precision=(high, low))
    lhs, rhs = operands(c)
    for dims in Dot().dimension_numbers(c):
        jaxpr = jax.make_jaxpr(lambda lhs, rhs, d=dims: through("dot", c, d, lhs, rhs))(lhs, rhs)
        (dot,) = [eqn for eqn in equations(jaxpr) if eqn.primitive is lax.dot_general_p]
        kernel_first = math.prod(dot.invars[0].aval.shape) == 2 * 3 * 5
        assert dot.params["precision"] == ((low, high) if kernel_first else (high, low)), dims


DENSE, DEPTHWISE = ((2, 8, 8, 6), (3, 3, 6, 4)), ((2, 8, 8, 6), (3, 3, 1, 6))


@pytest.mark.parametrize(
    ("c", "offered"),
    [
        (signature((2, 8, 8, 6), (1, 1, 6, 4)), "dot"),
        (signature((2, 8, 8, 6), (1, 1, 6, 4), strides=(2, 2)), "dot"),
        (signature((2, 8, 8, 6), (1, 1, 6, 4), padding=((0, 1), (0, 0))), "tap_dots"),
        (signature((2, 8, 8, 6), (1, 1, 6, 4), lhs_dilation=(2, 1)), "phases"),
        (signature((2, 8, 8, 6), (1, 1, 3, 4), groups=2), "groups"),
        (signature((4, 8, 8, 6), (1, 1, 6, 4), batch_groups=2), "groups"),
        (signature((2, 6), (6, 4)), "dot"),
        (signature(*DENSE), "im2col tap_dots"),
        (signature(*DENSE, lhs_dilation=(1, 2)), "phases"),
        (signature(*DENSE, lhs_dilation=(9, 9)), ""),
        (signature(*DENSE, batch_groups=2), ""),
        (signature((4, 8, 8, 6), (3, 3, 6, 4), batch_groups=2), "groups"),
        (signature((2, 8, 8, 6), (3, 3, 3, 4), groups=2), "groups"),
        (signature((2, 8, 8, 650), (3, 3, 10, 65), groups=65), ""),
        (signature(*DEPTHWISE, groups=6), "shifted"),
        (signature(*DEPTHWISE, groups=6, lhs_dilation=(2, 2)), "shifted phases"),
        (signature(*DEPTHWISE, groups=6, dtype="bool"), ""),
        (signature((2, 8, 8, 1), (3, 3, 1, 6)), "shifted im2col tap_dots"),
        (signature((2, 300, 6), (128, 1, 6), groups=6), "shifted"),
        (signature((2, 300, 6), (129, 1, 6), groups=6), ""),
        (signature((3, 5, 6, 7, 4), (3, 3, 3, 4, 5)), "im2col tap_dots planes wide_planes"),
        (signature((3, 5, 6, 7, 4), (3, 3, 3, 4, 5), lhs_dilation=(2, 1, 1)), "phases"),
        (signature((3, 5, 6, 7, 4), (3, 3, 3, 4, 5), lhs_dilation=(1, 2, 1)), "phases planes wide_planes"),
        (signature((3, 25, 6, 7, 4), (9, 3, 3, 4, 5)), "im2col"),
        (signature((4, 3, 4, 5, 2), (2, 2, 3, 2, 6), batch_groups=2), "groups"),
        (signature((3, 9, 9, 2), (8, 8, 2, 4)), "im2col tap_dots"),
        (signature((6, 9, 9, 2), (8, 8, 2, 6), batch_groups=6), "rows"),
        (signature((6, 9, 9, 2), (8, 8, 2, 6), batch_groups=6, lhs_dilation=(2, 2)), "phases"),
        (signature((64, 9, 9, 2), (8, 8, 2, 64), batch_groups=2), "groups"),
        (signature((12, 9, 9, 2), (8, 8, 2, 6), batch_groups=6), "groups rows"),
        (signature((3, 300, 9, 2), (280, 1, 2, 3), batch_groups=3), "rows"),
        (signature((3, 300, 9, 2), (150, 8, 2, 3), batch_groups=3), ""),
    ],
    ids=lambda value: value.key if isinstance(value, ConvSignature) else value.replace(" ", "-"),
)
def test_offers(c, offered):
    assert {name for name, lowering in STRICT.items() if any(lowering.dimension_numbers(c))} == {
        *offered.split(),
        "xla",
    }
    for lowering in STRICT.values():
        dims = list(lowering.dimension_numbers(c))
        assert len(dims) == len(set(dims)) or c.rank == 0  # where first is last


def test_a_dot_changes_order_for_free():
    """Channels first to last and back, image by image: no image is transposed."""
    c = signature((2, 8, 8, 6), (1, 1, 6, 4))
    kernel = 6 * 4
    assert len({(str(dims.lhs), str(dims.out)) for dims in Dot().dimension_numbers(c)}) == 4
    for dims in Dot().dimension_numbers(c):
        lowering, shapes = Dot(), (c.lhs_shape(dims.lhs), c.rhs_shape(dims.rhs))
        jaxpr = jax.make_jaxpr(lambda lhs, rhs, d=dims, low=lowering: low.apply(c, d, lhs, low.prepare(c, d, rhs)))(
            *(jnp.zeros(shape) for shape in shapes)
        )
        moved = [eqn.invars[0].aval.shape for eqn in jaxpr.eqns if eqn.primitive is lax.transpose_p]
        assert all(math.prod(shape) == kernel for shape in moved), dims
