"""`materialise`: a value that is computed once, whoever reads it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxlayout.runtime._compat import BARRIERS_STAY


def materialise(x: jax.Array, by: jax.Array) -> jax.Array:
    """The same values. XLA:CPU puts what is elementwise into the fusion of each of its readers, where it is computed as
    often as it is read; this stays outside.

    On jaxlib 0.10 an optimization barrier is gone before anything is fused. What is carried round a loop is an array
    there, too, and where the loop does not run nothing moves: that it does not, unless the first number of `by` is
    infinite, only the run will show. (If it does run, it rounds to the precision that the numbers have.)
    """
    plain = jnp.issubdtype(x.dtype, np.floating) and jnp.issubdtype(by.dtype, np.floating) and by.size
    if BARRIERS_STAY or not plain:
        return lax.optimization_barrier(x)
    first = lax.squeeze(lax.slice(by, [0] * by.ndim, [1] * by.ndim), range(by.ndim))
    return _carried(x, lax.convert_element_type(lax.abs(first) == np.inf, np.int32))


@jax.custom_jvp
def _carried(x: jax.Array, rounds: jax.Array) -> jax.Array:
    info = jnp.finfo(x.dtype)

    def again(carry: Any) -> Any:
        i, x = carry
        return i + 1, lax.reduce_precision(x, info.nexp, info.nmant)

    return lax.while_loop(lambda carry: carry[0] < rounds, again, (np.int32(0), x))[1]


@_carried.defjvp
def _(primals: Any, tangents: Any) -> Any:
    return _carried(*primals), tangents[0]
