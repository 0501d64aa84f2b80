"""Tensors with named layouts, lazy conversions, and what computes on them: sums, convolutions, patches, chains."""

from __future__ import annotations

import itertools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawing import examples
from helpers import normal
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

from jaxlayout import (
    ConvDimensionNumbers,
    ConvLayout,
    ConvSignature,
    KernelLayout,
    LayoutPolicy,
    LayoutTensor,
    LazyLayoutTensor,
    auto_layout,
    conv1d_auto_layout,
    conv2d_auto_layout,
    conv3d_auto_layout,
    im2col_with_layout,
    select_layout_for_sequence,
)
from jaxlayout.convs.candidates import Candidate
from jaxlayout.convs.signature import written_dims
from jaxlayout.graph.build import build_graph
from jaxlayout.graph.program import count_transposes, equations
from jaxlayout.graph.sequence import _alone, _moved, _offered
from jaxlayout.graph.solve import RELUCTANCE, solve

IMAGES = ["NCW", "NWC", "NCHW", "NHWC", "CHWN", "HWCN", "NCDHW", "NDHWC", "CDHWN", "DHWCN", "CWN", "WCN"]
KERNELS = ["OIW", "WIO", "OWI", "IWO", "OIHW", "HWIO", "OHWI", "IHWO", "OIDHW", "DHWIO", "ODHWI", "IDHWO"]
FIRST, LAST = LayoutPolicy(name="first", channels_last=False), LayoutPolicy(name="last")


def images(layout: str = "NCHW", seed: int = 0, sizes: str = "N2 C3 H6 W5 D4") -> LayoutTensor:
    size = {part[0]: int(part[1:]) for part in sizes.split()}
    return LayoutTensor(normal(seed, *(size[a] for a in layout)), layout)


def nchw(tensor: LayoutTensor | LazyLayoutTensor) -> np.ndarray:
    """A tensor's logical values, whatever its layout."""
    held = tensor if isinstance(tensor, LayoutTensor) else tensor.materialize()
    return np.asarray(held.data).transpose(np.argsort(held.order))


def transposes(fun: Any, *args: Any) -> int:
    return count_transposes(jax.make_jaxpr(fun)(*args))


# Names


@pytest.mark.parametrize("text", IMAGES + KERNELS)
def test_a_layout_is_an_order_of_its_logical_axes(text):
    kind = ConvLayout if text in IMAGES else KernelLayout
    layout = kind(text)
    logical = kind.from_order(tuple(range(len(text))))
    assert logical.axes == kind.features + layout.spatial
    assert layout.order == layout.permutation_from(logical)
    assert kind.from_order(layout.order) == kind.from_spec(layout.spec) == layout
    sizes = np.zeros(range(2, 2 + len(text)))
    shape = dict(zip(logical.axes, sizes.shape, strict=True))
    assert sizes.transpose(layout.order).shape == tuple(shape[a] for a in text)
    assert LayoutTensor(jnp.zeros(sizes.transpose(layout.order).shape), text).shape == sizes.shape


def test_channels_first_means_before_every_spatial_axis():
    assert [text for text in IMAGES if ConvLayout(text).is_channels_first] == [
        *("NCW", "NCHW", "CHWN", "NCDHW", "CDHWN", "CWN")
    ]


def test_numbers_as_lax_takes_them():
    for text in ("NHWC,OHWI->NHWC", "CHWN,IHWO->HWNC", "NCW,OIW->NWC", "NDHWC,DHWIO->NCDHW"):
        dims = ConvDimensionNumbers.parse(text)
        triple = (str(dims.lhs), str(dims.rhs), str(dims.out))
        assert ConvDimensionNumbers.from_lax(triple) == dims
        shapes = (1,) * len(dims.lhs.axes), (1,) * len(dims.rhs.axes)
        assert ConvDimensionNumbers.from_lax(lax.conv_dimension_numbers(*shapes, triple)) == dims
        assert ConvDimensionNumbers.from_lax(tuple(dims.to_lax())) == dims


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ConvLayout(4), TypeError, r"ConvLayout\(4\): expected text such as 'NHWC'"),  # pyright: ignore
        (lambda: KernelLayout(None), TypeError, r"expected text such as 'HWIO'"),  # pyright: ignore
        (lambda: ConvLayout.from_spec((0, 0, 1)), ValueError, r"from_spec\(\(0, 0, 1\)\)"),
        (lambda: KernelLayout.from_spec((0,)), ValueError, "expected where each axis stands"),
        (lambda: ConvDimensionNumbers.from_lax("NHWC"), ValueError, "expected the layouts of lhs, rhs and out"),
        (lambda: ConvDimensionNumbers.from_lax(("NHWC", "HWIO")), ValueError, "lhs, rhs and out"),
        (lambda: ConvDimensionNumbers.from_lax(("NHWC", "NHWC", "NHWC")), ValueError, "KernelLayout"),
        (lambda: LayoutTensor(jnp.zeros((2, 3)), (0, 0)), ValueError, "is no order"),
        (lambda: LayoutTensor(jnp.zeros((2, 3, 4)), "NCX"), ValueError, "ConvLayout"),
        (lambda: LayoutTensor(jnp.zeros((2, 3)), "NCHW").shape, ValueError, r"shape \(2, 3\) is not laid out as NCHW"),
    ],
)
def test_what_is_none_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


# Tensors


@pytest.mark.parametrize("layout", ["NHWC", ConvLayout("CHWN"), (0, 2, 3, 1), "nchw"])
def test_named_tensors_convert_by_name_and_by_order(layout):
    tensor = images()
    moved = tensor.to_layout(layout)
    assert isinstance(moved.layout, ConvLayout) and moved.shape == tensor.shape and moved.dtype == jnp.float32
    np.testing.assert_array_equal(nchw(moved), nchw(tensor))
    back = moved.to_layout("NCHW")
    np.testing.assert_array_equal(back.data, tensor.data)
    assert moved.to_layout(moved.layout) is moved is moved.to_layout(str(moved.layout))


def test_only_unit_axes_move_without_a_transpose():
    pooled = LayoutTensor(normal(0, 2, 8, 1, 1), "NCHW")
    names = [eqn.primitive.name for eqn in jax.make_jaxpr(lambda t: t.to_layout("NHWC").data)(pooled).eqns]
    assert names == ["reshape"]
    assert pooled.to_layout("NHWC").data.shape == (2, 1, 1, 8)
    assert transposes(lambda t: t.to_layout("CHWN").data, pooled) == 1


@pytest.mark.parametrize("layout", ["HWIO", "NCW", "NDHWC", (0, 1, 2), (0, 1, 2, 2), ConvLayout("NWC")])
def test_other_axes_are_refused(layout):
    with pytest.raises(ValueError, match="a tensor laid out as NCHW has no layout"):
        images().to_layout(layout)
    with pytest.raises(ValueError, match="a tensor laid out as NCHW has no layout"):
        LazyLayoutTensor(images()).request_layout(layout)


def test_axes_without_names_have_no_named_layout():
    with pytest.raises(ValueError, match=r"laid out as \(0, 1, 2, 3\) has no layout NHWC"):
        LayoutTensor.logical(jnp.zeros((2, 3, 4, 5))).to_layout("NHWC")


OPERATORS = [operator.add, operator.sub, operator.mul, operator.truediv, operator.pow]


@pytest.mark.parametrize("op", OPERATORS)
def test_arithmetic_is_in_the_tensor_s_own_layout(op):
    one = images("NHWC").map(lambda x: jnp.abs(x) + 1)
    other = images("CHWN", seed=1)
    for left, right in ((one, other), (one, 2.0), (3, one), (one, np.float32(2)), (jnp.float32(3), one)):
        found = op(left, right)
        assert found.layout == one.layout
        plain = [nchw(x) if isinstance(x, LayoutTensor) else x for x in (left, right)]
        np.testing.assert_allclose(nchw(found), op(*plain), rtol=1e-5)
        moved = isinstance(left, LayoutTensor) and isinstance(right, LayoutTensor)
        assert transposes(op, left, right) == moved
    np.testing.assert_array_equal(nchw(-one), -nchw(one))
    assert transposes(lambda a: op(a, a), one) == 0


def test_tensors_broadcast_along_the_same_axes():
    image, bias = images("NHWC"), LayoutTensor(normal(1, 1, 3, 1, 1), "NCHW")
    np.testing.assert_allclose(nchw(image + bias), nchw(image) + nchw(bias))
    assert transposes(operator.add, image, bias) == 0  # the bias has one axis that is not of size 1
    np.testing.assert_allclose(nchw(image + LazyLayoutTensor(bias)), nchw(image) + nchw(bias))


@pytest.mark.parametrize("array", [np.ones(3, np.float32), jnp.ones((2, 6, 5, 3)), np.ones((1, 1))])
def test_arrays_without_a_layout_are_refused(array):
    for sum_ in (lambda: images("NHWC") + array, lambda: array + images("NHWC")):
        with pytest.raises(TypeError, match=r"has no layout; give LayoutTensor\(array, layout\)"):
            sum_()


def test_what_cannot_be_added_is_refused():
    with pytest.raises(TypeError):
        images() + "x"  # pyright: ignore
    with pytest.raises(ValueError, match="has no layout"):
        images() + LayoutTensor(normal(0, 2, 3, 6, 5), "OIHW")
    with pytest.raises(ValueError, match="has no layout"):
        images() + LayoutTensor.logical(normal(0, 2, 3, 6, 5))


def test_tensors_under_jit_and_grad():
    tensor, weights = images("NCHW"), images("NHWC", seed=1)

    def loss(tensor, weights):
        return jnp.sum((tensor.to_layout("NHWC") * weights + 1.0).map(jnp.sin).data)

    value, gradients = jax.value_and_grad(jax.jit(loss), argnums=(0, 1))(tensor, weights)
    expected = jax.value_and_grad(lambda t, w: jnp.sum(jnp.sin(t * w + 1)), argnums=(0, 1))(nchw(tensor), nchw(weights))
    assert [str(gradient.layout) for gradient in gradients] == ["NCHW", "NHWC"]
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    for found, wanted in zip(gradients, expected[1], strict=True):
        np.testing.assert_allclose(nchw(found), wanted, rtol=1e-5, atol=1e-6)
    out = jax.jit(lambda t: t.to_layout("CHWN"))(tensor)
    assert str(out.layout) == "CHWN" and out.shape == tensor.shape
    carried, _ = lax.scan(lambda t, _: (t * 2.0, None), tensor, length=3)
    np.testing.assert_array_equal(carried.data, 8 * tensor.data)


@pytest.mark.parametrize("axis", [0, 2, -1])
def test_under_vmap_a_tensor_is_one_of_a_stack(axis):
    many = [images("NHWC", seed) for seed in range(3)]
    stack = LayoutTensor(jnp.stack([t.data for t in many], axis), "NHWC")
    seen = []

    def one(tensor):
        seen.append((tensor.shape, str(tensor.layout)))
        return (tensor + tensor).to_layout("NCHW")

    out = jax.vmap(one, in_axes=axis, out_axes=axis)(stack)
    assert seen == [((2, 3, 6, 5), "NHWC")]
    assert isinstance(out, LayoutTensor) and str(out.layout) == "NCHW"
    for i, tensor in enumerate(many):
        np.testing.assert_array_equal(jnp.take(out.data, i, axis), 2 * nchw(tensor))
    for refused in (lambda: out.shape, lambda: out.to_layout("NHWC"), lambda: out + out, lambda: out + many[0]):
        with pytest.raises(ValueError, match="a stack is for vmap"):
            refused()


# Lazy ones


def test_nothing_is_converted_before_it_is_read():
    def asked(tensor):
        lazy = LazyLayoutTensor(tensor).request_layout("NHWC")
        assert lazy.is_pending and lazy.shape == tensor.shape and lazy.dtype == tensor.dtype and lazy.ndim == 4
        return tensor

    assert transposes(asked, images()) == 0
    assert transposes(lambda t: LazyLayoutTensor(t).request_layout("NHWC").materialize(), images()) == 1


def test_two_conversions_come_to_one_and_back_to_none():
    def twice(tensor):
        return LazyLayoutTensor(tensor).request_layout("NHWC").request_layout("CHWN").materialize()

    def back(tensor):
        lazy = LazyLayoutTensor(tensor).request_layout("NHWC").request_layout("NCHW")
        assert not lazy.is_pending
        return lazy.materialize()

    tensor = images()
    assert transposes(twice, tensor) == 1
    np.testing.assert_array_equal(nchw(twice(tensor)), nchw(tensor))
    assert transposes(back, tensor) == 0
    assert back(tensor) is tensor


def test_a_conversion_is_done_once_and_shared():
    def read(tensor):
        lazy = LazyLayoutTensor(tensor)
        first = lazy.request_layout("NHWC").materialize()
        again = lazy.request_layout("CHWN").request_layout("NHWC")
        assert not again.is_pending and again.materialize() is first
        return first, lazy.request_layout("CHWN").materialize()

    assert transposes(read, images()) == 2


def test_a_pending_conversion_is_cancelled():
    tensor = images()
    lazy = LazyLayoutTensor(tensor).request_layout("NHWC")
    assert lazy.try_cancel_conversion("NCHW") is tensor
    assert lazy.try_cancel_conversion("NHWC") is None and lazy.try_cancel_conversion("CHWN") is None
    assert lazy.is_pending  # as before: another reader may want it
    converted = lazy.materialize()
    assert lazy.try_cancel_conversion("NHWC") is converted is lazy.materialize()
    assert lazy.try_cancel_conversion("NCHW") is tensor


def test_what_an_inner_trace_converts_stays_inside():
    lazy = LazyLayoutTensor(images()).request_layout("NHWC")
    with jax.checking_leaks():
        inside = jax.jit(lambda: lazy.materialize().data)()
    assert lazy.is_pending
    np.testing.assert_array_equal(inside, lazy.materialize().data)

    def outer(tensor):
        lazy = LazyLayoutTensor(tensor).request_layout("NHWC")
        inner = jax.vmap(lambda s: s * lazy.materialize().data)(jnp.arange(2.0))
        return inner[1], lazy.materialize().data

    one, other = jax.jit(outer)(images())
    np.testing.assert_array_equal(one, other)


def test_lazy_tensors_are_pytrees():
    tensor = images()
    lazy = LazyLayoutTensor(tensor).request_layout("NHWC")
    out = jax.jit(lambda lazy: lazy)(lazy)
    assert isinstance(out, LazyLayoutTensor) and out.is_pending and str(out.layout) == "NHWC"
    assert str(out.held.layout) == "NCHW"
    gradient = jax.grad(lambda lazy: jnp.sum(lazy.materialize().data ** 2))(lazy)
    np.testing.assert_allclose(nchw(gradient), 2 * nchw(tensor), rtol=1e-6)
    stack = LazyLayoutTensor(LayoutTensor(jnp.stack([tensor.data] * 2), "NCHW")).request_layout("NHWC")
    out = jax.vmap(lambda lazy: lazy.materialize().data)(stack)
    np.testing.assert_array_equal(out[1], nchw(tensor).transpose(0, 2, 3, 1))


# Convolutions

CONVOLUTIONS = {1: conv1d_auto_layout, 2: conv2d_auto_layout, 3: conv3d_auto_layout}


def operands(spatial: int, image: ConvLayout, kernel: KernelLayout) -> tuple[LayoutTensor, LayoutTensor]:
    x = LayoutTensor.logical(normal(0, 2, 3, 7, 6, 5)[(..., *(0,) * (3 - spatial))]).to_layout(image.order)
    k = LayoutTensor.logical(normal(1, 4, 3, 3, 2, 3)[(..., *(0,) * (3 - spatial))]).to_layout(kernel.order)
    return LayoutTensor(x.data, image), LayoutTensor(k.data, kernel)


@pytest.mark.parametrize("policy", [FIRST, LAST, LayoutPolicy(name="OHWI", kernel=KernelLayout.i_last)], ids=str)
@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_convolutions_agree_with_lax(spatial, policy):
    names = "DHW"[3 - spatial :]
    for image, kernel in ((f"NC{names}", f"OI{names}"), (f"{names}CN", f"I{names}O")):
        x, k = operands(spatial, ConvLayout(image), KernelLayout(kernel))
        numbers = lax.conv_dimension_numbers(x.shape, k.shape, (f"NC{names}", f"OI{names}", f"NC{names}"))
        for stride, padding in (
            (1, "SAME"),
            (2, "VALID"),
            ((1, 2, 1)[:spatial], 1),
            (1, [(0, 2), (1, 1), (2, 0)][:spatial]),
        ):
            out = CONVOLUTIONS[spatial](x, k, stride, padding, policy=policy, rhs_dilation=(1, 2, 1)[:spatial])
            assert out.layout == policy.preferred(spatial).out
            strides = (stride,) * spatial if isinstance(stride, int) else stride
            pads = [(padding, padding)] * spatial if isinstance(padding, int) else padding
            expected = lax.conv_general_dilated(
                nchw(x), nchw(k), strides, pads, rhs_dilation=(1, 2, 1)[:spatial], dimension_numbers=numbers
            )
            assert out.shape == expected.shape
            np.testing.assert_allclose(nchw(out), expected, rtol=1e-4, atol=1e-5)


def chain(x: LayoutTensor, *kernels: LayoutTensor) -> LayoutTensor:
    for kernel in kernels:
        x = conv2d_auto_layout(x, kernel, policy=LAST).map(jax.nn.relu) * 0.5
    return x


def test_a_chain_converts_at_its_ends():
    x, kernels = images(), [LayoutTensor(normal(i, 3, 3, 3, 3), "OIHW") for i in range(3)]
    assert transposes(chain, x, *kernels) == 1 + 3
    assert transposes(lambda *args: chain(*args).to_layout("NCHW"), x, *kernels) == 2 + 3
    held = [kernel.to_layout("HWIO") for kernel in kernels]
    assert transposes(chain, x.to_layout("NHWC"), *held) == 0


def test_a_lazy_input_is_converted_once_for_its_readers():
    kernels = [LayoutTensor(normal(i, 3, 3, 3, 3), "HWIO") for i in range(2)]

    def fork(x, *kernels):
        return sum(conv2d_auto_layout(x, kernel, policy=LAST).data for kernel in kernels)

    assert transposes(fork, images(), *kernels) == 2
    assert transposes(lambda x, *kernels: fork(LazyLayoutTensor(x), *kernels), images(), *kernels) == 1
    pending = LazyLayoutTensor(images("NHWC")).request_layout("NCHW")  # what a consumer that wants NHWC cancels
    assert transposes(fork, pending, *kernels) == 0


def test_convolutions_under_transformations():
    x, k = images(), LayoutTensor(normal(1, 4, 3, 3, 3), "OIHW")

    def plain(x, k):
        return lax.conv_general_dilated(x, k, (1, 1), "SAME")

    gradients = jax.jit(jax.grad(lambda x, k: jnp.sum(conv2d_auto_layout(x, k).data ** 2), argnums=(0, 1)))(x, k)
    expected = jax.grad(lambda x, k: jnp.sum(plain(x, k) ** 2), argnums=(0, 1))(x.data, k.data)
    for found, wanted in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(nchw(found), wanted, rtol=1e-3, atol=1e-4)
    stack = LayoutTensor(jnp.stack([x.data, 2 * x.data]), "NCHW")
    out = jax.vmap(lambda x: conv2d_auto_layout(x, k).to_layout("NCHW").data)(stack)
    np.testing.assert_allclose(out[1], 2 * plain(x.data, k.data), rtol=1e-4, atol=1e-4)
    tuned = auto_layout(lambda x, k: conv2d_auto_layout(x, k, policy=FIRST), policy="channels_last")
    np.testing.assert_allclose(nchw(tuned(x, k)), plain(x.data, k.data), rtol=1e-4, atol=1e-4)
    assert tuned.outcome(x, k).kept


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, k: conv2d_auto_layout(x.data, k), TypeError, "input: expected a LayoutTensor or LazyLayoutTensor"),
        (lambda x, k: conv2d_auto_layout(x, k.data), TypeError, "kernel: expected a LayoutTensor"),
        (lambda x, k: conv2d_auto_layout(k, k), ValueError, "laid out as OIHW has no layout NHWC"),
        (lambda x, k: conv2d_auto_layout(x, x), ValueError, "laid out as NCHW has no layout HWIO"),
        (lambda x, k: conv1d_auto_layout(x, k), ValueError, "laid out as NCHW has no layout NWC"),
        (lambda x, k: conv2d_auto_layout(x, k, (1, 1, 1)), ValueError, "expected one number, or 2"),
        (lambda x, k: im2col_with_layout(x, (3, 3, 3)), ValueError, "expected one number, or 2"),
        (lambda x, k: im2col_with_layout(x.data, 3), TypeError, "input: expected a LayoutTensor"),
        (lambda x, k: im2col_with_layout(k, 3), ValueError, "laid out as OIHW has no layout NHWC"),
    ],
)
def test_what_cannot_be_convolved_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(images(), LayoutTensor(normal(1, 4, 3, 3, 3), "OIHW"))


# Patches


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "CHWN"])
@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "window"),
    [
        (1, "SAME", 1, (3, 2)),
        (2, "VALID", 1, (3, 3)),
        ((2, 1), 1, (1, 2), (2, 2)),
        (1, "VALID", 1, (5, 4)),
        (2, "SAME", 2, 3),
    ],
)
def test_patches_times_a_kernel_are_the_convolution(layout, stride, padding, dilation, window):
    x = images(sizes="N2 C3 H6 W5").to_layout(layout)
    patches, kernels = im2col_with_layout(x, window, stride, padding, dilation=dilation)
    assert (str(patches.layout), str(kernels)) == (("NCHW", "OIHW") if layout == "NCHW" else ("NHWC", "HWIO"))
    size = (window,) * 2 if isinstance(window, int) else window
    kernel = LayoutTensor(normal(1, 4, 3, *size), "OIHW")
    steps, pads = (stride,) * 2 if isinstance(stride, int) else stride, padding
    pads = [(padding,) * 2] * 2 if isinstance(padding, int) else padding
    dilations = (dilation,) * 2 if isinstance(dilation, int) else dilation
    expected = lax.conv_general_dilated(nchw(x), kernel.data, steps, pads, rhs_dilation=dilations)
    matrix = kernel.to_layout(kernels).data
    rows = matrix.reshape(4, -1) if layout == "NCHW" else matrix.reshape(-1, 4).T
    assert patches.shape == (2, rows.shape[1], *expected.shape[2:])
    np.testing.assert_allclose(np.einsum("npij,op->noij", nchw(patches), rows), expected, rtol=1e-4, atol=1e-4)


def test_patches_in_one_axis_of_none_and_of_lazy_tensors():
    row = LayoutTensor(jnp.arange(8.0).reshape(1, 8, 1), "NWC")
    patches, kernel = im2col_with_layout(row, 3, padding="VALID")
    assert str(kernel) == "WIO"
    np.testing.assert_array_equal(patches.data[0], [[i, i + 1, i + 2] for i in range(6)])
    none, _ = im2col_with_layout(row, 9, padding="VALID")
    assert none.shape == (1, 9, 0)
    lazy = LazyLayoutTensor(images("NHWC")).request_layout("NCHW")
    assert str(im2col_with_layout(lazy, 3)[0].layout) == "NCHW"


# Chains


@st.composite
def chains(draw: Any) -> tuple[tuple[ConvSignature, ...], ConvDimensionNumbers, Any]:
    """A chain of convolutions as written in some layouts: signatures, layouts, jaxpr."""
    spatial = draw(st.integers(1, 2))
    forms = [ConvDimensionNumbers.channels_first(spatial), ConvDimensionNumbers.channels_last(spatial)]
    written = draw(st.sampled_from([*forms, ConvDimensionNumbers(forms[1].lhs, forms[0].rhs, forms[0].out)]))
    features = draw(st.lists(st.sampled_from([1, 4, 16, 64]), min_size=2, max_size=5))
    windows = draw(st.lists(st.sampled_from([1, 3]), min_size=len(features) - 1, max_size=len(features) - 1))
    numbers = written.to_lax()

    def shape(layout: ConvLayout | KernelLayout, *logical: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(tuple(logical[axis] for axis in layout.order), jnp.float32)

    def net(x: Any, *kernels: Any) -> Any:
        for kernel in kernels:
            x = lax.conv_general_dilated(x, kernel, (1,) * spatial, "SAME", dimension_numbers=numbers)
        return x

    if written.lhs != written.out:  # each reads what the one before gives, so chains of one only
        features, windows = features[:2], windows[:1]
    x = shape(written.lhs, 2, features[0], *(16,) * spatial)
    sides = zip(itertools.pairwise(features), windows, strict=True)
    kernels = [shape(written.rhs, o, i, *(k,) * spatial) for (i, o), k in sides]
    jaxpr = jax.make_jaxpr(net)(x, *kernels)
    found = [eqn for eqn in equations(jaxpr) if eqn.primitive.name == "conv_general_dilated"]
    ops = tuple(ConvSignature.of(*(v.aval for v in eqn.invars), eqn.params) for eqn in found)
    assert all(written_dims(eqn.params) == written for eqn in found)
    return ops, written, jaxpr


POLICIES = st.builds(
    LayoutPolicy,
    name=st.just("drawn"),
    channels_last=st.booleans(),
    kernel=st.sampled_from([KernelLayout.io_last, KernelLayout.oi_first, KernelLayout.i_last]),
    flops_per_ns=st.floats(0.01, 10),
    bytes_per_ns=st.floats(0.001, 1),
    other_order=st.floats(1, 5),
)


def believed_ns(
    ops: tuple[ConvSignature, ...], chosen: Any, policy: LayoutPolicy, written: ConvDimensionNumbers
) -> float:
    """What a chain costs in some layouts, added up."""
    total = _moved(ops[0].lhs_shape, ops[0].lhs_dtype, written.lhs, chosen[0].lhs, policy)
    total += _moved(ops[-1].out_shape, ops[-1].out_dtype, chosen[-1].out, written.out, policy)
    for (op, a), (_, b) in itertools.pairwise(zip(ops, chosen, strict=True)):
        total += _moved(op.out_shape, op.out_dtype, a.out, b.lhs, policy)
    return total + sum(_alone(op, dims, policy, written) for op, dims in zip(ops, chosen, strict=True))


@examples(60)
@given(chains(), POLICIES)
def test_a_chain_is_a_special_case_of_the_graph(drawn, policy):
    ops, written, jaxpr = drawn
    chosen = select_layout_for_sequence(ops, policy, written=written)
    least = believed_ns(ops, chosen, policy, written)
    if len(ops) <= 3:
        every = itertools.product(*(_offered(op, policy, written) for op in ops))
        assert least == pytest.approx(min(believed_ns(ops, one, policy, written) for one in every), rel=1e-9)

    graph = build_graph(
        jaxpr, lambda conv, as_is: [Candidate("xla", dims) for dims in _offered(conv, policy, as_is.dims)]
    )

    def site_ns(node: Any, mode: Any) -> float:
        conv = node.conv
        return policy.conv_ns(conv.kind, "xla", mode.candidate.dims, conv.macs, conv.nbytes, conv.lhs_dtype)

    def conversion_ns(shape: Any, dtype: Any, held: Any, wanted: Any) -> float:
        return policy.conversion_ns(math.prod(shape) * dtype.itemsize)

    plan = solve(graph, site_ns, conversion_ns)
    assert plan.exact
    assert least * (1 - 1e-9) <= plan.predicted_ns <= least * (1 + 1e-9) + RELUCTANCE * len(graph.nodes)


def test_a_chain_keeps_its_layout_where_conversions_are_dear():
    x, k = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8, 32, 56, 56), (32, 32, 3, 3)))
    (eqn,) = jax.make_jaxpr(lambda x, k: lax.conv_general_dilated(x, k, (1, 1), "SAME"))(x, k).eqns
    conv = ConvSignature.of(x, k, eqn.params)
    first, last = (form(2) for form in (ConvDimensionNumbers.channels_first, ConvDimensionNumbers.channels_last))
    slow, fast = (LayoutPolicy(name="p", flops_per_ns=10.0, bytes_per_ns=rate, other_order=1.1) for rate in (0.01, 100))
    assert select_layout_for_sequence([conv] * 3, fast, written=first) == (last,) * 3
    assert select_layout_for_sequence([conv] * 3, slow, written=first) == (first,) * 3
    assert select_layout_for_sequence([conv] * 3, slow) == (last,) * 3  # nothing says otherwise
    assert select_layout_for_sequence([], fast) == ()
    with pytest.raises(ValueError, match=r"convolutions of \[1, 2\] spatial axes in one sequence"):
        select_layout_for_sequence([conv], fast, written=ConvDimensionNumbers.channels_first(1))
