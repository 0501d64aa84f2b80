"""The table of rules: every primitive in it that depends on the order, bound in several, gives what it gave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from programs import compiled

from jaxlayout.convs.candidates import Candidate
from jaxlayout.graph.build import LayoutGraph, build_graph
from jaxlayout.graph.program import count_transposes
from jaxlayout.graph.rules import Labelling, Orders, follow
from jaxlayout.graph.rules.base import same_axes
from jaxlayout.graph.solve import plan_of
from jaxlayout.layout import ConvDimensionNumbers
from jaxlayout.rewrite.retrace import retrace

SHAPE = (2, 6, 4, 5)  # of what each function is given
MATRIX = np.arange(12, dtype=np.float32).reshape(6, 2) % 5 - 2
BATCHED = np.arange(6 * 4 * 3 * 2, dtype=np.float32).reshape(4, 3, 6, 2) % 5 - 2


def pool(x: Any, window: Any = (1, 1, 3, 2)) -> Any:
    return lax.reduce_window(x, -jnp.inf, lax.max, window, (1, 1, 2, 1), [(0, 0), (0, 0), (1, 1), (0, 1)])


def window(x: Any, start: float, op: Any) -> Any:
    spread = {"base_dilation": (1, 1, 1, 2), "window_dilation": (1, 1, 2, 1)}
    return lax.reduce_window(x, start, op, (1, 1, 2, 3), (1, 1, 2, 1), [(0, 0), (0, 0), (1, 0), (0, 1)], **spread)


def first_largest(x: Any, axis: int) -> Any:
    """A reduction of two arrays at once, by a function of the user's own."""

    def larger(a: Any, b: Any) -> Any:
        keep = (a[0] > b[0]) | ((a[0] == b[0]) & (a[1] < b[1]))
        return jnp.where(keep, a[0], b[0]), jnp.where(keep, a[1], b[1])

    places = lax.broadcasted_iota(jnp.int32, x.shape, axis)
    return lax.reduce((x, places), (np.float32(-np.inf), np.int32(2**30)), larger, (axis,))


FUNCTIONS: dict[str, list[Callable[[Any], Any]]] = {
    "add_any": [jax.grad(lambda x: jnp.sum(x * x * x))],
    "argmax": [lambda x: jnp.argmax(x, 1), lambda x: jnp.argmax(x, 3)],
    "argmin": [lambda x: lax.argmin(x, 2, jnp.int32)],
    "broadcast_in_dim": [
        lambda x: lax.broadcast_in_dim(x, (3, *SHAPE), (1, 2, 3, 4)),
        lambda x: lax.broadcast_in_dim(x[:, :, :1], (2, 6, 7, 4, 5), (0, 1, 3, 4)),
    ],
    "clamp": [lambda x: lax.clamp(x - 1, jnp.ones_like(x), x + 1), lambda x: lax.clamp(-1.0, x, 1.0)],
    "concatenate": [lambda x: jnp.concatenate([x, 2 * x, x[:, :2]], 1), lambda x: jnp.concatenate([x, x], 3)],
    "cumlogsumexp": [lambda x: lax.cumlogsumexp(x, 2)],
    "cummax": [lambda x: lax.cummax(x, 1)],
    "cummin": [lambda x: lax.cummin(x, 3, reverse=True)],
    "cumprod": [lambda x: lax.cumprod(x, 2)],
    "cumsum": [lambda x: lax.cumsum(x, 0), lambda x: lax.cumsum(x, 1, reverse=True)],
    "dot_general": [
        lambda x: lax.dot_general(x, MATRIX, (((1,), (0,)), ((), ()))),
        lambda x: lax.dot_general(MATRIX, x, (((0,), (1,)), ((), ()))),
        lambda x: lax.dot_general(BATCHED, x, (((2,), (1,)), ((0,), (2,)))),
        lambda x: lax.dot_general(x, BATCHED, (((), ()), ((2, 1), (0, 2)))),
        lambda x: lax.dot_general(x, x, (((1, 3), (1, 3)), ((2,), (2,)))),
        lambda x: jnp.einsum("nchw,ndhw->dcn", x, x),
    ],
    "dynamic_slice": [lambda x: lax.dynamic_slice(x, jnp.int32(jnp.sign(x[0, 0, 0, :4])), (1, 3, 2, 4))],
    "dynamic_update_slice": [
        lambda x: lax.dynamic_update_slice(x, 9 * x[:1, :2, :3, :4], jnp.int32(jnp.abs(x[0, 0, 0, :4])))
    ],
    "iota": [lambda x: x + lax.broadcasted_iota(x.dtype, SHAPE, 1) - lax.broadcasted_iota(x.dtype, SHAPE, 3)],
    "pad": [lambda x: lax.pad(x, np.float32(7), [(1, 0, 0), (-1, 2, 1), (0, -2, 0), (2, 2, 2)])],
    "reduce": [lambda x: first_largest(x, 1), lambda x: first_largest(x, 3)],
    "reduce_and": [lambda x: jnp.all(x > -2, 2)],
    "reduce_max": [lambda x: jnp.max(x, (1, 3))],
    "reduce_min": [lambda x: jnp.min(x, (0, 2))],
    "reduce_or": [lambda x: jnp.any(x > 1, (0, 3))],
    "reduce_prod": [lambda x: jnp.prod(x, 3)],
    "reduce_sum": [lambda x: jnp.sum(x, (2, 3)), lambda x: jnp.sum(x, 1), lambda x: jnp.sum(x, (0, 3))],
    "reduce_xor": [lambda x: lax.reduce(x.astype(np.int32), np.int32(0), lax.bitwise_xor, (1,))],
    "reduce_window": [lambda x: window(x, 1.0, lax.mul)],
    "reduce_window_max": [lambda x: window(x, -np.inf, lax.max)],
    "reduce_window_min": [lambda x: window(x, np.inf, lax.min)],
    "reduce_window_sum": [lambda x: window(x, 0.0, lax.add)],
    "reshape": [
        lambda x: jnp.reshape(x, (2, 6, 20)),
        lambda x: jnp.reshape(x, (12, 4, 5)),
        lambda x: jnp.reshape(x, (2, 2, 3, 4, 5)),
        lambda x: jnp.reshape(x, (2, 1, 6, 4, 1, 5)),
        lambda x: jnp.reshape(x[:, :, :1], (2, 6, 5)),
    ],
    "rev": [lambda x: lax.rev(x, (1,)), lambda x: lax.rev(x, (0, 3))],
    "select_and_gather_add": [
        lambda x: jax.jvp(pool, (x,), (2 * x,))[1],
        lambda x: jax.jvp(lambda x: window(x, -np.inf, lax.max), (x,), (2 * x,))[1],
    ],
    "select_and_scatter_add": [jax.grad(lambda x: jnp.sum(pool(x) * (1 + jnp.cumsum(pool(x), 3))))],
    "select_n": [lambda x: jnp.where(x > 0, x, -7), lambda x: lax.select_n(x[0, 0, 0, 0] > 0, x, 2 * x)],
    "slice": [lambda x: x[:, 1:5:2, ::3, :4], lambda x: lax.slice(x, (0, 1, 0, 2), (1, 6, 3, 5))],
    "split": [lambda x: lax.split(x, (1, 3, 2), 1), lambda x: lax.split(x, (1, 3), 2)],
    "squeeze": [lambda x: lax.squeeze(x[:, :, 1:2], (2,)), lambda x: lax.squeeze(x[1:, :, :, :1], (0, 3))],
    "transpose": [lambda x: jnp.transpose(x, (3, 0, 2, 1)), lambda x: jnp.sum(jnp.transpose(x, (1, 3, 0, 2)), 1)],
}


def after_convolution(fun: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    def program(x: Any, k: Any) -> Any:
        numbers = ConvDimensionNumbers.parse("NCHW,OIHW->NCHW").to_lax()
        return fun(lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=numbers))

    return program


def graph_in(order: str, jaxpr: Any) -> LayoutGraph:
    way = Candidate("xla", ConvDimensionNumbers.parse(f"NCHW,OIHW->{order}"))
    return build_graph(jaxpr, lambda conv, written: [written, way])


@pytest.mark.parametrize("order", ["NHWC", "CNHW", "HCNW", "WCHN"])
def test_every_rule(order):
    """Every equation in an order that is not the one written, where it has such, and every primitive has."""
    rng = np.random.default_rng(0)
    args = [np.asarray(rng.integers(-1, 2, shape), np.float32) for shape in ((2, 2, 4, 5), (6, 2, 1, 1))]
    retracings, elsewhere = {}, set()
    for name, functions in FUNCTIONS.items():
        for i, fun in enumerate(functions):
            jaxpr = jax.make_jaxpr(after_convolution(fun))(*args)
            graph = graph_in(order, jaxpr)
            plan = plan_of(graph, [node.modes[-1] for node in graph.nodes])
            retracings[f"{name} {i}"] = retrace(jaxpr, plan), jaxpr
            assert count_transposes(jax.make_jaxpr(retrace(jaxpr, plan))(*args)) == len(plan.conversions)
            elsewhere |= {node.name for node in graph.nodes if len(node.modes) > 1}
    swapped = {"reduce_window", "reduce_window_max", "reduce_window_min", "select_and_gather_add"}
    swapped |= {"select_and_scatter_add"}
    missing = set(FUNCTIONS) - elsewhere
    assert missing <= (swapped if order == "WCHN" else set())

    def ours(*args: Any) -> Any:
        return {name: fun(*args) for name, (fun, _) in retracings.items()}

    def theirs(*args: Any) -> Any:
        return {
            name: jax.core.eval_jaxpr(getattr(j, "jaxpr", j), j.consts, *args) for name, (_, j) in retracings.items()
        }

    found, wanted = compiled(ours, *args), compiled(theirs, *args)
    for name in wanted:
        for a, b in zip(found[name], wanted[name], strict=True):
            assert a.dtype == b.dtype
            if name.startswith("cumlogsumexp"):
                np.testing.assert_allclose(a, b, rtol=1e-5, err_msg=name)
            else:
                np.testing.assert_array_equal(a, b, err_msg=name)


# How orders pass


def labelled(*operands: str, to: str = "", **options: Any) -> Labelling:
    """From letters; a dot is an axis without label, letters in brackets are merged."""

    def axes(text: str) -> tuple[tuple[int, ...], ...]:
        found: list[tuple[int, ...]] = []
        inside = False
        for letter in text:
            if letter in "()":
                inside = letter == "("
                found += [()] if inside else []
            elif inside:
                found[-1] = (*found[-1], ord(letter))
            else:
                found.append(() if letter == "." else (ord(letter),))
        return tuple(found)

    results = tuple(axes(text) for text in to.split()) if to.strip() else ((),) if to else ()
    options = {"ordered": tuple(map(ord, options["ordered"]))} if "ordered" in options else options
    return Labelling(tuple(map(axes, operands)), results, **options)


@pytest.mark.parametrize(
    ("labelling", "slot", "order", "expected"),
    [
        (labelled("abc", "abc", to="abc"), 0, (2, 0, 1), ((2, 0, 1), (2, 0, 1), (2, 0, 1))),
        (labelled("abc", to="cab"), 0, (0, 1, 2), ((0, 1, 2), (1, 2, 0))),  # a transpose, absorbed
        (labelled("b", to="abcd"), 0, (0,), ((0,), (0, 1, 2, 3))),  # what is broadcast keeps its place
        (labelled("b", to="abcd"), 1, (0, 2, 3, 1), ((0,), (0, 2, 3, 1))),
        (labelled("abcd", to="ad"), 0, (0, 3, 1, 2), ((0, 3, 1, 2), (0, 1))),
        (labelled("abcd", to="ad"), 1, (1, 0), ((3, 0, 1, 2), (1, 0))),  # what is summed goes behind what it follows
        (labelled("abcd", to="abc"), 1, (0, 2, 1), ((0, 2, 3, 1), (0, 2, 1))),  # directly behind it
        (labelled("ab.c", to="abc"), 0, (2, 3, 0, 1), ((2, 3, 0, 1), (2, 0, 1))),
        (labelled("ab.c", to="abc"), 1, (2, 0, 1), ((3, 0, 1, 2), (2, 0, 1))),
        (labelled("abcd", to="a(bc)d"), 0, (3, 0, 1, 2), ((3, 0, 1, 2), (2, 0, 1))),  # merged, and still neighbours
        (labelled("abcd", to="a(bc)d"), 0, (0, 1, 3, 2), None),
        (labelled("abcd", to="a(bc)d"), 0, (0, 2, 1, 3), None),
        (labelled("a(bc)", to="abc"), 0, (1, 0), ((1, 0), (1, 2, 0))),
        (labelled("a(bc)", to="abc"), 1, (2, 0, 1), None),
        (labelled("abcd", "de", to="abce"), 0, (2, 1, 0, 3), ((2, 1, 0, 3), (0, 1), (2, 1, 0, 3))),
        (labelled("ak", "kb", to="ab"), 0, (1, 0), ((1, 0), (0, 1), (0, 1))),  # and the matrix stays as it is
        (labelled("abcd", to="abcd", ordered="cd"), 0, (0, 2, 3, 1), ((0, 2, 3, 1), (0, 2, 3, 1))),
        (labelled("abcd", to="abcd", ordered="cd"), 0, (0, 3, 1, 2), None),
    ],
)
def test_how_an_order_passes(labelling, slot, order, expected):
    found = follow(labelling, slot, order)
    assert found == (expected and Orders(tuple(expected[: len(labelling.operands)]), tuple(expected[-1:])))
    if found is not None:  # and it says the same of what it has found
        assert follow(labelling, slot, (*found.operands, *found.results)[slot]) == found


def test_blocks_are_not_mixed():
    """Results of a matrix product have the axes of the left operand before those of the right one."""
    product = labelled("ab", "cd", to="abcd", block=dict(zip(map(ord, "abcd"), (1, 1, 2, 2), strict=True)))
    assert follow(product, 2, (1, 0, 3, 2)) == Orders(((1, 0), (1, 0)), ((1, 0, 3, 2),))
    assert follow(product, 2, (2, 3, 0, 1)) is None
    assert follow(product, 1, (1, 0)) == Orders(((0, 1), (1, 0)), ((0, 1, 3, 2),))


def test_an_order_that_an_equation_has_a_mode_for_makes_no_other():
    """That of a sum says nothing of where the axis stood that was summed over: no order of the operand comes of it."""
    args = [np.zeros(shape, np.float32) for shape in ((2, 2, 4, 5), (6, 2, 1, 1))]
    for fun in (lambda x: jnp.sum(x, 2), lambda x: jnp.sum(x, 1), lambda x: jax.nn.relu(jnp.sum(x, 2))):
        graph = graph_in("WHNC", jax.make_jaxpr(after_convolution(fun))(*args))
        assert all(len(node.modes) <= 2 for node in graph.nodes)


def test_same_axes_for_scalars_and_arrays():
    (eqn,) = jax.make_jaxpr(lambda x: lax.clamp(0.0, x, 1.0))(np.zeros((2, 3))).eqns
    assert follow(same_axes(eqn), 1, (1, 0)) == Orders(((), (1, 0), ()), ((1, 0),))
