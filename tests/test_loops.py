"""Equations with bodies: loops, branches, checkpoint and shard_map are entered, and keep what they mean."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FIRST, conv
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import io_callback
from jax.experimental.ode import odeint
from jax.extend.core import Primitive
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from rewriting import MIXED, plan_in, retraced, single, trace, transposes, whole_numbers

from jaxlayout.convs.candidates import Candidate
from jaxlayout.convs.primitive import CONVOLUTIONS, tuned_conv_p
from jaxlayout.graph.build import build_graph
from jaxlayout.graph.plan import Plan
from jaxlayout.graph.program import equations
from jaxlayout.graph.rules.loops import WHILE_TRIPS
from jaxlayout.graph.validate import check_plan
from jaxlayout.layout import ConvDimensionNumbers
from jaxlayout.rewrite.retrace import retrace

X, K = whole_numbers((2, 3, 4, 4), (3, 3, 3, 3))


def the_body(jaxpr: Any, name: str) -> Any:
    """The equations inside the one equation of a primitive."""
    (eqn,) = [eqn for eqn in equations(jaxpr) if eqn.primitive.name == name]
    params = {"scan": "jaxpr", "while": "body_jaxpr", "checkpoint": "jaxpr", "shard_map": "jaxpr"}
    return eqn.params[params[name]]


def count(jaxpr: Any) -> int:
    return len(transposes(jaxpr))


def wrapped(x: Any) -> Any:
    """Small enough to stay exact, however often."""
    return jnp.mod(x, 5) - 2


def scanned(x: Any, k: Any) -> Any:
    def step(carry: Any, _: Any) -> Any:
        return wrapped(conv(carry, k, FIRST)), carry

    return lax.scan(step, x, None, length=4)


def looped(x: Any, k: Any) -> Any:
    def step(carry: Any) -> Any:
        n, x = carry
        return n + 1, wrapped(conv(x, k, FIRST))

    return lax.while_loop(lambda carry: (carry[0] < 3) & (carry[1][0, 0, 0, 0] < 100), step, (0, x))


def unstacked(xs: Any, k: Any) -> Any:
    return lax.scan(lambda n, x: (n + 1, wrapped(conv(x, k, FIRST))), 0, xs, reverse=True)


def branched(x: Any, k: Any) -> Any:
    def one(x: Any) -> Any:
        return conv(x, k, FIRST)

    return lax.switch(x[0, 0, 0, 0].astype(int), [one, lambda x: -x, lambda x: one(one(x))], x)


def swapped(x: Any, k: Any) -> Any:
    """Every round each array takes the other's place."""
    return lax.fori_loop(0, 3, lambda i, pair: (wrapped(conv(pair[1], k, FIRST)), pair[0]), (x, x + 1))


def checkpointed(x: Any, k: Any) -> Any:
    return jax.checkpoint(lambda x: jnp.sin(conv(x, k, FIRST)))(x)


def counted(trips: Any, x: Any, k: Any) -> Any:
    return lax.fori_loop(0, trips, lambda i, x: wrapped(conv(x, k, FIRST)), x)


def many(trips: Any, xs: Any, k: Any) -> Any:
    """Each with a number of rounds of its own: the loop's condition has an axis."""
    return jax.vmap(counted, (0, 0, None))(trips, xs, k)


def many_of_many(trips: Any, xs: Any, k: Any) -> Any:
    return jax.vmap(jax.vmap(counted, (0, 0, None)), (0, 1, None))(trips, xs, k)


elsewhere_p = Primitive("elsewhere")  # cannot be lowered here
elsewhere_p.def_abstract_eval(lambda x: x)


def by_platform(x: Any, k: Any) -> Any:
    def here(x: Any) -> Any:
        return wrapped(conv(x, k, FIRST))

    return lax.platform_dependent(conv(x, k, FIRST), cpu=here, cuda=here, tpu=lambda x: elsewhere_p.bind(here(x)))


PROGRAMS = {
    "scan": (scanned, (X, K)),
    "while": (looped, (X, K)),
    "xs": (unstacked, (jnp.stack([X, 2 * X, X]), K)),
    "switch": (branched, (X, K)),
    "swap": (swapped, (X, K)),
    "checkpoint": (checkpointed, (X, K)),
    "many": (many, (np.array([2, 0, 3]), jnp.stack([X, 2 * X, -X]), K)),
    "many of many": (many_of_many, (np.array([[2, 0], [1, 3]]), np.stack([[X, -X], [2 * X, X]]), K)),
    "platform": (by_platform, (X, K)),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_they_are_entered_and_give_the_same(name):
    fun, args = PROGRAMS[name]
    jaxpr = trace(fun, *args)
    plan = plan_in(jaxpr, MIXED)
    sites = [eqn for eqn in equations(retraced(jaxpr, plan)) if eqn.primitive in CONVOLUTIONS]
    assert sites and all(eqn.primitive is tuned_conv_p for eqn in sites)
    found, wanted = (jax.tree.leaves(jax.jit(f)(*args)) for f in (retrace(jaxpr, plan), fun))
    for a, b in zip(found, wanted, strict=True):
        assert (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, b.weak_type)
        np.testing.assert_array_equal(a, b)
    check_plan(jaxpr, dataclasses.replace(plan, choices={p: m for p, m in plan.choices.items() if not m.candidate}))
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(("name", "primitive"), [("while", "while"), ("swap", "scan")])
def test_what_is_carried_keeps_its_order(name, primitive):
    fun, args = PROGRAMS[name]
    jaxpr = trace(fun, *args)
    new = retraced(jaxpr, plan_in(jaxpr, MIXED))
    assert count(new) and not count(the_body(new, primitive))


def test_what_many_loops_carry_keeps_their_axes_first():
    """XLA has one loop for all, which chooses among them by the condition's axes, the first of what is carried."""
    jaxpr = trace(*PROGRAMS["many"][:1], *PROGRAMS["many"][1])
    graph = build_graph(jaxpr, lambda conv, written: [written, Candidate("xla", ConvDimensionNumbers.parse(MIXED))])
    ports = [node for node in graph.nodes if node.kind == "port" and node.port and node.port.fixed]
    assert ports and all(order[:1] == (0,) for node in ports for mode in node.modes for order in mode.operands if order)
    assert any(len(node.modes) > 1 for node in ports)


def test_many_differential_equations():
    """An adaptive solver steps through each at a pace of its own."""

    def solved(x: Any, ends: Any, k: Any) -> Any:
        def slope(x: Any, t: Any) -> Any:
            return jnp.tanh(conv(x, k, FIRST))

        return jax.vmap(lambda x, end: odeint(slope, x, jnp.array([0.0, end])))(x, ends)

    args = jnp.stack([X, -2 * X]), np.array([0.5, 2], np.float32), K / 9
    jaxpr = trace(solved, *args)
    plan = plan_in(jaxpr, MIXED)
    assert any(site.primitive is tuned_conv_p for site in equations(retraced(jaxpr, plan)))
    np.testing.assert_allclose(jax.jit(single(jaxpr, plan))(*args), jax.jit(solved)(*args), rtol=1e-4, atol=1e-4)


def test_what_a_loop_does_not_change_is_converted_once():
    """The kernel is a constant of the loop, but the order of what is carried is held by a sort."""

    def fun(x: Any, k: Any) -> Any:
        return lax.fori_loop(0, 3, lambda i, x: wrapped(lax.sort(conv(x, k, FIRST), 3)), x)

    jaxpr = trace(fun, X, K)
    plan = plan_in(jaxpr, "NHWC,HWIO->NHWC")
    new = retraced(jaxpr, plan)
    assert count(the_body(new, "scan")) == 2 and count(new) == 3
    assert sorted(c.times for c in plan.conversions) == [1, 3, 3]
    np.testing.assert_array_equal(jax.jit(single(jaxpr, plan))(X, K), fun(X, K))


def test_costs_count_as_often_as_they_are_paid():
    def fun(x: Any, k: Any) -> Any:
        x = lax.cond(x.sum() > 0, lambda x: conv(x, k, FIRST), lambda x: x, x)
        x = lax.fori_loop(0, 5, lambda i, x: lax.fori_loop(0, 7, lambda j, x: conv(x, k, FIRST), x), x)
        x, _ = lax.while_loop(lambda c: c[1] < 3, lambda c: (conv(c[0], k, FIRST), c[1] + 1), (x, 0))
        return jax.jit(conv, static_argnums=2)(x, k, FIRST)

    graph = build_graph(trace(fun, X, K), lambda conv, written: [written])
    assert [node.times for node in graph.sites] == [0.5, 35, WHILE_TRIPS, 1]
    assert [node.conv.context for node in graph.sites if node.conv] == ["nested"] * 3 + ["entry"]


def test_a_call_inside_a_loop_is_nested():
    def fun(x: Any, k: Any) -> Any:
        return lax.fori_loop(0, 5, lambda i, x: jax.jit(conv, static_argnums=2)(x, k, FIRST), x)

    (site,) = build_graph(trace(fun, X, K), lambda conv, written: [written]).sites
    assert site.conv is not None and site.conv.context == "nested" and site.times == 5


def test_a_plan_whose_orders_cannot_be_is_refused():
    jaxpr = trace(scanned, X, K)
    plan = plan_in(jaxpr, MIXED)
    ((path, mode),) = [(path, mode) for path, mode in plan.choices.items() if not mode.candidate and len(path) == 1]
    written = tuple(tuple(range(len(order))) for order in mode.operands)
    wrong = dataclasses.replace(plan, choices={path: dataclasses.replace(mode, operands=written)})
    with pytest.raises(ValueError, match=r"scan.* cannot have the orders"):
        check_plan(jaxpr, wrong)
    with pytest.raises(ValueError, match=r"scan.* cannot have the orders"):
        retraced(jaxpr, wrong)


def test_gradients_of_checkpoints_keep_their_policy():
    """What may be saved is saved, what has a name too, and nothing is computed more often."""

    def fun(policy: Any) -> Any:
        def loss(x: Any, k: Any) -> Any:
            def block(x: Any) -> Any:
                return jnp.sin(checkpoint_name(conv(x, k, FIRST), "y"))

            return jax.checkpoint(block, policy=policy)(jnp.sin(x)).sum()

        return loss

    def convolutions(fun: Any) -> int:
        return sum(eqn.primitive in CONVOLUTIONS for eqn in equations(jax.make_jaxpr(jax.grad(fun, (0, 1)))(X, K)))

    policies = jax.checkpoint_policies
    recomputed = convolutions(fun(None))
    for policy in (None, policies.dots_saveable, policies.save_only_these_names("y"), policies.everything_saveable):
        loss = fun(policy)
        jaxpr = trace(loss, X, K)
        plan = plan_in(jaxpr, MIXED)
        assert convolutions(single(jaxpr, plan)) == convolutions(loss)
        assert (convolutions(loss) < recomputed) == (policy is not None)
        # A plan for the gradient: the barriers around what is computed again stay.
        gradient = trace(jax.grad(loss, (0, 1)), X, K)
        new = retraced(gradient, plan_in(gradient, MIXED))
        assert [e.params["differentiated"] for e in equations(new) if e.primitive.name == "remat2"] == [
            e.params["differentiated"] for e in equations(gradient) if e.primitive.name == "remat2"
        ]
        found, wanted = (
            jax.jit(retrace(gradient, plan_in(gradient, MIXED)))(X, K),
            jax.jit(jax.grad(loss, (0, 1)))(X, K),
        )
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


def test_effects_in_loops_come_as_often_and_in_order():
    seen: list[Any] = []

    def program(x: Any, k: Any) -> Any:
        def step(i: Any, x: Any) -> Any:
            y = conv(x, k, FIRST)
            io_callback(lambda i, y: seen.append((int(i), y.shape, float(y.sum()))), None, i, y, ordered=True)
            return wrapped(y)

        return lax.fori_loop(0, 3, step, x)

    jaxpr = trace(program, X, K)
    plan = plan_in(jaxpr, MIXED)
    assert not plan.trivial
    seen_by = []
    for fun in (program, single(jaxpr, plan)):
        jax.block_until_ready(jax.jit(fun)(X, K))
        jax.effects_barrier()
        seen_by.append(list(seen))
        seen.clear()
    assert seen_by[0] == seen_by[1] and [entry[:2] for entry in seen_by[0]] == [(i, (2, 3, 4, 4)) for i in range(3)]


def mesh() -> Any:
    return jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))


def test_a_sharding_constraint_follows_the_axes():
    free = P.UNCONSTRAINED

    def fun(x: Any, k: Any) -> Any:
        y = conv(x, k, FIRST)
        y = lax.with_sharding_constraint(y, NamedSharding(mesh(), P("data", free)))
        return conv(y, k, FIRST)

    jaxpr = trace(fun, X, K)
    assert not build_graph(jaxpr, lambda conv, written: [written]).barriers
    plan = plan_in(jaxpr, "CNHW,OIHW->CNHW")
    new = retraced(jaxpr, plan)
    (eqn,) = [eqn for eqn in equations(new) if eqn.primitive.name == "sharding_constraint"]
    assert tuple(eqn.params["sharding"].spec)[:2] == (free, "data") and eqn.params["unconstrained_dims"] == {0}
    np.testing.assert_array_equal(jax.jit(single(jaxpr, plan))(X, K), jax.jit(fun)(X, K))


@pytest.mark.parametrize("check", [True, False])
def test_shard_map_is_entered(check):
    def per_device(x: Any, k: Any) -> Any:
        y = conv(conv(x, k, FIRST), k, FIRST)
        return y, lax.psum(y.sum((0, 2, 3)), "data")

    mapped = jax.shard_map(
        per_device, mesh=mesh(), in_specs=(P("data"), P()), out_specs=(P("data"), P()), check_vma=check
    )
    jaxpr = trace(mapped, X, K)
    plan = plan_in(jaxpr, MIXED)
    new = retraced(jaxpr, plan)
    assert count(new) == len(plan.conversions) == 2
    for a, b in zip(jax.jit(retrace(jaxpr, plan))(X, K), jax.jit(mapped)(X, K), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
        np.testing.assert_array_equal(a, b)
    gradient = trace(jax.grad(lambda x, k: mapped(x, k)[0].sum(), (0, 1)), X, K)
    for a, b in zip(
        jax.jit(retrace(gradient, plan_in(gradient, MIXED)))(X, K),
        jax.jit(jax.grad(lambda x, k: mapped(x, k)[0].sum(), (0, 1)))(X, K),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
