"""Run by test_fuzz, as a test in a process that has four devices: drawn programs on arrays that these share, any way.

XLA's partitioner is itself wrong at times, or refuses, or takes the process down: then there is nothing to compare."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from builder import Program
from drawing import examples
from helpers import lowerings_used
from hypothesis import Phase, assume, event, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from plans import at_random
from programs import assert_same, programs, real_part
from tables import as_another_process
from test_fuzz import RIGHT, WAYS

from jaxlayout import auto_layout
from jaxlayout.convs.primitive import CONVOLUTIONS
from jaxlayout.graph.program import equations
from jaxlayout.tuning import pipeline

pytestmark = pytest.mark.usefixtures("costs")

SHAPE = {"data": 2, "model": 2}


@st.composite
def divisions(draw: Any, shape: tuple[int, ...]) -> P:
    """How an array is divided: each axis of the mesh goes to one of the array, or to none."""
    spec: list[tuple[str, ...]] = [()] * len(shape)
    for name, size in SHAPE.items():
        fitting = [n for n, many in enumerate(shape) if many % (size * 2 ** len(spec[n])) == 0]
        if (at := draw(st.sampled_from([*fitting, None]))) is not None:
            spec[at] += (name,)
    return P(*(names or None for names in spec))


def upsets_xla(jaxpr: Any) -> bool:
    """Whether there is something in a program that, divided, takes XLA's partitioner down whoever wrote it."""
    for eqn in equations(jaxpr):
        if eqn.primitive.name == "pad" and min(min(sides[:2]) for sides in eqn.params["padding_config"]) < 0:
            return True
        if eqn.primitive in CONVOLUTIONS:
            groups = eqn.params["feature_group_count"] * eqn.params["batch_group_count"]
            if min(map(min, eqn.params["padding"]), default=0) < 0 or (groups > 1 and not eqn.params["padding"]):
                return True
    return False


@settings(examples(10), phases=[Phase.generate])
@given(st.sampled_from(sorted(WAYS)), st.integers(0, 1000), st.data())
def test_any_lowering_on_divided_arrays_leaves_the_values(way: str, seed: int, data: Any):
    smooth = "gradient" in way
    program: Program = data.draw(programs(kinks=not smooth, most=4))
    mesh = jax.make_mesh(tuple(SHAPE.values()), tuple(SHAPE), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with program.config(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "measure", at_random(seed))
        as_another_process(patch)
        used = lowerings_used(patch)
        fun, args = real_part(program, program.arguments(seed)) if smooth else (program, program.arguments(seed))
        assume(args)
        plain, tuned = WAYS[way](fun, jax.jit), WAYS[way](fun, lambda f: auto_layout(f, table=":memory:"))
        assume(not upsets_xla(jax.make_jaxpr(plain)(*args)))
        specs = [data.draw(divisions(np.shape(x))) for x in args]
        print(way, seed, specs, program, flush=True)  # the last of them, should the process die
        divided = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(args, specs, strict=True)]
        exactly, wanted = program.exact and not smooth, plain(*args)
        try:
            assert_same(program, plain(*divided), wanted, exactly=exactly)
        except (AssertionError, jax.errors.JaxRuntimeError) as error:
            event(f"XLA itself: {type(error).__name__}")
            assume(False)
        print(RIGHT, flush=True)
        found = tuned(*divided)
        for name in used:
            event(name)
        assert_same(program, found, wanted, exactly=exactly)
