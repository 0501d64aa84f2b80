"""`auto_layout` is `jax.jit` to its users, wherever it is called: under transformations, on meshes, in the caller's
settings and threads, and with side effects.

Values are held against plain JAX, on functions that the made-up costs of `forced` do change: `same` and `is_tuned` say
so.
"""

from __future__ import annotations

import os
import threading
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import PARAMS, K, X, close, conv, is_tuned, net, normal, python, same
from jax import lax

from jaxlayout import auto_layout

pytestmark = pytest.mark.usefixtures("forced")


# Under transformations


def test_under_jit():
    f = auto_layout(net)
    outer = lambda params, x: jnp.sin(f(params, x)) + f(params, x[:1])  # noqa: E731
    close(jax.jit(outer)(PARAMS, X), jax.jit(lambda p, x: jnp.sin(net(p, x)) + net(p, x[:1]))(PARAMS, X))
    assert is_tuned(outer, PARAMS, X)


def test_under_jit_the_cost_is_that_of_a_nested_computation(forced):
    jax.jit(auto_layout(net))(PARAMS, X)
    assert all(key.endswith("in=nested") for key in forced)


DERIVATIVES = {
    "grad": lambda f: jax.grad(lambda p, x: f(p, x).sum(), argnums=(0, 1)),
    "value_and_grad": lambda f: jax.value_and_grad(lambda p, x: (f(p, x).sum(), {"y": f(p, x)}), has_aux=True),
    "jvp": lambda f: lambda p, x: jax.jvp(f, (p, x), (p, x)),
    "vjp": lambda f: lambda p, x: jax.vjp(f, p, x)[1](jnp.ones((2, 4, 6, 5))),
    "linearize": lambda f: lambda p, x: jax.linearize(f, p, x)[1](p, x),
    "jacfwd": lambda f: lambda p, x: jax.jacfwd(lambda b: f(p | {"bias": b}, x))(p["bias"]),
    "jacrev": lambda f: lambda p, x: jax.jacrev(lambda s: f(p, x * s).mean((0, 2, 3)))(2.0),
    "hessian": lambda f: lambda p, x: jax.hessian(lambda b: f(p | {"bias": b}, x).sum())(p["bias"]),
    "grad of grad": lambda f: jax.grad(lambda p, x: sum(map(jnp.sum, jax.tree.leaves(jax.grad(
        lambda p: (f(p, x) ** 2).sum())(p))))),
    "vmap": lambda f: lambda p, x: jax.vmap(f, in_axes=(None, 1), out_axes=2)(p, jnp.stack([x, 2 * x], 1)),
    "vmap of all": lambda f: lambda p, x: jax.vmap(f)(jax.tree.map(lambda a: jnp.stack([a, 2 * a]), p), x[:, None]),
    "vmap of vmap": lambda f: lambda p, x: jax.vmap(jax.vmap(partial(f, p)))(jnp.stack([x[None], 2 * x[None]])),
    "vmap of grad": lambda f: lambda p, x: jax.vmap(jax.grad(lambda p, x: f(p, x[None]).sum()), (None, 0))(p, x),
    "grad of vmap": lambda f: jax.grad(lambda p, x: jax.vmap(lambda x: f(p, x[None]))(x).sum()),
    "checkpoint": lambda f: jax.grad(lambda p, x: jax.checkpoint(f)(p, x).sum()),
    "scan": lambda f: lambda p, x: lax.scan(lambda c, x: (c + 1, f(p, x[None])), 0, x),
    "grad of scan": lambda f: jax.grad(lambda p, x: lax.scan(lambda c, x: (c, f(p, x[None])), 0, x)[1].sum()),
    "while": lambda f: lambda p, x: lax.while_loop(
        lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] + f(p, x).sum()), (0, 0.0)),
    "fori": lambda f: lambda p, x: lax.fori_loop(0, 2, lambda i, y: y + f(p, x), jnp.zeros((2, 4, 6, 5))),
    "cond": lambda f: lambda p, x: lax.cond(x.sum() > 0, f, lambda p, x: f(p, -x), p, x),
    "map": lambda f: lambda p, x: lax.map(lambda x: f(p, x[None]), x),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "jit"),
    [(name, False) for name in DERIVATIVES]
    + [(name, True) for name in ("grad", "hessian", "vmap", "cond", "checkpoint")],
)
def test_under_transformations(name, jit):
    fun = DERIVATIVES[name](auto_layout(net))
    assert is_tuned(fun, PARAMS, X)
    found = (jax.jit(fun) if jit else fun)(PARAMS, X)
    expected = jax.jit(DERIVATIVES[name](net))(PARAMS, X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected)


def test_a_transformed_call_plans_for_the_unbatched_shape(forced):
    jax.vmap(auto_layout(lambda x: conv(x, K)))(jnp.stack([X, X, X]))
    planned = [key for key in forced if key.endswith("in=entry")]
    assert planned and all("lhs=2x3" in key or key.startswith("transpose") for key in planned)


def test_what_is_derived_is_chosen_where_its_shapes_are_seen(forced):
    jax.vmap(auto_layout(lambda x: conv(x, K)))(jnp.stack([X, X, X]))
    assert any("lhs=6x3" in key and key.endswith("in=nested") for key in forced)
    jax.grad(lambda k: auto_layout(lambda x: conv(x, k))(X).sum())(K)
    assert any("lhs=3x2" in key and key.endswith("in=nested") for key in forced)  # the gradient to the kernel


def test_a_training_step():
    def step(net, params, x):
        loss, grads = jax.value_and_grad(lambda p: jnp.mean(net(p, x) ** 2))(params)
        return loss, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    inside, outside = jax.jit(partial(step, auto_layout(net))), auto_layout(partial(step, net))
    expected = jax.jit(partial(step, net))(PARAMS, X)
    close(inside(PARAMS, X), expected)
    close(outside(PARAMS, X), expected)
    assert outside.outcome(PARAMS, X).kept
    assert len(outside.explain(PARAMS, X).sites) == 2  # the convolution and its kernel's gradient


def test_closed_over_tracers():
    def outer(k, s):
        f = auto_layout(lambda x: conv(x, k) * s)
        return f(X)

    close(jax.jit(outer)(K, 2.0), jax.jit(lambda k, s: conv(X, k) * s)(K, 2.0))
    close(jax.grad(lambda k: outer(k, 2.0).sum())(K), jax.grad(lambda k: (conv(X, k) * 2.0).sum())(K))
    close(jax.vmap(lambda s: outer(K, s))(jnp.arange(3.0)), conv(X, K) * jnp.arange(3.0)[:, None, None, None, None])
    close(lax.scan(lambda c, s: (c, outer(K, s)), 0, jnp.arange(2.0))[1][1], conv(X, K))
    assert is_tuned(lambda k: outer(k, 1.0), K)
    assert is_tuned(jax.grad(lambda k: outer(k, 1.0).sum()), K)


def test_inside_itself():
    inner = auto_layout(net)
    outer = auto_layout(lambda p, x: conv(inner(p, x), normal(9, 2, 4, 3, 3)))
    close(outer(PARAMS, X), conv(net(PARAMS, X), normal(9, 2, 4, 3, 3)))
    assert outer.outcome(PARAMS, X).kept


def test_named_axes():
    def f(x):
        return lax.psum(conv(x, K), "i") / lax.axis_size("i")

    found = jax.vmap(auto_layout(f), axis_name="i")(jnp.stack([X, 3 * X]))
    np.testing.assert_allclose(found, jnp.stack([conv(X, K) * 2] * 2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_on_a_mesh(judged, kind):
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType[kind],))
    spec = jax.sharding.PartitionSpec("d")
    f = auto_layout(lambda x: conv(x, K))
    mapped = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec))
    x = jax.device_put(X, jax.sharding.NamedSharding(mesh, spec))
    found = [mapped(x), f(x)]
    with jax.set_mesh(mesh):
        found += [mapped(x), f(x), jax.jit(f)(x)]
        assert is_tuned(mapped, x) and is_tuned(f, x)
        grads = jax.vjp(f, x)[1](f(x))
    for out in found:
        np.testing.assert_allclose(out, conv(X, K), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grads[0], jax.vjp(lambda x: conv(x, K), X)[1](conv(X, K))[0], rtol=1e-4, atol=1e-4)


def test_on_many_devices():
    script = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxlayout import auto_layout
from jaxlayout.api import tuner
from jaxlayout.tuning import pipeline
from tests.helpers import conv
from tests.made_up import made_up

pipeline.measure = made_up(lambda name, _: 1e3 if name.startswith("xla") else 1e4)
devices, real = [], tuner.decide
tuner.decide = lambda request: devices.append(jax.config.jax_default_device) or real(request)

x = np.random.default_rng(0).standard_normal((4, 3, 6, 5)).astype("f")
k = np.random.default_rng(1).standard_normal((4, 3, 3, 3)).astype("f")
expected = jax.jit(conv)(x, k)
options = {"verdict": False, "memory_limit": 1000.0}

def check(f, *args, on=None):
    out = f(*args)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    assert on is None or out.sharding.is_equivalent_to(on, 4), out.sharding
    assert f.outcome(*args).kept, f.outcome(*args).verdict.reason

for kind in ("Auto", "Explicit"):
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType[kind],))
    rows, all_ = NamedSharding(mesh, P("d")), NamedSharding(mesh, P())
    here = jax.device_put(x, rows), jax.device_put(k, all_)
    check(auto_layout(conv, **options), *here, on=rows)
    check(auto_layout(conv, in_shardings=(rows, all_), **options), x, k, on=rows)
    check(auto_layout(jax.jit(conv, in_shardings=(rows, all_), out_shardings=all_), **options), x, k, on=all_)
    with jax.set_mesh(mesh):
        check(auto_layout(conv, **options), *here, on=rows)

f = auto_layout(conv, **options)
for on in jax.devices()[2:]:
    devices.clear()
    check(f, jax.device_put(x, on), k, on=jax.sharding.SingleDeviceSharding(on))
    assert set(devices) == {on}, devices
"""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    done = python("-c", script, XLA_FLAGS=flags)
    assert "tuning failed" not in done.stderr, done.stderr


# In the caller's context


def test_without_jit():
    seen = []

    def f(x):
        seen.append(isinstance(x, jax.core.Tracer))
        return conv(x, K)

    tuned = auto_layout(f)
    with jax.disable_jit():
        close(tuned(X), conv(X, K))
        assert seen == [False]
        assert tuned.outcome(X).kept
    close(tuned(X), conv(X, K))


def test_wide_numbers(forced, judged):
    with jax.enable_x64(True):
        x, k = (jnp.asarray(np.asarray(a, np.float64)) for a in (X, K))
        tuned = same(conv, x, k)
        assert tuned(x, k).dtype == jnp.float64
        exact = tuned(x, k)
    assert any("float64" in key for key in forced)
    close(tuned(X, K), exact.astype(jnp.float32))


def test_precision(forced, judged):
    with jax.default_matmul_precision("highest"):
        same(conv, X, K)
    assert "HIGHEST" in forced[0]


def test_nan_checks(judged):
    tuned = auto_layout(lambda x: jnp.log(conv(x, K)))
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        tuned(X)
    with jax.debug_nans(True), jax.debug_infs(True):
        same(conv, X, K)


@pytest.mark.parametrize(
    "context",
    [
        lambda: jax.checking_leaks(),
        lambda: jax.numpy_dtype_promotion("strict"),
        lambda: jax.numpy_rank_promotion("raise"),
        lambda: jax.transfer_guard("disallow"),
        lambda: jax.default_device(jax.devices()[0]),
        lambda: jax.default_device("cpu"),
        lambda: jax.named_scope("scope"),
        lambda: jax.threefry_partitionable(False),
    ],
)
def test_in_contexts(judged, context):
    ones = jnp.ones((2, 4, 6, 5))
    with context():
        tuned = auto_layout(lambda x, k: conv(x, k))
        found = tuned(X, K)
        assert tuned.outcome(X, K).kept
        grads = jax.vjp(tuned, X, K)[1](ones)
    close(found, conv(X, K))
    close(grads, jax.vjp(conv, X, K)[1](ones))


def test_settings_of_the_whole_process(judged):
    for name, value in (("jax_transfer_guard", "disallow"), ("jax_numpy_rank_promotion", "raise")):
        before = getattr(jax.config, name)
        jax.config.update(name, value)
        try:
            same(conv, X, K)
        finally:
            jax.config.update(name, before)


def test_tuned_once_by_many_threads(forced, judged):
    traced = []

    def f(x):
        traced.append(threading.get_ident())
        return conv(x, K)

    tuned = auto_layout(f)
    calls = [tuned, partial(tuned.lower), jax.jit(tuned), jax.grad(lambda x: tuned(x).sum())] * 3
    found: dict[int, Any] = {}
    barrier = threading.Barrier(len(calls))

    def work(i):
        barrier.wait()
        found[i] = calls[i](X)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == len(calls)
    for i in range(0, len(calls), 4):
        close(found[i], conv(X, K))
    assert len(forced) == len(set(forced))  # no convolution was measured twice
    assert len(traced) <= 8


# Effects


def test_effects_happen_as_often_and_in_order(judged):
    def program(log):
        def f(x):
            y = conv(x, K)
            jax.experimental.io_callback(lambda v: log.append(("a", float(v))), None, y[0, 0, 0, 0], ordered=True)
            jax.debug.callback(lambda v: log.append(("b", float(v))), x[0, 0, 0, 0], ordered=True)
            z = conv(y, normal(9, 2, 4, 3, 3))
            n = jax.experimental.io_callback(
                lambda: log.append(("c", 0.0)) or np.int32(len(log)), jax.ShapeDtypeStruct((), jnp.int32), ordered=True
            )
            return z, n

        return f

    logs: list[list[Any]] = [[], []]
    plain, tuned = jax.jit(program(logs[0])), auto_layout(program(logs[1]))
    for x in (X, X + 1):
        close(tuned(x), plain(x))
    jax.effects_barrier()
    assert [name for name, _ in logs[1]] == [name for name, _ in logs[0]]
    assert [name for name, _ in logs[1] if name != "b"] == ["a", "c"] * 2
    np.testing.assert_allclose([v for _, v in logs[1]], [v for _, v in logs[0]], rtol=1e-5)
    outcome = tuned.outcome(X)
    jax.effects_barrier()
    assert len(logs[1]) == 6
    assert outcome.kept and "side effects" in outcome.verdict.reason


def test_debug_prints_are_logical(judged, capfd):
    tuned = auto_layout(lambda x: (jax.debug.print("{m}", m=x[0, 0, 0]), conv(jnp.sin(x), K))[1])
    tuned(X)
    jax.effects_barrier()
    assert capfd.readouterr().out == f"{X[0, 0, 0]}\n"
    assert tuned.outcome(X).kept


def test_host_code_is_never_run_on_trial(judged):
    seen = []

    def host(x):
        seen.append(np.asarray(x))
        return x

    def f(x):
        return conv(jax.pure_callback(host, jax.ShapeDtypeStruct(x.shape, x.dtype), x), K)

    tuned = auto_layout(f)
    lowered = tuned.lower(X)
    assert seen == []
    assert "calls back" in tuned.outcome(jax.ShapeDtypeStruct(X.shape, X.dtype)).verdict.reason
    close(lowered.compile()(X), conv(X, K))
    tuned(X[:1])
    assert [x.shape for x in seen] == [X.shape, X[:1].shape]


def test_a_loop_that_might_not_end_is_not_run_on_made_up_arguments(judged):
    def f(x, k):  # with anything but a small kernel, for ever
        return lax.while_loop(lambda c: jnp.abs(c).max() > 1e-3, lambda c: 0.1 * conv(c, k), x)

    k = 0.1 * normal(5, 3, 3, 3, 3)
    tuned = auto_layout(lambda x, k: conv(f(x, k), K))
    tuned.lower(X, k)
    close(tuned(X, k), conv(f(X, k), K))
