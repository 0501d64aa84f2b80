"""Drawn programs as users run them: through `auto_layout`, under the plan of a made-up table that has them choose among
all real lowerings at random, against plain JAX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import pytest
from drawing import examples
from hypothesis import assume, event, given
from hypothesis import strategies as st
from programs import Program, at_random, programs
from test_retrace import assert_same, inexact, real_part
from test_transformations import Function, by_cond, by_grad, by_scan, by_vmap

from jaxlayout import auto_layout, line
from jaxlayout.convs.lowering import evaluate

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
        merged = [None] * (len(still) + len(rest))
        merged[1::2], merged[::2] = still, rest
        return f(*merged)

    def run(*args: Any) -> tuple[Any, ...]:
        tuned = compile(split)
        return tuned.freeze(args[1::2])(rest=args[::2]) if hasattr(tuned, "freeze") else tuned(args[1::2], args[::2])

    return run


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
}


@examples(20)
@given(st.sampled_from(sorted(WAYS)), st.integers(0, 1000), st.data())
def test_any_lowering_anywhere_leaves_the_values(way: str, seed: int, data: Any):
    smooth = "gradient" in way
    program: Program = data.draw(programs(kinks=not smooth, most=5))
    with program.config(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(line, "measure", at_random(seed))
        patch.setattr(line, "_tables", {})
        used: set[str] = set()
        patch.setattr("jaxlayout.convs.primitive.evaluate", lambda name, *rest: used.add(name) or evaluate(name, *rest))
        args = program.arguments(seed)
        fun: Function = program
        if smooth:
            fun, args = real_part(program, args)
            assume(args and inexact(jax.eval_shape(program, *program.arguments(seed))))
        tuned = WAYS[way](fun, lambda f: auto_layout(f, table=":memory:"))
        found, wanted = tuned(*args), WAYS[way](fun, jax.jit)(*args)
        for name in used - {"xla"}:
            event(name)
        assert_same(program, found, wanted, exactly=program.exact and not smooth)
