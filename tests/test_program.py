"""The key under which a plan is stored: the same for the same program in every process, another for another."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import python
from jax import lax

from jaxlayout.graph.program import count_transposes, has_effects, needs_real_arguments, program_key, runs_host_code

X = jax.ShapeDtypeStruct((4, 4), jnp.float32)


def key(fun, *args):
    return program_key(jax.make_jaxpr(fun)(*(args or (X,))))


def test_the_same_in_every_process():
    script = """
import jax, jax.numpy as jnp
from jax import lax
from jaxlayout.graph.program import program_key

@jax.custom_vjp
def double(x): return x * 2
double.defvjp(lambda x: (x * 2, None), lambda r, g: (g * 2,))

@jax.custom_jvp
def triple(x): return x * 3
triple.defjvp(lambda p, t: (p[0] * 3, t[0] * 3))

mesh = jax.make_mesh((1, 1, 1), ("d", "e", "f"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
spec = jax.sharding.PartitionSpec(("d", "e"), "f")
policy = jax.checkpoint_policies.save_only_these_names("a", "b", "c")

def f(x):
    x = jax.shard_map(lambda x: lax.psum(x, ("d", "e", "f")), mesh=mesh, in_specs=spec,
                      out_specs=jax.sharding.PartitionSpec())(x)
    x = lax.scan(lambda c, y: (c + y, jnp.sort(c)), x[0], double(triple(x)))[1]
    x = lax.while_loop(lambda c: c.sum() < 3, lambda c: c + 1, x) + jnp.arange(4.0)
    x = lax.cond(x.sum() > 0, jnp.sin, lambda x: x[jnp.array([0, 1, 0, 1])], x)
    jax.debug.print("{}", x)
    x = jax.checkpoint(lambda x: jnp.sin(jnp.sin(x)), policy=policy)(x) + jax.random.normal(jax.random.key(0), (4, 4))
    x = jax.pure_callback(lambda x: x, x, jnp.linalg.solve(x, x))
    return jax.nn.gelu(lax.with_sharding_constraint(x, jax.sharding.NamedSharding(mesh, spec)))

print(program_key(jax.make_jaxpr(f)(jnp.ones((4, 4)))))
"""

    def run(seed: str) -> str:
        return python("-c", "\n" * int(seed) + script, PYTHONHASHSEED=seed).stdout

    first = run("1")
    assert "function=" in first and first == run("2")


def test_names_and_lines_do_not_matter():
    def one(x):
        return jnp.sin(x) @ x

    def two(
        y,
    ):
        z = jnp.sin(y)
        return z @ y

    assert key(one) == key(two)
    assert key(one, jnp.ones((4, 4))) == key(one)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (lambda x: jnp.sin(x), lambda x: jnp.cos(x)),
        (lambda x: x.sum(0), lambda x: x.sum(1)),
        (lambda x: x + 1.0, lambda x: x + 2.0),
        (lambda x: x + np.arange(4.0, dtype="f"), lambda x: x + np.arange(4.0, dtype="f").reshape(4, 1)),
        (lambda x: x[:2], lambda x: x[1:3]),
        (lambda x: (x, x + 1), lambda x: (x + 1, x)),
        (lambda x: x + x.T, lambda x: x.T + x),
        (lambda x: lax.scan(lambda c, y: (c, y + 1.0), 0, x), lambda x: lax.scan(lambda c, y: (c, y - 1.0), 0, x)),
        (lambda x: lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x), lambda x: lax.cond(x.sum() > 0, jnp.cos, jnp.sin, x)),
        (jax.jit(lambda x: x * 3.0), jax.jit(lambda x: x * 4.0)),
        (lambda x: x @ x, lambda x: lax.dot(x, x, precision="highest")),
        (lambda x: lax.convert_element_type(x, jnp.int32), lambda x: lax.convert_element_type(x, jnp.int8)),
    ],
)
def test_other_programs_have_other_keys(one, two):
    assert key(one).function != key(two).function


def test_sizes_are_apart():
    def f(x, n):
        return jnp.tanh(x @ x.T) * n

    small, large = (key(f, jax.ShapeDtypeStruct((n, 3), jnp.float32), 2.0) for n in (4, 5))
    assert small.skeleton == large.skeleton and small.function != large.function
    assert (small.sizes, large.sizes) == ((4, 3), (5, 3))
    assert key(f, jax.ShapeDtypeStruct((4, 3), jnp.bfloat16), 2.0).function != small.function


def test_a_convolution_keeps_its_kernel_and_features():
    def conv(groups=1, **params):
        def f(x, w):
            return lax.conv_general_dilated(x, w, (1, 1), "SAME", feature_group_count=groups, **params)

        return lambda n, size, k: key(f, *map(jnp.zeros, ((n, 8, size, size), (8, 8 // groups, k, k)))).skeleton

    assert conv()(2, 9, 3) == conv()(4, 12, 3)
    others = conv()(2, 9, 1), conv(groups=8)(2, 9, 3), conv(rhs_dilation=(2, 2))(2, 9, 3)
    assert len({conv()(2, 9, 3), *others}) == 4


def test_types_matter():
    assert key(lambda x: x + x, 1.0).function != key(lambda x: x + x, np.float32(1.0)).function  # weak, strong
    assert key(lambda x: x, jax.random.key(0)).function != key(lambda x: x, jax.random.key(0, impl="rbg")).function


def test_what_must_not_be_run():
    def says(predicate, fun):
        return predicate(jax.make_jaxpr(fun)(X))

    loop = partial(lax.while_loop, lambda c: c.sum() < 3, lambda c: c + 1)
    callback = partial(jax.pure_callback, lambda x: x, X)
    assert says(has_effects, lambda x: jax.debug.print("{}", x))
    assert says(has_effects, jax.jit(lambda x: jax.debug.print("{}", x)))
    assert says(has_effects, lambda x: jax.experimental.io_callback(lambda x: x, X, x))
    assert not says(has_effects, callback) and not says(has_effects, loop)
    assert has_effects(jax.make_jaxpr(lambda r, x: x)(jax.new_ref(jnp.ones(3)), X))
    for nested in (
        lambda f: f,
        jax.jit,
        jax.checkpoint,
        lambda f: lambda x: lax.scan(lambda c, _: (f(c), 0), x, None, 2),
    ):
        assert says(needs_real_arguments, nested(loop))
        assert says(runs_host_code, nested(callback))
        assert not says(needs_real_arguments, nested(jnp.sin)) and not says(runs_host_code, nested(loop))


def test_transposes_that_move_data():
    def f(x, unit):
        inner = jax.jit(lambda x: x.T)
        return x.T, inner(x), unit.T, lax.transpose(x, (0, 1))

    assert count_transposes(jax.make_jaxpr(f)(X, jax.ShapeDtypeStruct((1, 4), jnp.float32))) == 2
