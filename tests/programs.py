"""Small programs around convolutions, drawn by hypothesis; how they are run, and their results held against each other.

What they are made of is in `builder`, and the kinds of step in `steps`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from builder import LARGEST, SIZES, Builder, Program, apply_random_step
from hypothesis import strategies as st
from steps import conv


@st.composite
def programs(draw: Any, *, kinks: bool = True, most: int = 7, exact: bool | None = None) -> Program:
    """A program with a convolution in it, up to `most` other steps around it, and several outputs."""
    exact = draw(st.booleans()) if exact is None else exact
    dtypes = ["float32", "float32", "float32", "bfloat16", "float16", "float64"]
    dtype = draw(st.sampled_from([*dtypes, "int32", "complex64"] if exact else dtypes))
    x64 = dtype == "float64"
    b = Builder(draw, exact=exact, dtype=dtype, kinks=kinks, x64=x64)
    ndim = draw(st.sampled_from([4, 4, 3, 5, 2]))
    sizes = SIZES if ndim < 5 else SIZES[:4]
    shape = [draw(st.sampled_from(sizes)) for _ in range(ndim)]
    while math.prod(shape) > LARGEST // 4:
        shape[shape.index(max(shape))] //= 2
    x = b.input(shape)
    before = draw(st.integers(0, 2))
    for i in range(draw(st.integers(before, most))):
        if i == before:
            x = conv(b, x) if b.rank(x) >= 2 and b.values[x].dtype != bool else x
            x = x or next(iter(b.values))
        values = list(b.values)
        if draw(st.integers(0, 4)) == 4:
            x = draw(st.sampled_from(values))
        x = apply_random_step(b, x)
    if not b.convolutions:
        x = conv(b, next(iter(b.values))) or x
    made = [name for name in b.values if name not in b.inputs]
    others = draw(st.lists(st.sampled_from(list(b.values)), max_size=2)) if made else []
    eps = [float(jnp.finfo(v.dtype).eps) for v in b.values.values() if jnp.issubdtype(v.dtype, jnp.inexact)]
    return Program(
        inputs=b.inputs,
        steps=tuple(b.steps),
        outputs=(*b.loose_ends(x), *others),
        exact=exact,
        x64=x64,
        eps=max(eps, default=0.0),
        forward=b.forward,
    )


# Running them


def compiled(fun: Callable[..., Any], *args: Any) -> Any:
    """The results of the compiled function."""
    return jax.jit(lambda *args: fun(*args))(*args)


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


def inexact(values: Sequence[Any]) -> list[int]:
    return [i for i, v in enumerate(values) if jnp.issubdtype(v.dtype, jnp.inexact)]


def real_part(fun: Callable[..., Any], args: Sequence[Any]) -> tuple[Callable[..., Any], list[Any]]:
    """The function of its inexact arguments alone, giving its inexact results."""
    which = inexact(args)

    def part(*given: Any) -> tuple[Any, ...]:
        outs = fun(*(dict(zip(which, given, strict=True)).get(i, arg) for i, arg in enumerate(args)))
        return tuple(outs[i] for i in inexact(outs))

    return part, [args[i] for i in which]
