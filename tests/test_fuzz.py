"""Drawn programs as users run them: through `auto_layout`, under the plan of a made-up table that has them choose among
all real lowerings at random, against plain JAX."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from builder import Program
from drawing import FUZZ, examples
from helpers import lowerings_used
from hypothesis import assume, event, given, reject
from hypothesis import strategies as st
from jax import lax
from plans import at_random
from programs import assert_same, inexact, programs, real_part
from tables import as_another_process
from test_transformations import Function, by_cond, by_grad, by_scan, by_vmap

from jaxlayout import auto_layout
from jaxlayout.tuning import pipeline

pytestmark = pytest.mark.usefixtures("forced")

Way = Callable[[Function, Callable[..., Function]], Function]


def itself(f: Function, compile: Callable[..., Function]) -> Function:
    return compile(f)


def planned(transform: Callable[[Function], Function]) -> Way:
    """What a transformation makes of the program, as one piece."""
    return lambda f, compile: compile(transform(f))


def derived(transform: Callable[[Function], Function]) -> Way:
    """A transformation of the compiled program, inside a jit of the user's."""
    return lambda f, compile: jax.jit(transform(compile(f)))


def frozen(f: Function, compile: Any) -> Function:
    """Every other argument is, the kernels among them or not."""

    def split(still: Sequence[Any], rest: Sequence[Any]) -> tuple[Any, ...]:
        return f(*_woven(still, rest))

    def run(*args: Any) -> tuple[Any, ...]:
        tuned = compile(split)
        return tuned.freeze(args[1::2])(rest=args[::2]) if hasattr(tuned, "freeze") else tuned(args[1::2], args[::2])

    return run


def nested(transform: Callable[[Function], Function]) -> Way:
    """A decorated function inside another."""
    return lambda f, compile: compile(transform(compile(f)))


def frozen_inside(f: Function, compile: Any) -> Function:
    """A decorated function of what is not frozen, that calls a frozen one."""
    return lambda *args: compile(lambda *rest: frozen(f, compile)(*_woven(args[1::2], rest)))(*args[::2])


def _woven(odd: Sequence[Any], even: Sequence[Any]) -> list[Any]:
    merged = [None] * (len(odd) + len(even))
    merged[1::2], merged[::2] = odd, even
    return merged


def by_batched_loop(f: Function) -> Function:
    """In a loop that ends at another time for each of a batch."""

    def run(*args: Any) -> Any:
        start = jax.tree.map(lambda out: jnp.zeros(out.shape, out.dtype), jax.eval_shape(f, *args))

        def body(_: Any, carry: Any, args: Any) -> Any:
            return jax.tree.map(lambda old, new: lax.convert_element_type(new, old.dtype), carry, f(*args))

        def one(times: Any, *args: Any) -> Any:
            return lax.fori_loop(0, times, lambda i, carry: body(i, carry, args), start)

        return jax.vmap(one)(jnp.array([1, 2]), *(jnp.stack([x, x]) for x in args))

    return run


def by_platform(f: Function) -> Function:
    """In a branch for this platform."""
    wrong = lambda *args: jax.tree.map(jnp.zeros_like, f(*args))  # noqa: E731
    return lambda *args: lax.platform_dependent(*args, cpu=f, default=wrong)


WAYS: dict[str, Way] = {
    "itself": itself,
    "planned gradient": planned(by_grad),
    "planned batch": planned(by_vmap),
    "planned loop": planned(by_scan),
    "derived gradient": derived(by_grad),
    "derived batch": derived(by_vmap),
    "in a loop": derived(by_scan),
    "in a branch": derived(by_cond),
    "frozen": frozen,
    "nested gradient": nested(by_grad),
    "nested batch": nested(by_vmap),
    "nested loop": nested(by_scan),
    "frozen inside": frozen_inside,
    "planned batched loop": planned(by_batched_loop),
    "batched loop": derived(by_batched_loop),
    "planned platform": planned(by_platform),
    "nested platform": nested(by_platform),
}

SETTINGS: list[Callable[[], Any]] = [
    nullcontext,
    lambda: jax.numpy_rank_promotion("raise"),
    lambda: jax.numpy_dtype_promotion("strict"),
    lambda: jax.default_matmul_precision("highest"),
    lambda: jax.debug_key_reuse(True),
    lambda: jax.checking_leaks(),
    lambda: jax.threefry_partitionable(False),
]
"""Under which a program is tuned and run. Some refuse programs that are drawn: then there is nothing to compare."""


def reject_under(setting: Any, error: Exception) -> None:
    """Plain JAX refuses the program, too: under the usual settings that is a fault of the drawing."""
    if setting is nullcontext:
        raise error
    reject()


@examples(30)
@given(st.sampled_from(sorted(WAYS)), st.sampled_from(SETTINGS), st.integers(0, 1000), st.data())
def test_any_lowering_anywhere_leaves_the_values(way: str, setting: Any, seed: int, data: Any):
    smooth = "gradient" in way
    program: Program = data.draw(programs(kinks=not smooth, most=5))
    with program.config(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "measure", at_random(seed))
        as_another_process(patch)
        used = lowerings_used(patch)
        args = program.arguments(seed)
        fun: Function = program
        if smooth:
            fun, args = real_part(program, args)
            assume(args and inexact(jax.eval_shape(program, *program.arguments(seed))))
        tuned = WAYS[way](fun, lambda f: auto_layout(f, table=":memory:"))
        with setting():
            try:
                wanted = WAYS[way](fun, jax.jit)(*args)
            except Exception as error:
                reject_under(setting, error)
            found = tuned(*args)
        for name in used - {"xla"}:
            event(name)
        assert_same(program, found, wanted, exactly=program.exact and not smooth)


RIGHT = "right in plain JAX"
"""The last line of the script below should a tuned program take its process down."""


@pytest.mark.parametrize("turn", range(max(1, FUZZ)))
def test_on_meshes(turn: int):
    """In a process that has four devices (see the script)."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    env = os.environ | {"XLA_FLAGS": flags, "FUZZ": str(min(FUZZ, 1))}
    options = ["-n0", "-q", "-s", "-p", "no:cacheprovider", "--hypothesis-show-statistics"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(Path(__file__).with_name("on_meshes.py"))],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    print(done.stdout)
    if done.returncode < 0 and not done.stdout.rstrip().endswith(RIGHT):
        pytest.skip("XLA took the process down over a program as it is written")
    assert done.returncode == 0, done.stderr
