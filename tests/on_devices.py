"""Run by test_shards in a process of its own: networks on arrays that four devices share."""

from __future__ import annotations

import re
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlayout import auto_layout
from jaxlayout.convs.primitive import tuned_conv
from jaxlayout.graph import build
from jaxlayout.layout import ConvDimensionNumbers
from jaxlayout.tuning import pipeline, stores
from jaxlayout.verify.accept import collectives, more_collectives
from tests.made_up import made_up

KEYS: set[str] = set()
FAVOURITES: tuple[str, ...] = ("xla",)
NCHW = ConvDimensionNumbers.parse("NCHW,OIHW->NCHW")


def measure(jobs, **_):
    """Costs under which all convolutions change, to the first favourite that there is."""
    jobs = list(jobs)
    KEYS.update(job.key for job in jobs)

    def ns(name, _):
        way = re.sub(r"@\d+", "", name.partition(":")[0])
        return 1e3 * (1 + FAVOURITES.index(way)) if way in FAVOURITES else 1e5

    yield from made_up(ns)(jobs)


# Not those of `helpers`, which has arrays on a device as soon as it is imported: that is too early for `two_processes`.


def conv(x, k, stride=1, groups=1):
    steps = (stride,) * (x.ndim - 2)
    return lax.conv_general_dilated(x, k, steps, "SAME", feature_group_count=groups)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype("f")


def net(params, x):
    x = jax.nn.relu(conv(x, params["stem"], 2))
    x = jax.nn.silu(conv(x, params["depthwise"], groups=8))
    mean, spread = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
    x = (x - mean) * lax.rsqrt(spread + 1e-3) * params["scale"][:, None, None]
    x = x + conv(jax.nn.relu(conv(x, params["one"])), params["back"])
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
    return x.mean((2, 3)) @ params["out"]


def step(params, x, y):
    def loss(params):
        return jnp.mean(jnp.square(net(params, x) - y))

    value, grads = jax.value_and_grad(loss)(params)
    return jax.tree.map(lambda p, g: p - 0.002 * g, params, grads), value


PARAMS = {
    "stem": normal(0, 8, 3, 3, 3) / 5,
    "depthwise": normal(1, 8, 1, 3, 3) / 3,
    "scale": normal(2, 8),
    "one": normal(3, 16, 8, 1, 1) / 3,
    "back": normal(4, 8, 16, 3, 3) / 12,
    "out": normal(5, 8, 4),
}
X, Y = normal(6, 16, 3, 16, 16), normal(7, 16, 4)
OPTIONS = {"verdict": False, "memory_limit": 1000.0, "numerics": "relaxed"}


def close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


def sizes():
    """The batches of all convolutions that were measured."""
    return {int(key[4:].split("x")[0]) for key in KEYS if key.startswith("lhs=")}


def check(fun, args, favourites):
    """A function on divided arrays: measured by the piece, right in its numbers, and with no collective more."""
    global FAVOURITES
    FAVOURITES = favourites
    KEYS.clear()
    with tempfile.TemporaryDirectory() as folder:
        tuned = auto_layout(fun, table=f"{folder}/table.sqlite", **OPTIONS)
        outcome = tuned.outcome(*args)
        assert outcome.kept, (favourites, outcome.verdict)
        chosen = {m.candidate.lowering for m in outcome.plan.choices.values() if m.candidate is not None}
        assert {name for name in favourites if fun is net or "/" not in name} <= chosen, (favourites, chosen)
        close(tuned(*args), jax.jit(fun)(*jax.device_get(args)))
        before, after = jax.jit(fun).lower(*args).compile(), tuned.lower(*args).compile()
        close(tuned(*args), before(*args))
        assert not more_collectives(before, after), (favourites, more_collectives(before, after))
        tuned.explain(*args)
    return collectives(before), collectives(after)


def check_all():
    first = ("space_to_depth/xla", "shifted", "dot", "tap_dots")
    second = ("space_to_depth/im2col", "winograd2", "xla")
    for favourites in (first, second):
        check(net, HERE[:2], favourites)
        assert sizes() == {4}, KEYS
    for favourites in (first, ("winograd2", "im2col", "xla")):
        before, _ = check(step, HERE, favourites)
        assert before["all-reduce"][0] and before["all-reduce"][1] >= sum(32 * p.size for p in PARAMS.values())
        assert not any(re.match(r"lhs=16x\d+\[\d+, \d+\]float32 rhs=\d+\[[13], ", key) for key in KEYS), KEYS
        assert not any(re.match(r"lhs=\d+x16\[\d+, \d+\]float32 rhs=\d+\[(8|16), ", key) for key in KEYS), KEYS


def check_placements():
    """A function goes by where its arguments are, whoever said so."""
    small = {"table": ":memory:", **OPTIONS}
    told = auto_layout(net, in_shardings=(ALL, ROWS), **small)
    for tuned, args in (
        (told, (PARAMS, X)),
        (auto_layout(jax.jit(net, in_shardings=(None, ROWS), out_shardings=ALL), **small), (PARAMS, X)),
        (auto_layout(net, **small), (HERE[0], jax.ShapeDtypeStruct(X.shape, X.dtype, sharding=ROWS))),
    ):
        KEYS.clear()
        stores.process_stores.tables.clear()
        assert tuned.outcome(*args).kept
        assert sizes() == {4}, KEYS
    # The same function on one device, and divided: two programs, two plans.
    stores.process_stores.tables.clear()
    KEYS.clear()
    tuned = auto_layout(net, **small)
    for args in ((PARAMS, X), HERE[:2]):
        close(tuned(*args), jax.jit(net)(PARAMS, X))
    assert sizes() == {16, 4}, KEYS
    # And divided otherwise on the same mesh, for which JAX does not trace anew.
    stores.process_stores.tables.clear()
    KEYS.clear()
    close(tuned(HERE[0], jax.device_put(X, ALL)), jax.jit(net)(PARAMS, X))
    assert sizes() == {16}, KEYS


def check_explicit():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    x = jax.device_put(X, NamedSharding(mesh, P("data")))
    k = jax.device_put(PARAMS["stem"], NamedSharding(mesh, P()))
    check(lambda x, k: jax.nn.relu(conv(x, k, 2)), (x, k), ("xla",))
    assert sizes() == {4}, KEYS


def check_forms():
    """XLA computes no convolution in a form in which it gets divided ones wrong, whoever asks for it."""

    def told(x, k, dims, lowering, dilation, groups):
        numbers = ConvDimensionNumbers.parse(dims)
        params = {
            "window_strides": (1, 1), "padding": ((1, 1), (1, 1)), "lhs_dilation": (dilation,) * 2,
            "rhs_dilation": (1, 1), "feature_group_count": groups, "batch_group_count": 1,
            "dimension_numbers": numbers.to_lax(), "precision": None, "preferred_element_type": None,
            "out_sharding": None,
        }  # fmt: skip
        images, kernel = numbers.lhs.permutation_from(NCHW.lhs), numbers.rhs.permutation_from(NCHW.rhs)
        out = tuned_conv(jnp.transpose(x, images), jnp.transpose(k, kernel), lowering=lowering, **params)
        return jnp.transpose(out, NCHW.out.permutation_from(numbers.out))

    whole = normal(8, 4, 8, 6, 8), normal(9, 16, 8, 4, 4)
    features, positions = NamedSharding(mesh, P(None, "data")), NamedSharding(mesh, P(None, None, None, "data"))
    cases = [(1, 2, features, features), (1, 8, features, ALL), (1, 8, ALL, ROWS), (2, 1, positions, ALL)]
    for dilation, groups, *places in cases:
        x, k = whole[0], whole[1][:, : 8 // groups]
        divided = [jax.device_put(a, place) for a, place in zip((x, k), places, strict=True)]
        expected = jax.jit(told, static_argnums=(2, 3, 4, 5))(x, k, str(NCHW), "xla", dilation, groups)
        for dims in ("CHWN,IHWO->HWNC", "NCHW,OIHW->NHWC"):
            for name in ("xla", "phases/xla") if dilation > 1 else ("xla",):
                found = jax.jit(told, static_argnums=(2, 3, 4, 5))(*divided, dims, name, dilation, groups)
                np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)

    def each(k, x):
        return jax.grad(lambda k: jnp.square(conv(x[None], k)).sum())(k)

    gradients, last = jax.vmap(each, (None, 0)), {"policy": "channels_last"}
    stem, rows = HERE[0]["stem"], HERE[1]
    expected = jax.jit(gradients)(PARAMS["stem"], X)
    close(auto_layout(gradients, **last)(stem, rows), expected)
    close(jax.jit(auto_layout(gradients, **last))(stem, rows), expected)
    close(jax.vmap(auto_layout(each, **last), (None, 0))(stem, rows), expected)
    inner = auto_layout(lambda x, k: conv(x, k), **last)
    loss = jax.vmap(jax.grad(lambda k, x: jnp.square(inner(x[None], k)).sum()), (None, 0))
    close(jax.jit(loss)(stem, rows), expected)


def check_unseen():
    """What stands in a program of the user's has been seen on whole arrays only: on divided ones it is XLA's own."""
    global FAVOURITES
    FAVOURITES = ("phases/groups/xla", "phases/xla")
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x, k = normal(13, 5, 4, 4, 4), normal(14, 5, 4, 2, 3)

    def plain(x, k):
        numbers, pads = ("NHWC", "OIHW", "NHWC"), [(0, 0), (1, 2)]
        return lax.conv_general_dilated(x, k, (1, 2), pads, (2, 2), (2, 1), numbers)

    def both(fun):
        return jax.jit(lambda x, k: jax.vmap(fun)(jnp.stack([x, 2 * x]), jnp.stack([k, k])))

    tuned, expected = auto_layout(plain, table=":memory:", **OPTIONS), both(plain)(x, k)
    x, k = (jax.device_put(a, NamedSharding(mesh, P(*s))) for a, s in ((x, (None, "model")), (k, (None, None, "data"))))
    close(both(plain)(x, k), expected)
    close(both(tuned)(x, k), expected)  # its batched convolution was wrong by `phases/groups/xla`


def check_products():
    """`phases/xla` would make a grouped product of matrices of this, over which XLA ends the process."""
    global FAVOURITES
    FAVOURITES = ("phases/xla",)

    def transposed(x, k):
        return lax.conv_general_dilated(x, k, (1, 2), [(0, 1)] * 2, (2, 2), None, ("NHWC", "HWIO", "NHWC"), 2)

    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x, k = normal(15, 4, 5, 4, 2), normal(16, 1, 1, 1, 4)
    divided = [jax.device_put(a, NamedSharding(mesh, P(None, None, None, "data"))) for a in (x, k)]
    close(auto_layout(transposed, table=":memory:", **OPTIONS)(*divided), jax.jit(transposed)(x, k))


def check_types():
    """Where types say how arrays are divided, what is derived keeps to it, whatever it is computed by."""
    global FAVOURITES
    FAVOURITES = ("dot", "im2col", "shifted")
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
        for name in ("one", "back", "depthwise"):
            k, groups = PARAMS[name], 8 if name == "depthwise" else 1
            shape = (16, k.shape[1] * groups, 6, 6)

            def plain(x, k, groups=groups):
                return conv(x, k, groups=groups)

            def loss(fun):
                return lambda *args: jnp.square(jnp.tanh(fun(*args))).sum()

            tuned = auto_layout(plain, table=f"{folder}/{name}.sqlite", **OPTIONS)
            x, k = jax.device_put(normal(10, *shape), P("data")), jax.device_put(k, P())
            expected = jax.jit(jax.grad(loss(plain), (0, 1)))(x, k)
            found = jax.jit(jax.grad(loss(tuned), (0, 1)))(x, k)
            close(found, expected)
            assert [a.sharding for a in found] == [a.sharding for a in expected]

        def placed(x, k):
            y = lax.conv_general_dilated(x, k, (1, 1), "SAME", out_sharding=P("data"))
            return jnp.tanh(conv(y, k.swapaxes(0, 1)))

        x, k = jax.device_put(normal(11, 16, 8, 6, 6), P(None, "model")), jax.device_put(PARAMS["one"], P())
        for inside in (placed, jax.grad(lambda x, k: placed(x, k).sum(), (0, 1))):
            close(jax.jit(auto_layout(inside, policy="channels_last"))(x, k), jax.jit(inside)(x, k))


def check_the_guard():
    """A rewritten program that gathers what the original does not is refused."""
    plain = jax.jit(jnp.tanh).lower(HERE[1]).compile()
    gathered = jax.jit(lambda x: lax.with_sharding_constraint(jnp.tanh(x), ALL)).lower(HERE[1]).compile()
    assert not collectives(plain) and not more_collectives(plain, plain) and not more_collectives(gathered, plain)
    assert collectives(gathered) == {"all-gather": (1, X.size * 32)}
    assert "all-gather" in more_collectives(plain, gathered)
    less = jax.jit(lambda x: lax.with_sharding_constraint(jnp.tanh(x[..., :1]), ALL)).lower(HERE[1]).compile()
    assert collectives(less) == {"all-gather": (1, X[..., :1].size * 32)}
    assert "all-gather" in more_collectives(less, gathered) and not more_collectives(gathered, less)

    def gradient(k, x):
        return jax.grad(lambda k: jnp.tanh(conv(x, k, groups=8)).sum())(k)

    args = HERE[0]["depthwise"], jax.device_put(normal(8, 16, 8, 16, 16), ROWS)
    global FAVOURITES
    FAVOURITES = ("rows",)
    offered = build.batch_sequential
    try:
        for hides, cause in ((lambda name: False, "collectives"), (offered, "untried")):
            build.batch_sequential = hides
            stores.process_stores.tables.clear()
            verdict = auto_layout(gradient, table=":memory:", **OPTIONS).outcome(*args).verdict
            assert verdict.cause == cause, verdict
            assert verdict.kept == (cause == "untried"), verdict
    finally:
        build.batch_sequential = offered


if __name__ == "__main__":
    assert jax.device_count() == 4
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    ROWS, ALL = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    HERE = jax.device_put(PARAMS, ALL), jax.device_put(X, ROWS), jax.device_put(Y, ROWS)
    pipeline.measure = measure
    check_forms()
    check_the_guard()
    check_explicit()
    check_products()
    check_unseen()
    check_types()
    check_placements()
    check_all()
