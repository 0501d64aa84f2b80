"""What many tests need: a convolution, numbers to put in, how results are held against each other, another process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxlayout import AutoLayout, auto_layout
from jaxlayout.convs import primitive
from jaxlayout.convs.lowering import evaluate
from jaxlayout.convs.primitive import tuned_conv_p
from jaxlayout.graph.program import equations
from jaxlayout.layout import ConvDimensionNumbers

ROOT = Path(__file__).parents[1]
FIRST, LAST = "NCHW,OIHW->NCHW", "NHWC,HWIO->NHWC"
"""As PyTorch writes a convolution, and as JAX's libraries do."""


def conv(
    x: Any, k: Any, dims: str | None = None, strides: int = 1, padding: Any = "SAME", **keywords: Any
) -> jax.Array:
    """A convolution of any rank; features first, as in `FIRST`, where nothing is said of its dimension numbers."""
    numbers = None if dims is None else ConvDimensionNumbers.parse(dims).to_lax()
    return lax.conv_general_dilated(x, k, (strides,) * (x.ndim - 2), padding, dimension_numbers=numbers, **keywords)


def depthwise(x: Any, k: Any) -> jax.Array:
    """With features last: in XLA so slow that there is something to gain even for the smallest."""
    return conv(x, k, LAST, feature_group_count=x.shape[-1])


def normal(seed: int, *shape: int, dtype: Any = np.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


X, K = normal(0, 2, 3, 6, 5), normal(1, 4, 3, 3, 3)
"""Images and a kernel, in the order of `FIRST`."""


def net(params, x):
    return jnp.tanh(conv(x, params["kernel"]) + params["bias"][:, None, None]) * 2.0


PARAMS = {"kernel": K, "bias": normal(2, 4)}


def shape(*sizes: int, dtype: Any = np.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def close(found: Any, expected: Any, tolerance: float = 2e-5, least: float = 0.0) -> None:
    """Equal in structure, shapes, dtypes and weak types, and in numbers up to the order of a sum: within `tolerance` of
    the largest number of each array, or of `least` where all are smaller: a gradient may be nothing but rounding."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert jax.typeof(a) == jax.typeof(b)
        if jnp.issubdtype(b.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        if not jnp.issubdtype(b.dtype, jnp.inexact):
            np.testing.assert_array_equal(a, b)
            continue
        wide = np.complex128 if jnp.issubdtype(b.dtype, jnp.complexfloating) else np.float64
        a, b = np.asarray(a, wide), np.asarray(b, wide)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * float(np.abs(b).max(initial=least)))


def has_chosen(jaxpr: Any) -> bool:
    """Whether a jaxpr has a convolution that was chosen."""
    return any(eqn.primitive is tuned_conv_p for eqn in equations(jaxpr))


def is_tuned(fun: Any, *args: Any, **kwargs: Any) -> bool:
    """Whether a function, traced with these arguments, has one."""
    return has_chosen(jax.make_jaxpr(lambda: fun(*args, **kwargs))())


def same(fun: Any, *args: Any, jit: dict[str, Any] | None = None, **kwargs: Any) -> AutoLayout:
    """Assert that `auto_layout` gives what `jax.jit` gives, through a rewritten function; gives it for more."""
    tuned = auto_layout(fun, **(jit or {}))
    close(tuned(*args, **kwargs), jax.jit(fun, **(jit or {}))(*args, **kwargs))
    outcome = tuned.outcome(*args, **kwargs)
    assert outcome.kept, outcome.verdict.reason
    return tuned


def lowerings_used(patch: pytest.MonkeyPatch) -> set[str]:
    """The lowerings that compute something from here on: their names are put into it."""
    used: set[str] = set()
    patch.setattr(primitive, "evaluate", lambda name, *rest: used.add(name) or evaluate(name, *rest))
    return used


def python(*command: object, timeout: float = 300, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run this Python in a process of its own, at the root of the repository, with warnings as errors; it has to
    succeed."""
    done = subprocess.run(
        [sys.executable, "-W", "error", *map(str, command)],
        cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done
