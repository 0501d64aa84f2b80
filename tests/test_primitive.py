"""`tuned_conv` is a convolution to every transformation, and what they derive from it is `tuned_conv` again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawing import examples
from hypothesis import given
from hypothesis import strategies as st
from jax import export, lax
from jax.extend.core.primitives import conv_general_dilated_p
from jax.test_util import check_grads
from programs import compiled
from steps import conv_params

from jaxlayout.convs.lowering import Lowering, registered
from jaxlayout.convs.primitive import tuned_conv, tuned_conv_p
from jaxlayout.graph.program import equations
from jaxlayout.layout import ConvDimensionNumbers
from jaxlayout.runtime._compat import eval_equations


def rebound(plain: Callable[..., Any], *args: Any, lowering: str = "xla") -> Any:
    """A function's equations, its convolutions as tuned ones."""

    def bind(eqn: Any, operands: Any) -> Any:
        if eqn.primitive is conv_general_dilated_p:
            return [tuned_conv(*operands, lowering=lowering, **eqn.params)]
        return None

    return eval_equations(jax.make_jaxpr(plain)(*args), args, bind)[0]


@dataclass(frozen=True)
class Case:
    """A convolution, its operands' shapes and dtypes, and its parameters beside the dimension numbers."""

    dims: str
    lhs: tuple[int, ...]
    rhs: tuple[int, ...]
    dtype: Any = np.float32
    to: Any = None
    strides: tuple[int, ...] = (1, 1)
    padding: tuple[tuple[int, int], ...] = ((1, 1), (1, 1))
    lhs_dilation: tuple[int, ...] = (1, 1)
    rhs_dilation: tuple[int, ...] = (1, 1)
    groups: int = 1
    batch_groups: int = 1
    precision: Any = None

    @property
    def options(self) -> dict[str, Any]:
        return {
            "window_strides": self.strides,
            "padding": self.padding,
            "lhs_dilation": self.lhs_dilation,
            "rhs_dilation": self.rhs_dilation,
            "dimension_numbers": ConvDimensionNumbers.parse(self.dims).to_lax(),
            "feature_group_count": self.groups,
            "batch_group_count": self.batch_groups,
            "precision": self.precision,
            "preferred_element_type": self.to,
        }

    def plain(self, lhs: Any, rhs: Any) -> Any:
        return lax.conv_general_dilated(lhs, rhs, **self.options)

    def tuned(self, lhs: Any, rhs: Any, lowering: str = "xla") -> Any:
        return rebound(self.plain, lhs, rhs, lowering=lowering)

    def avals(self) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        return jax.ShapeDtypeStruct(self.lhs, self.dtype), jax.ShapeDtypeStruct(self.rhs, self.dtype)

    def operands(self, *batch: int, seed: int = 0) -> tuple[jax.Array, jax.Array]:
        rng = np.random.default_rng(seed)
        lhs, rhs = (rng.integers(-2, 3, (*batch, *a.shape)) for a in self.avals())
        return jnp.asarray(lhs, self.dtype), jnp.asarray(rhs, self.dtype)


CASES = {
    "plain": Case("NHWC,HWIO->NHWC", (2, 5, 6, 3), (3, 3, 3, 4)),
    "strided": Case("NCHW,OIHW->NHWC", (2, 3, 7, 6), (4, 3, 3, 2), strides=(2, 3), padding=((0, 2), (1, -1))),
    "dilated": Case(
        "NHWC,OIHW->NCHW", (2, 5, 6, 3), (4, 3, 2, 3), strides=(1, 2), lhs_dilation=(2, 1), rhs_dilation=(1, 2)
    ),
    "grouped": Case("NHWC,HWIO->NHWC", (2, 4, 5, 6), (3, 3, 2, 9), groups=3, precision=("default", "highest")),
    "depthwise": Case("NCHW,OIHW->NCHW", (2, 4, 5, 6), (4, 1, 3, 3), groups=4, strides=(2, 2)),
    "batch groups": Case("HWNC,HWIO->NHWC", (4, 5, 4, 3), (3, 3, 3, 4), batch_groups=2),
    "bf16": Case("NHWC,HWIO->NHWC", (2, 5, 5, 3), (3, 3, 3, 4), jnp.bfloat16, to=jnp.float32),
    "1-D": Case(
        "WNC,OIW->NCW", (9, 2, 3), (4, 3, 3), strides=(2,), padding=((-1, 1),), lhs_dilation=(1,), rhs_dilation=(2,)
    ),
    "0-D": Case("CN,IO->NC", (3, 2), (3, 4), strides=(), padding=(), lhs_dilation=(), rhs_dilation=()),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def value(f: Any, x: Any, k: Any) -> Any:
    return f(x, k)


def loss(f: Any) -> Any:
    return lambda x, k: jnp.sum(jnp.asarray(f(x, k), jnp.float32) ** 2)


def by_grad(f: Any, x: Any, k: Any) -> Any:
    return jax.grad(loss(f), (0, 1))(x, k)


def by_jvp(f: Any, x: Any, k: Any) -> Any:
    return jax.jvp(f, (x, k), (x + 1, 2 * k))


def by_linearize(f: Any, x: Any, k: Any) -> Any:
    out, tangent = jax.linearize(f, x, k)
    return out, tangent(x, k)


def by_linear_transpose(f: Any, x: Any, k: Any) -> Any:
    out = f(x, k)
    to_lhs = jax.linear_transpose(lambda x: f(x, k), x)(out)
    to_rhs = jax.linear_transpose(lambda k: f(x, k), k)(out)
    return to_lhs, to_rhs


def by_forward_over_reverse(f: Any, x: Any, k: Any) -> Any:
    return jax.jvp(jax.grad(loss(f), (0, 1)), (x, k), (x + 1, k))


def by_reverse_over_reverse(f: Any, x: Any, k: Any) -> Any:
    def slope(x: Any, k: Any) -> Any:
        return sum(jnp.sum(g.astype(jnp.float32)) for g in jax.grad(loss(f), (0, 1))(x, k))

    return jax.grad(slope, (0, 1))(x, k)


def by_checkpoint(f: Any, x: Any, k: Any) -> Any:
    return jax.grad(loss(jax.checkpoint(f)), (0, 1))(x, k)


def by_scan(f: Any, x: Any, k: Any) -> Any:
    def total(x: Any, k: Any) -> Any:
        return lax.scan(lambda c, each: (c + loss(f)(each, k), f(each, k)), 0.0, jnp.stack([x, x + 1, -x]))[0]

    return jax.value_and_grad(total, (0, 1))(x, k)


BY = [
    value, by_grad, by_jvp, by_linearize, by_linear_transpose, by_forward_over_reverse, by_reverse_over_reverse,
    by_checkpoint, by_scan,
]  # fmt: skip


def assert_same(found: Any, wanted: Any) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, b.weak_type)
        np.testing.assert_array_equal(a, b)


def convolutions(fun: Callable[..., Any], *args: Any) -> list[str]:
    primitives = (eqn.primitive for eqn in equations(jax.make_jaxpr(fun)(*args)))
    return [p.name for p in primitives if p in (tuned_conv_p, conv_general_dilated_p)]


def assert_tuned(tuned: Callable[..., Any], plain: Callable[..., Any], *args: Any) -> None:
    """The tuned form has a tuned convolution wherever the plain one has a convolution, and gives the same bits."""
    ours, theirs = convolutions(tuned, *args), convolutions(plain, *args)
    assert ours == ["tuned_conv"] * len(theirs) and ours
    assert_same(compiled(tuned, *args), compiled(plain, *args))


def test_transformed(case):
    def every(f: Any) -> Any:
        return lambda x, k: {by.__name__: by(f, x, k) for by in BY}

    assert_tuned(every(case.tuned), every(case.plain), *case.operands())


def test_eager():
    case = CASES["strided"]
    x, k = case.operands()
    assert_same(case.tuned(x, k), case.plain(x, k))
    assert_same(by_grad(case.tuned, x, k), by_grad(case.plain, x, k))


def test_batched(case):
    """Either operand, both, twice, and the gradients of all of these."""

    def every(f: Any) -> Any:
        both = jax.vmap(f, in_axes=(2, 1), out_axes=1)
        twice = jax.vmap(jax.vmap(f, in_axes=(-1, None)), in_axes=(None, 0))

        def run(x: Any, k: Any, xs: Any, ks: Any) -> Any:
            lhs = jnp.moveaxis(xs, 0, 2), jnp.moveaxis(xs, 0, -1)
            return {
                "lhs": jax.vmap(f, in_axes=(0, None))(xs, k),
                "rhs": jax.vmap(f, in_axes=(None, -1))(x, jnp.moveaxis(ks, 0, -1)),
                "both": both(lhs[0], jnp.moveaxis(ks, 0, 1)),
                "twice": twice(lhs[1], ks),
                "of gradients": jax.vmap(lambda x: by_grad(f, x, k))(xs),
                "gradients of": by_grad(both, lhs[0], jnp.moveaxis(ks, 0, 1)),
                "gradients of twice": by_grad(twice, lhs[1], ks),
            }

        return run

    assert_tuned(every(case.tuned), every(case.plain), *case.operands(), *case.operands(3))


def test_sharded():
    """An image on each device, the kernel on all: its gradient is summed over them, which JAX adds where it sees what
    varies over devices."""
    case = CASES["plain"]
    mesh = jax.make_mesh((1,), ("images",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = jax.P("images"), jax.P()

    def gradients(f: Any) -> Any:
        each = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=specs[0])
        return lambda x, k: (each(x, k), by_grad(each, x, k))

    assert_tuned(gradients(case.tuned), gradients(case.plain), *case.operands())


@pytest.mark.parametrize("name", ["strided", "0-D"])
def test_hessian(name):
    case = CASES[name]
    hessians = (jax.hessian(loss(f), argnums=(0, 1)) for f in (case.tuned, case.plain))
    assert_tuned(*hessians, *case.operands())


def test_derivatives_are_derivatives():
    """By finite differences, and not only those of the plain convolution."""
    case = CASES["dilated"]
    check_grads(case.tuned, case.operands(), order=2, modes=("fwd", "rev"), atol=0.05, rtol=0.05)


def test_complex_and_integers():
    for dtype in (np.complex64, np.int32):
        case = Case("NHWC,HWIO->NHWC", (2, 5, 6, 3), (3, 3, 3, 4), dtype)
        found, wanted = (jax.jit(f)(*case.operands()) for f in (case.tuned, case.plain))
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, wanted)


@examples(30)
@given(st.data())
def test_drawn_convolutions(data):
    sizes = st.sampled_from([1, 2, 3, 4])
    lhs = tuple(data.draw(st.lists(sizes, min_size=2, max_size=5)))
    rhs, params = data.draw(conv_params(lhs))
    rng = np.random.default_rng(0)
    x, k = (jnp.asarray(rng.integers(-2, 3, shape), jnp.float32) for shape in (lhs, rhs))
    transformed = data.draw(st.sampled_from([value, by_grad, by_jvp, by_linear_transpose]))

    def plain(x: Any, k: Any) -> Any:
        return lax.conv_general_dilated(x, k, **params)

    pair = partial(rebound, plain), plain
    if data.draw(st.booleans()):
        x = jnp.stack([x, -x])
        pair = tuple(jax.vmap(f, in_axes=(0, None)) for f in pair)
    assert_tuned(*(lambda x, k, f=f: transformed(f, x, k) for f in pair), x, k)


# Exported


@pytest.mark.parametrize("name", ["grouped", "bf16", "0-D"])
def test_exported_programs_run_without_jaxlayout(name):
    case = CASES[name]
    x, k = case.operands()
    exported = export.export(jax.jit(lambda x, k: by_grad(case.tuned, x, k)))(*case.avals())
    assert "stablehlo.convolution" in exported.mlir_module() and "custom_call" not in exported.mlir_module()
    again = export.deserialize(exported.serialize())
    assert_same(again.call(x, k), jax.jit(lambda x, k: by_grad(case.plain, x, k))(x, k))


def test_symbolic_shapes_are_exported():
    case = CASES["plain"]
    batch, side = export.symbolic_shape("b, s", constraints=["s >= 3"])
    x = jax.ShapeDtypeStruct((batch, side, side, 3), np.float32)
    exported = export.export(jax.jit(lambda x, k: (case.tuned(x, k), by_grad(case.tuned, x, k))))(x, case.avals()[1])
    again = export.deserialize(exported.serialize())
    k = case.operands()[1]
    for shape in ((1, 3, 3, 3), (2, 7, 7, 3)):
        x = jnp.asarray(np.random.default_rng(0).integers(-2, 3, shape), np.float32)
        assert_same(again.call(x, k), jax.jit(lambda x, k: (case.plain(x, k), by_grad(case.plain, x, k)))(x, k))


# Lowerings


class Trick(Lowering):
    """Right, but its own derivative is zero; native in one order, and for no convolution with lhs dilation."""

    name = "trick"

    def dimension_numbers(self, conv: Any) -> Any:
        if all(d == 1 for d in conv.lhs_dilation):
            yield ConvDimensionNumbers.parse("NHWC,HWIO->NHWC")

    def apply(self, conv: Any, dims: ConvDimensionNumbers, lhs: jax.Array, prepared: jax.Array) -> jax.Array:
        out = lax.conv_general_dilated(lhs, prepared, dimension_numbers=dims.to_lax(), **conv.params)
        return lax.stop_gradient(out) + 0


def test_a_lowering_is_not_differentiated_and_stays_where_it_is_native():
    case = CASES["plain"]
    x, k = case.operands()

    def tricky(x: Any, k: Any) -> Any:
        return case.tuned(x, k, lowering="trick")

    def chosen(fun: Any, *args: Any) -> list[str]:
        return [eqn.params["lowering"] for eqn in equations(jax.make_jaxpr(fun)(*args)) if "lowering" in eqn.params]

    with registered(Trick()):
        assert_tuned(*(lambda x, k, f=f: by_grad(f, x, k) for f in (tricky, case.plain)), x, k)
        assert chosen(tricky, x, k) == ["trick"]
        assert chosen(lambda x, k: jax.jvp(tricky, (x, k), (x, k)), x, k) == ["trick"] * 3
        assert chosen(jax.vmap(tricky, in_axes=(0, None)), jnp.stack([x, x]), k) == ["trick"]  # a larger batch
        assert chosen(lambda x, k: jax.vjp(tricky, x, k)[1](tricky(x, k)), x, k)[2:] == ["xla", "xla"]
    with pytest.raises(LookupError, match=r"no lowering named .trick. is registered"):
        jax.jit(tricky).lower(x + 1, k)
