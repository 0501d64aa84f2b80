"""The vocabulary: named layouts, axis orders, and tensors that know theirs."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawing import examples
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

from jaxlayout.layout import (
    ConvDimensionNumbers,
    ConvLayout,
    KernelLayout,
    LayoutTensor,
    conversion,
    identity,
    moves_data,
)
from jaxlayout.layout.order import permuted

ORDERS = st.integers(0, 5).flatmap(lambda rank: st.permutations(range(rank)).map(tuple))


# Names


@pytest.mark.parametrize(
    ("kind", "text", "spec"),
    [
        (ConvLayout, "NC", (0, 1)),
        (ConvLayout, "CN", (1, 0)),
        (ConvLayout, "NCHW", (0, 1, 2, 3)),
        (ConvLayout, "NHWC", (0, 3, 1, 2)),
        (ConvLayout, "WHCN", (3, 2, 1, 0)),
        (ConvLayout, "NDHWC", (0, 4, 1, 2, 3)),
        (ConvLayout, "N0123C", (0, 5, 1, 2, 3, 4)),
        (KernelLayout, "IO", (1, 0)),
        (KernelLayout, "OIW", (0, 1, 2)),
        (KernelLayout, "HWIO", (3, 2, 0, 1)),
        (KernelLayout, "WDOIH", (2, 3, 1, 4, 0)),
    ],
)
def test_a_layout_is_its_axes_and_counts_them_as_lax_does(kind, text, spec):
    layout = kind(text)
    assert str(layout) == layout.axes == text
    assert layout.spec == spec
    assert kind.from_spec(spec) == layout
    assert hash(kind.from_spec(spec)) == hash(layout)


@given(st.sampled_from([ConvLayout, KernelLayout]), st.integers(2, 6).flatmap(lambda n: st.permutations(range(n))))
def test_every_spec_has_its_layout(kind, spec):
    layout = kind.from_spec(spec)
    assert layout.spec == tuple(spec)
    assert kind(str(layout)) == layout


def test_lower_case_and_digits_are_understood():
    assert ConvLayout("nhwc") == ConvLayout("NHWC") == ConvLayout("N01C")
    assert ConvLayout("N12C") == ConvLayout("NHWC")
    assert ConvLayout("NC0") == ConvLayout("NCW")
    assert KernelLayout("10io") == KernelLayout("WHIO")
    assert ConvLayout("N210C") == ConvLayout("NWHDC")


def test_spatial_axes_are_named_in_their_logical_order():
    assert ConvLayout("WNCH").spatial == "HW"
    assert ConvLayout("NC").spatial == ""
    assert KernelLayout("WHDIO").spatial == "DHW"


@pytest.mark.parametrize("text", ["", "N", "NHC", "NHHWC", "NXHC", "OIHW", "NCDH", "NCHWO", "NC0W"])
def test_what_is_no_layout_is_refused(text):
    with pytest.raises(ValueError, match=r"ConvLayout.*expected N, C and the spatial axes"):
        ConvLayout(text)


def test_kernels_are_not_images():
    with pytest.raises(ValueError, match=r"KernelLayout\('NHWC'\): expected O, I and the spatial axes"):
        KernelLayout("NHWC")
    assert ConvLayout("NC") != KernelLayout("OI")


def test_common_layouts():
    assert [str(ConvLayout.channels_last(n)) for n in range(4)] == ["NC", "NWC", "NHWC", "NDHWC"]
    assert [str(ConvLayout.channels_first(n)) for n in range(4)] == ["NC", "NCW", "NCHW", "NCDHW"]
    assert [str(KernelLayout.io_last(n)) for n in range(4)] == ["IO", "WIO", "HWIO", "DHWIO"]
    assert [str(KernelLayout.oi_first(n)) for n in range(4)] == ["OI", "OIW", "OIHW", "OIDHW"]
    assert ConvLayout("NHWC").is_channels_last and not ConvLayout("NHWC").is_channels_first
    assert ConvLayout("CNHW").is_channels_first and not ConvLayout("CNHW").is_channels_last
    assert not ConvLayout("NHCW").is_channels_first and not ConvLayout("NHCW").is_channels_last
    assert ConvLayout("NC").is_channels_first and ConvLayout("NC").is_channels_last


def test_permutation_from_another_layout():
    nchw, nhwc = ConvLayout("NCHW"), ConvLayout("NHWC")
    array = np.zeros((2, 3, 5, 7))
    assert nhwc.permutation_from(nchw) == (0, 2, 3, 1)
    assert array.transpose(nhwc.permutation_from(nchw)).shape == (2, 5, 7, 3)
    for one, other in itertools.permutations(("NCHW", "NHWC", "WHCN", "CNWH"), 2):
        there, back = (ConvLayout(a).permutation_from(ConvLayout(b)) for a, b in ((one, other), (other, one)))
        assert array.transpose(there).transpose(back).shape == array.shape
    with pytest.raises(ValueError, match="NCDHW has not the axes of NHWC"):
        nhwc.permutation_from(ConvLayout("NCDHW"))


@pytest.mark.parametrize(
    "text", ["NHWC,HWIO->NHWC", "NCHW,OIHW->NHWC", "NC,OI->CN", "NDHWC,DHWIO->NCDHW", "NCW,WIO->NWC"]
)
def test_dimension_numbers_to_and_from_lax(text):
    dims = ConvDimensionNumbers.parse(text)
    assert str(dims) == text
    assert ConvDimensionNumbers.parse(text.lower().replace(",", " , ").replace("->", " -> ")) == dims
    numbers = dims.to_lax()
    assert ConvDimensionNumbers.from_lax(numbers) == dims
    rank = len(dims.lhs.axes)
    theirs = lax.conv_dimension_numbers((1,) * rank, (1,) * rank, (str(dims.lhs), str(dims.rhs), str(dims.out)))
    assert numbers == theirs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("NHWC", "expected dimension numbers such as"),
        ("NHWC,HWIO", "expected dimension numbers such as"),
        ("NHWC->NHWC", "expected dimension numbers such as"),
        ("NHWC,HWIO,X->NHWC", "expected dimension numbers such as"),
        ("NHWC,HWIO->NHWC->NHWC", "expected dimension numbers such as"),
        ("HWIO,NHWC->NHWC", "ConvLayout"),
    ],
)
def test_what_are_no_dimension_numbers_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        ConvDimensionNumbers.parse(text)


@pytest.mark.parametrize("text", ["NHWC,HWIO->NCW", "NHWC,DHWIO->NHWC"])
def test_dimension_numbers_have_one_rank(text):
    with pytest.raises(ValueError, match="number of spatial axes"):
        ConvDimensionNumbers.parse(text)


# Orders


@examples(100)
@given(ORDERS.flatmap(lambda held: st.tuples(st.just(held), st.permutations(held).map(tuple))))
def test_a_conversion_takes_one_order_to_the_other(orders):
    held, wanted = orders
    shape = tuple(range(2, 2 + len(held)))
    array = np.zeros(shape)
    found = array.transpose(held).transpose(conversion(held, wanted))
    assert found.shape == array.transpose(wanted).shape == permuted(shape, wanted)
    assert conversion(held, held) == identity(len(held))


@examples(100)
@given(ORDERS, st.data())
def test_data_moves_where_more_than_unit_axes_change_places(order, data):
    shape = tuple(data.draw(st.sampled_from([1, 1, 2, 3])) for _ in order)
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    moved = array.transpose(order)
    same = np.array_equal(moved.ravel(), array.ravel())
    assert moves_data(shape, identity(len(order)), order) == (not same)


# Tensors


def primitives(fun, *args):
    return [eqn.primitive.name for eqn in jax.make_jaxpr(fun)(*args).eqns]


def test_a_tensor_in_its_own_order_is_itself():
    tensor = LayoutTensor.logical(jnp.zeros((2, 3, 4)))
    assert tensor.order == (0, 1, 2)
    assert tensor.to_layout((0, 1, 2)) is tensor


def test_a_tensor_keeps_its_logical_shape_and_values():
    array = jnp.arange(24.0).reshape(2, 3, 4)
    tensor = LayoutTensor.logical(array)
    for order in itertools.permutations(range(3)):
        moved = tensor.to_layout(order)
        assert moved.order == order and moved.shape == (2, 3, 4)
        np.testing.assert_array_equal(moved.data, array.transpose(order))
        np.testing.assert_array_equal(moved.to_layout((0, 1, 2)).data, array)
        for other in itertools.permutations(range(3)):
            np.testing.assert_array_equal(moved.to_layout(other).data, array.transpose(other))


def test_one_transpose_or_a_reshape_or_nothing():
    def to(order):
        return lambda x: LayoutTensor.logical(x).to_layout(order).data

    x = jnp.zeros((2, 1, 3, 1))
    assert primitives(to((0, 1, 2, 3)), x) == []
    assert primitives(to((1, 0, 3, 2)), x) == ["reshape"]
    assert primitives(to((2, 1, 0, 3)), x) == ["transpose"]
    assert jax.eval_shape(to((1, 0, 3, 2)), x).shape == (1, 2, 1, 3)

    def there_and_back(x):
        return LayoutTensor.logical(x).to_layout((2, 0, 1)).to_layout((0, 1, 2)).data

    assert primitives(there_and_back, x[..., 0]) == ["transpose"] * 2
    assert primitives(to(()), jnp.zeros(())) == []


@examples(100)
@given(ORDERS.flatmap(lambda a: st.tuples(st.just(a), st.permutations(a).map(tuple))), st.data())
def test_any_conversion_of_any_shape(orders, data):
    held, wanted = orders
    shape = tuple(data.draw(st.sampled_from([0, 1, 1, 2, 3])) for _ in held)
    array = np.arange(np.prod(shape, dtype=int), dtype=np.int32).reshape(shape)
    tensor = LayoutTensor(jnp.asarray(array.transpose(held)), held).to_layout(wanted)
    assert tensor.shape == shape
    np.testing.assert_array_equal(tensor.data, array.transpose(wanted))


def test_tensors_pass_through_transformations():
    array = jnp.arange(24.0).reshape(2, 3, 4)
    tensor = LayoutTensor.logical(array)

    def moved(tensor):
        return tensor.to_layout((2, 0, 1))

    out = jax.jit(moved)(tensor)
    assert isinstance(out, LayoutTensor) and out.order == (2, 0, 1)
    np.testing.assert_array_equal(out.data, array.transpose(2, 0, 1))

    weights = jnp.arange(24.0).reshape(4, 2, 3)
    gradient = jax.grad(lambda tensor: jnp.vdot(moved(tensor).data, weights))(tensor)
    assert gradient.order == (0, 1, 2)
    np.testing.assert_array_equal(gradient.data, weights.transpose(1, 2, 0))

    batch = LayoutTensor(jnp.stack([array, -array]), (0, 1, 2))  # of tensors: the mapped axis is none of theirs
    out = jax.vmap(moved)(batch)
    np.testing.assert_array_equal(out.data, jnp.stack([array, -array]).transpose(0, 3, 1, 2))

    leaves, treedef = jax.tree.flatten(tensor)
    assert leaves == [array] or leaves[0] is array
    again = jax.tree.unflatten(treedef, leaves)
    assert again.data is array and again.order == (0, 1, 2)
