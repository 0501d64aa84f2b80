"""Arrays divided among devices: what each device computes of a convolution, and what it exchanges with others."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
import pytest
from helpers import conv, python
from jax import lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlayout.convs.candidates import Candidate
from jaxlayout.convs.lowering import lowering_named
from jaxlayout.convs.signature import ConvSignature
from jaxlayout.graph.build import build_graph
from jaxlayout.graph.program import program_key
from jaxlayout.graph.shards import of_arguments
from jaxlayout.layout import ConvDimensionNumbers

MESH = AbstractMesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
X, K = jnp.zeros((8, 16, 6, 6)), jnp.zeros((32, 16, 3, 3))


def traced(fun, *args, specs):
    jaxpr = jax.make_jaxpr(fun)(*args)
    return jaxpr, of_arguments(jaxpr, [spec and NamedSharding(MESH, spec) for spec in specs])


def graph_of(fun, *args, specs):
    jaxpr, divided = traced(fun, *args, specs=specs)
    return build_graph(jaxpr, lambda conv, written: [written], divided=divided)


def sites(fun, *args, specs):
    """Batch, features in and out, and groups, of each convolution on one device."""
    found = [node.conv for node in graph_of(fun, *args, specs=specs).sites if node.conv]
    return [(c.batch, c.in_features, c.out_features, c.feature_groups, c.batch_groups) for c in found]


def results(fun, *args, specs):
    graph = graph_of(fun, *args, specs=specs)
    return [graph.values[node.operands[0]].shape for node in graph.nodes if node.kind == "output"]


def test_batch():
    assert sites(conv, X, K, specs=[P("data"), P()]) == [(2, 16, 32, 1, 1)]
    assert sites(conv, X, K, specs=[P(("data", "model")), None]) == [(1, 16, 32, 1, 1)]
    assert sites(conv, X, K, specs=[None, None]) == [(8, 16, 32, 1, 1)]
    assert results(conv, X, K, specs=[P("data"), P()]) == [(2, 32, 6, 6)]


def test_features():
    assert sites(conv, X, K, specs=[P("data"), P("model")]) == [(2, 16, 16, 1, 1)]
    assert results(conv, X, K, specs=[P("data"), P("model")]) == [(2, 16, 6, 6)]
    both = [P(None, "model"), P(None, "model")]
    assert sites(conv, X, K, specs=both) == [(8, 8, 32, 1, 1)]
    assert results(conv, X, K, specs=both) == [(8, 32, 6, 6)]
    assert sites(conv, X, K, specs=[P("data", "model"), P()]) == [(2, 16, 32, 1, 1)]  # the kernel has them all
    assert sites(conv, X, K, specs=[P("data"), P("data")]) == [(2, 16, 32, 1, 1)]  # a mesh axis divides one axis


def test_positions_count_as_whole():
    graph = graph_of(conv, X, K, specs=[P("data", None, "model"), P()])
    (site,) = graph.sites
    assert site.conv and (site.conv.batch, site.conv.spatial) == (2, (6, 6))
    assert graph.values[site.operands[0]].shape == (2, 16, 3, 6)
    assert graph.values[site.results[0]].shape == (2, 32, 6, 6)


def test_groups():
    def grouped(x, k):
        return lax.conv_general_dilated(x, k, (1, 1), "SAME", feature_group_count=16)

    k = jnp.zeros((16, 1, 3, 3))
    assert sites(grouped, X, k, specs=[P("data", "model"), P("model")]) == [(2, 8, 8, 8, 1)]
    assert sites(grouped, X, k, specs=[P("data", "model"), P()]) == [(2, 16, 16, 16, 1)]
    backward = sites(jax.grad(lambda k, x: jnp.tanh(grouped(x, k)).sum()), k, X, specs=[P(), P("data")])
    assert sorted(backward) == [(2, 16, 16, 16, 1), (16, 2, 16, 1, 16)]


def test_gradients():
    def loss(k, x):
        return jnp.tanh(conv(jnp.tanh(conv(x, k)), jnp.swapaxes(k, 0, 1))).mean()

    # Forward and by the input: a share of the images. By the kernel: all features, and a share of what is summed.
    forward, by_input, by_kernel = {(2, 16, 32, 1, 1), (2, 32, 16, 1, 1)}, {(2, 16, 32, 1, 1)}, {(16, 2, 32, 1, 1)}
    found = sites(jax.grad(loss), K, X, specs=[P(), P("data")])
    assert {*found} == forward | by_input | by_kernel | {(32, 2, 16, 1, 1)}
    assert len(found) == 5


@pytest.mark.parametrize(
    "between",
    [
        lambda y: jnp.transpose(y, (0, 2, 3, 1)).transpose(0, 3, 1, 2),
        lambda y: y.reshape(8, 32, 36).reshape(y.shape),
        lambda y: y.reshape(8, 32 * 36).reshape(y.shape),
        lambda y: y.reshape(8 * 32, 36).reshape(y.shape),
        lambda y: (y - y.mean((0, 2, 3), keepdims=True)) / y.std(),
        lambda y: lax.reduce_window(y, 0.0, lax.add, (1, 1, 3, 3), (1, 1, 1, 1), "SAME"),
        lambda y: jnp.concatenate([y[:, :16], y[:, 16:]], 1),
        jax.jit(jnp.tanh),
        jax.checkpoint(jax.nn.relu),
        lambda y: lax.scan(lambda c, _: (jnp.tanh(c), None), y, None, length=3)[0],
        lambda y: lax.scan(lambda c, z: (c, z + 1), 0.0, jnp.moveaxis(y, 1, 0))[1].swapaxes(0, 1),
        lambda y: lax.cond(True, jnp.tanh, jnp.sin, y),
        lambda y: lax.fori_loop(0, 3, lambda i, y: y + 1, y),
        lambda y: lax.with_sharding_constraint(y, NamedSharding(MESH, P("data"))),
        lambda y: lax.with_sharding_constraint(y, NamedSharding(MESH, P(P.UNCONSTRAINED, "model"))) * 2.0,
    ],
)
def test_between_convolutions(between):
    last = jnp.zeros((4, 32, 1, 1))
    found = sites(lambda x, k: conv(between(conv(x, k)), last), X, K, specs=[P("data"), P()])
    assert found == [(2, 16, 32, 1, 1), (2, 32, 4, 1, 1)]


@pytest.mark.parametrize(
    ("between", "batch"),
    [
        (lambda y: lax.with_sharding_constraint(y, NamedSharding(MESH, P())), 8),
        (lambda y: lax.with_sharding_constraint(y, NamedSharding(MESH, P("model"))), 4),
        (lambda y: y[jnp.array([0, 0, 1, 1])], 4),  # no rule: whole
        (lambda y: y[:2], 2),  # no even pieces
        (lambda y: jnp.sort(y, axis=0), 8),
    ],
)
def test_what_changes_pieces(between, batch):
    found = sites(lambda x, k: conv(between(conv(x, k)), K[:, :1].swapaxes(0, 1)), X, K, specs=[P("data"), P()])
    assert found == [(2, 16, 32, 1, 1), (batch, 32, 1, 1, 1)]


def test_loops_over_a_divided_axis():
    def each(x, k):
        return lax.scan(lambda _, image: (None, conv(image[None], k)), None, x)[1]

    assert sites(each, X, K, specs=[P("data"), P()]) == [(1, 16, 32, 1, 1)]


def test_inside_shard_map():
    def f(x, k):
        def each(x, k):
            return conv(x, k)

        y = jax.shard_map(each, mesh=MESH, in_specs=(P("data"), P()), out_specs=P("data"), axis_names={"data"})(x, k)
        return conv(y, jnp.zeros((4, 32, 1, 1)))

    expected = [(2, 16, 32, 1, 1), (2, 32, 4, 1, 1)]
    assert sites(f, X, K, specs=[None, None]) == expected
    assert sites(f, X, K, specs=[P("data"), P()]) == expected
    assert sites(f, X, K, specs=[P("data"), P("model")]) == [(2, 16, 16, 1, 1), (2, 32, 4, 1, 1)]


def test_candidates_are_of_the_piece_and_of_the_whole():
    """A piece of one image may be computed as the whole cannot, and the other way round."""
    asked = []

    def ways(conv, written):
        asked.append(conv.batch)
        return [written, *(Candidate(name, written.dims) for name in ("dot", "shifted", "rows"))]

    jaxpr, divided = traced(lambda x, k: conv(x, k), X, jnp.zeros((4, 16, 1, 1)), specs=[P("data"), P()])
    (site,) = build_graph(jaxpr, ways, divided=divided).sites
    assert asked == [2]
    assert [mode.candidate.lowering for mode in site.modes if mode.candidate] == ["xla", "dot"]


def test_forms_that_xla_gets_wrong_in_pieces_are_no_candidates():
    """Those whose out is laid out otherwise than lhs, unless they are products and no convolution of XLA's; where
    positions are divided, all but the one written."""

    def ways(conv, written):
        dims = [ConvDimensionNumbers.parse(text) for text in ("NCHW,OIHW->NHWC", "NHWC,OIHW->NHWC")]
        return [written, *(Candidate(name, each) for each in dims for name in ("xla", "dot"))]

    for spec, forms in ((P("data"), 3), (P(None, None, "data"), 0), (P(), 4)):
        jaxpr, divided = traced(conv, X, jnp.zeros((4, 16, 1, 1)), specs=[spec, P()])
        (site,) = build_graph(jaxpr, ways, divided=divided).sites
        assert len(site.modes) == 1 + forms
    lhs, rhs = jnp.zeros((2, 4, 6, 6, 6)), jnp.zeros((4, 4, 5, 5, 5))
    (volume,) = jax.make_jaxpr(lambda x, k: lax.conv_general_dilated(x, k, (1, 1, 1), "VALID"))(lhs, rhs).eqns
    gradient = ConvSignature.of(lhs, rhs, volume.params)
    for dims in (ConvDimensionNumbers.channels_last(3), ConvDimensionNumbers.kernel_gradient(3)):
        right = [name for name in ("xla", "planes/xla", "im2col") if lowering_named(name).divisible(gradient, dims)]
        assert right == (["xla", "planes/xla", "im2col"] if dims.lhs == dims.out else ["im2col"])


def test_grouped_products_of_matrices_are_nowhere_made_of_divided_convolutions():
    """XLA's partitioner ends the process over them, or gives wrong numbers, where features are divided."""

    def right(shape, kernel, **params):
        lhs, rhs, rank = jnp.zeros(shape), jnp.zeros(kernel), len(shape) - 2
        fun = lambda x, k: lax.conv_general_dilated(x, k, (1,) * rank, [(0, 0)] * rank, **params)  # noqa: E731
        (eqn,) = jax.make_jaxpr(fun)(lhs, rhs).eqns
        full = ConvSignature.of(lhs, rhs, eqn.params)
        last = ConvDimensionNumbers.channels_last(rank)
        names = "xla", "phases/xla", "phases/groups/dot", "shifted", *(("planes/xla",) if rank == 3 else ())
        return {name for name in names if lowering_named(name).divisible(full, last)}

    ours = {"phases/groups/dot", "shifted"}
    assert right((2, 4, 6, 6), (8, 2, 1, 1), feature_group_count=2) & {"xla", *ours} == ours
    assert right((2, 4, 3, 6), (8, 2, 3, 1), feature_group_count=2) & {"xla", "shifted"} == {"shifted"}
    assert right((2, 4, 6, 6), (8, 4, 1, 1), batch_group_count=2) & {"xla"} == set()
    assert right((2, 4, 6, 6), (8, 2, 3, 3), feature_group_count=2) >= {"xla", *ours}
    assert right((2, 4, 6, 6), (8, 4, 1, 1)) >= {"xla", *ours}
    dilated = right((2, 4, 6, 6), (8, 2, 1, 1), feature_group_count=2, lhs_dilation=(2, 2))
    assert dilated >= ours and "phases/xla" not in dilated
    assert "phases/xla" in right((2, 4, 6, 6), (8, 2, 4, 4), feature_group_count=2, lhs_dilation=(2, 2))
    assert "planes/xla" not in right((2, 4, 6, 6, 6), (8, 2, 3, 1, 1), feature_group_count=2)
    assert right((2, 4, 6, 6, 6), (8, 2, 3, 3, 3), feature_group_count=2) >= {"xla", "planes/xla", *ours}


def test_other_equations_and_conversions():
    def f(x, w):
        return jnp.einsum("nchw,co->nohw", x, w)

    def shapes(*specs):
        nodes = graph_of(f, jnp.zeros((64, 16, 6, 6)), jnp.zeros((16, 32)), specs=specs).nodes
        (work,) = (node.work for node in nodes if node.name == "dot_general" and node.work)
        return {value.shape for value in work.operands}

    assert shapes(P("data"), P()) == {(16, 16, 6, 6), (16, 32)}
    # What is summed is divided on one side alone: nobody can say what a device has of it.
    assert shapes(P(), P("model")) == {(64, 16, 6, 6), (16, 32)}


def test_keys():
    def key(*specs):
        jaxpr, divided = traced(conv, X, K, specs=specs)
        return program_key(jaxpr, (), divided)

    assert key(None, None) == key(P(), P()) == program_key(jax.make_jaxpr(conv)(X, K))
    keys = [key(None, None), key(P("data"), P()), key(P("model"), P()), key(P("data"), P("model"))]
    assert len({k.function for k in keys}) == len({k.skeleton for k in keys}) == len(keys)


def test_on_devices():
    """In a process that has four devices (see the script)."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    done = python("-m", "tests.on_devices", XLA_FLAGS=flags, timeout=420)
    assert "tuning failed" not in done.stderr, done.stderr
