"""The interpreter: under any legal plan a program computes what it did, with the transposes that the plan counts."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from jax import lax
from jax.experimental import io_callback
from jax.extend import source_info_util
from jax.extend.core import Primitive
from jax.interpreters import mlir
from programs import Program, programs, random_layouts, random_plan

from jaxlayout.convs.candidates import Candidate
from jaxlayout.convs.primitive import CONVOLUTIONS, tuned_conv_p
from jaxlayout.convs.signature import ConvSignature
from jaxlayout.graph.build import LayoutGraph, Mode, build_graph
from jaxlayout.graph.fit import check_fit
from jaxlayout.graph.plan import Conversion, Plan
from jaxlayout.graph.rules import Rule
from jaxlayout.graph.rules.base import registered_rule, same_axes
from jaxlayout.graph.solve import solve
from jaxlayout.layout import ConvDimensionNumbers, ConvLayout, KernelLayout
from jaxlayout.program import count_transposes, equations
from jaxlayout.retrace import retrace

CI = settings(
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)
SEEDS = st.integers(0, 1000)


def text(jaxpr: Any) -> str:
    """A jaxpr as text, without what differs from one trace to the next."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(jaxpr))


def trace(fun: Callable[..., Any], *args: Any) -> Any:
    return jax.make_jaxpr(fun)(*args)


def retraced(jaxpr: Any, plan: Plan) -> Any:
    return jax.make_jaxpr(retrace(jaxpr, plan))(*jaxpr.in_avals)


# Drawn programs under random plans


def planned(program: Program, seed: int) -> tuple[Any, Plan]:
    jaxpr = program.jaxpr()
    return jaxpr, random_plan(build_graph(jaxpr, random_layouts(seed)), seed)


def compiled(fun: Callable[..., Any], *args: Any) -> Any:
    """The results of the compiled function; compiled quickly rather than well."""
    lowered = jax.jit(lambda *args: fun(*args)).lower(*args)
    return lowered.compile(compiler_options={"xla_backend_optimization_level": 0})(*args)


def assert_same(program: Program, found: Sequence[Any], wanted: Sequence[Any], *, exactly: bool | None = None) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if a.dtype == jax.dtypes.float0:
            continue
        exact = program.exact if exactly is None else exactly
        if exact or not jnp.issubdtype(a.dtype, jnp.inexact):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        else:
            wide = np.complex128 if jnp.issubdtype(a.dtype, jnp.complexfloating) else np.float64
            a, b = np.asarray(a, wide), np.asarray(b, wide)
            finite = np.isfinite(b)
            scale = max(1.0, np.abs(b[finite]).max(initial=0.0))
            np.testing.assert_allclose(a, b, rtol=0, atol=20 * program.eps * scale)


@settings(CI, max_examples=300)
@given(programs(), SEEDS)
def test_random_plans_change_the_program_as_they_say(program, seed):
    with program.config():
        jaxpr, plan = planned(program, seed)
        new = retraced(jaxpr, plan)
    assert (text(new) == text(jaxpr)) == plan.trivial
    for a, b in zip(new.out_avals, jaxpr.out_avals, strict=True):
        assert (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, b.weak_type)
    sites = [eqn for eqn in equations(new) if eqn.primitive in CONVOLUTIONS]
    assert len(sites) == sum(eqn.primitive in CONVOLUTIONS for eqn in equations(jaxpr))
    if not program.hidden:
        assert count_transposes(new) == len(plan.conversions)
    rest = {path: mode for path, mode in plan.choices.items() if mode.candidate is None}
    check_fit(jaxpr, Plan(choices=rest))
    assert Plan.from_json(plan.to_json()) == plan


@settings(CI, max_examples=120)
@given(programs(), SEEDS)
def test_random_plans_leave_the_values(program, seed):
    with program.config():
        jaxpr, plan = planned(program, seed)
        assume(not plan.trivial)
        args = program.arguments(seed)
        assert_same(program, compiled(retrace(jaxpr, plan), *args), compiled(program, *args))


Transform = Callable[[Callable[..., Any], Program, Sequence[Any], int], Any]


def whole(program: Program, avals: Sequence[Any], seed: int) -> list[np.ndarray]:
    """Small whole numbers."""
    rng = np.random.default_rng(seed)
    return [np.asarray(rng.integers(-2, 3, a.shape), a.dtype) for a in avals]


def inexact(values: Sequence[Any]) -> list[int]:
    return [i for i, v in enumerate(values) if jnp.issubdtype(v.dtype, jnp.inexact)]


def real_part(fun: Callable[..., Any], args: Sequence[Any]) -> tuple[Callable[..., Any], list[Any]]:
    """The function of its inexact arguments alone, giving its inexact results."""
    which = inexact(args)

    def part(*given: Any) -> tuple[Any, ...]:
        outs = fun(*(dict(zip(which, given, strict=True)).get(i, arg) for i, arg in enumerate(args)))
        return tuple(outs[i] for i in inexact(outs))

    return part, [args[i] for i in which]


def by_vjp(fun: Callable[..., Any], program: Program, args: Sequence[Any], seed: int) -> Any:
    part, given = real_part(fun, args)
    cotangents = tuple(whole(program, jax.eval_shape(part, *given), seed))
    return compiled(lambda *given: jax.vjp(part, *given)[1](cotangents), *given)


def by_jvp(fun: Callable[..., Any], program: Program, args: Sequence[Any], seed: int) -> Any:
    assume(program.forward)
    part, given = real_part(fun, args)
    return compiled(lambda *given: jax.jvp(part, given, tuple(whole(program, given, seed))), *given)


def by_hvp(fun: Callable[..., Any], program: Program, args: Sequence[Any], seed: int) -> Any:
    """Forward over reverse."""
    assume(program.forward)
    part, given = real_part(fun, args)
    cotangents = tuple(whole(program, jax.eval_shape(part, *given), seed))

    def gradient(*given: Any) -> Any:
        return jax.vjp(part, *given)[1](cotangents)

    return compiled(lambda *given: jax.jvp(gradient, given, tuple(whole(program, given, seed + 1))), *given)


def by_vmap(fun: Callable[..., Any], program: Program, args: Sequence[Any], seed: int) -> Any:
    some = [np.stack([arg, other]) for arg, other in zip(args, program.arguments(seed + 1), strict=True)]
    axes = [None if i % 3 == seed % 3 else 0 for i in range(len(args))] if len(args) > 1 else [0]
    batched = [arg if axis is None else both for arg, both, axis in zip(args, some, axes, strict=True)]
    return compiled(jax.vmap(fun, in_axes=axes), *batched)


def by_vmap_of_vjp(fun: Callable[..., Any], program: Program, args: Sequence[Any], seed: int) -> Any:
    part, given = real_part(fun, args)
    cotangents = [np.stack([c, -c]) for c in whole(program, jax.eval_shape(part, *given), seed)]

    def pull_back(given: Any, cotangents: Any) -> Any:
        return jax.vjp(part, *given)[1](tuple(cotangents))

    return compiled(lambda given: jax.vmap(pull_back, in_axes=(None, 0))(given, cotangents), given)


@settings(CI, max_examples=60)
@given(programs(kinks=False), SEEDS, st.sampled_from([by_vjp, by_jvp, by_hvp, by_vmap, by_vmap_of_vjp]))
def test_random_plans_leave_derivatives_and_batches(program, seed, transformed):
    with program.config():
        jaxpr, plan = planned(program, seed)
        args = program.arguments(seed)
        assume(not plan.trivial and inexact(args) and inexact(jaxpr.out_avals))
        found, wanted = (transformed(fun, program, args, seed) for fun in (retrace(jaxpr, plan), program))
        assert_same(program, found, wanted, exactly=False)
