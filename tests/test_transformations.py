"""Two transformations of JAX in one another around `auto_layout`, and one on either side of it, on drawn programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from builder import Program
from drawing import examples
from hypothesis import assume, given
from hypothesis import strategies as st
from jax import lax
from programs import assert_same, inexact, programs, real_part

from jaxlayout import auto_layout
from jaxlayout.convs.primitive import CONVOLUTIONS, tuned_conv_p
from jaxlayout.graph.program import equations

pytestmark = pytest.mark.usefixtures("forced")

Function = Callable[..., tuple[Any, ...]]


def _ones(avals: Any) -> Any:
    return jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), avals)


def _negated(x: Any) -> Any:
    return ~x if x.dtype == bool else -x


def _twice(args: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(jnp.stack([x, _negated(x)]) for x in args)


def by_grad(f: Function) -> Function:
    return lambda *args: jax.vjp(f, *args)[1](_ones(jax.eval_shape(f, *args)))


def by_jvp(f: Function) -> Function:
    return lambda *args: jax.jvp(f, args, tuple(_ones(args)))[1]


def by_linearize(f: Function) -> Function:
    return lambda *args: jax.linearize(f, *args)[1](*_ones(args))


def by_vmap(f: Function) -> Function:
    return lambda *args: jax.vmap(f)(*_twice(args))


def by_scan(f: Function) -> Function:
    return lambda *args: lax.scan(lambda n, xs: (n + 1, f(*xs)), 0, _twice(args))[1]


def by_cond(f: Function) -> Function:
    return lambda *args: lax.cond(jnp.abs(args[0]).sum() > 1, f, lambda *args: f(*map(_negated, args)), *args)


TRANSFORMATIONS: dict[str, Callable[[Function], Function]] = {
    "grad": by_grad,
    "jvp": by_jvp,
    "linearize": by_linearize,
    "vmap": by_vmap,
    "scan": by_scan,
    "cond": by_cond,
    "checkpoint": jax.checkpoint,
    "jit": jax.jit,
    "auto_layout": auto_layout,
}
FORWARD = {"jvp", "linearize"}


@examples(30)
@given(programs(kinks=False, most=4), st.tuples(*[st.sampled_from(sorted(TRANSFORMATIONS))] * 3), st.integers(0, 2))
def test_two_around_and_one_inside(program: Program, names: tuple[str, str, str], place: int):
    """`auto_layout` inside of all three, or between them."""
    assume(program.forward or not FORWARD.intersection(names))
    with program.config():
        args = program.arguments()
        part, given = real_part(program, args)
        assume(given and inexact(jax.eval_shape(program, *args)))
        plain = tuned = part
        for i, name in enumerate(names):
            plain = TRANSFORMATIONS[name.replace("auto_layout", "jit")](plain)
            tuned = TRANSFORMATIONS[name](auto_layout(tuned) if i == place else tuned)
        jaxpr = jax.make_jaxpr(tuned)(*given)
        convolutions = [eqn.primitive for eqn in equations(jaxpr) if eqn.primitive in CONVOLUTIONS]
        assume(convolutions)  # a derivative may not need any
        assert tuned_conv_p in convolutions
        assert_same(program, jax.jit(tuned)(*given), jax.jit(plain)(*given), exactly=False)
