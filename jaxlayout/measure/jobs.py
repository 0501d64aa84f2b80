"""`Job`: one thing to compute, with alternatives that are timed against each other: a convolution, a transpose, or
another equation in several orders (`tuning.work`). It knows nothing of graphs and plans.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxlayout.convs.candidates import Candidate
from jaxlayout.convs.lowering import evaluate, lowering_named, may_crash, versioned
from jaxlayout.convs.signature import Context, ConvSignature
from jaxlayout.layout import ConvDimensionNumbers, ConvLayout, KernelLayout, Order
from jaxlayout.measure.reference import reference
from jaxlayout.runtime.threads import default_device

TOLERANCE = 3.0
"""c of the accuracy bound c*eps*sqrt(K). Rounding after each of K additions is a random walk with standard
deviation 0.35*eps*sqrt(K) of the result's rms; five of those, the largest among a million outputs, are
1.8*eps*sqrt(K); rounding an output as large as five rms adds 2.5*eps. Together, in square, about 3."""

UNEXPLAINED = 10.0
"""An error of the form written that is more than so many times c*eps*sqrt(K) is no rounding: the form is wrong here,
and what is allowed to others does not go by it."""
COARSE = 2.0**-6
"""What rounding to bfloat16 can come to, as a share of the rms: on devices that round the operands of products so, no
less is called wrong, and on none is more called rounding, unless the dtype of out is so coarse itself."""

REFERENCE_MACS = 5 * 10**9
"""The reference is computed for as many images as this many multiply-adds allow (about a quarter of a second)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Alternatives to be timed against each other: functions of the same arrays, each in an order of its own."""

    key: str
    """What is computed: the key in the table, there called the signature."""
    alternatives: Mapping[str, Callable[..., Any]]
    """By id, there called the candidate; the first is the one written. Physical arrays in, one array out."""
    inputs: Callable[[], tuple[Callable[[str], tuple[np.ndarray, ...]], Callable[[str, Any], float] | None]]
    """Draws the inputs, and gives two functions: of an alternative's id, its arrays; of that and its output, the error
    (None: it is not checked)."""
    bound: Callable[[float], float] = lambda written: np.inf
    """The error allowed, given that of the one written, which may be wrong itself."""
    context: Context = "entry"
    dims: Callable[[str], Any] | None = None
    """The layouts of an alternative, where what it does is known. What was measured in them stands for any other."""
    least_work: Callable[[str], tuple[int, int]] = lambda name: (0, 0)
    """The least that an alternative does: multiply-adds in float32, and bytes."""
    form: Callable[[str], tuple[ConvSignature, Candidate] | None] = lambda name: None
    """The form of an alternative that may crash: what has to be seen to run elsewhere before it is compiled here."""
    make: Callable[[], Job] | None = None
    """Makes the same job in another process; None where that cannot be."""


def candidate_id(candidate: Candidate) -> str:
    """The key of a candidate in the table: with its lowering's version, so that a changed one is timed anew."""
    return f"{versioned(candidate.lowering)}:{candidate.dims}"


def conv_job(conv: ConvSignature, candidates: Sequence[Candidate]) -> Job:
    """The job of timing the candidates of a convolution."""

    def alternative(candidate: Candidate) -> Callable[..., Any]:
        return lambda lhs, rhs: evaluate(candidate.lowering, conv, candidate.dims, lhs, rhs)

    named = {candidate_id(candidate): candidate for candidate in candidates}
    dims = {name: candidate.dims for name, candidate in named.items()}
    last = ConvDimensionNumbers(
        ConvLayout.channels_last(conv.rank),
        KernelLayout.io_last(conv.rank),
        ConvLayout.channels_last(conv.rank),
    )

    def inputs() -> Any:
        rng = np.random.default_rng(0)
        lhs = random_array(rng, conv.lhs_shape(last.lhs), conv.lhs_dtype)
        rhs = random_array(rng, conv.rhs_shape(last.rhs), conv.rhs_dtype)
        images = max(1, REFERENCE_MACS * conv.batch // max(1, conv.macs)) if conv.batch_groups == 1 else conv.batch
        some = replace(conv, batch=min(conv.batch, images))
        expected = reference(some, lhs[: some.batch], rhs)
        rms = float(np.sqrt(np.mean(np.abs(expected) ** 2))) if expected.size else 0.0

        def arrays(name: str) -> tuple[np.ndarray, ...]:
            d = dims[name]
            return (
                np.transpose(lhs, d.lhs.permutation_from(last.lhs)),
                np.transpose(rhs, d.rhs.permutation_from(last.rhs)),
            )

        def error(name: str, out: Any) -> float:
            found = np.transpose(np.asarray(out), last.out.permutation_from(dims[name].out))
            if found.shape[1:] != expected.shape[1:] or found.dtype != conv.out_dtype:
                return np.inf
            wide = found[: expected.shape[0]].astype(expected.dtype)
            worst = float(np.max(np.abs(wide - expected), initial=0.0))
            return worst / (rms or 1.0) if np.isfinite(worst) else np.inf

        return arrays, error

    def least_work(name: str) -> tuple[int, int]:
        macs, nbytes = lowering_named(named[name].lowering).least_work(conv, dims[name])
        # Half precision and integers may have arithmetic of their own that is faster.
        return macs if min(conv.lhs_dtype.itemsize, conv.rhs_dtype.itemsize) >= 4 else 0, nbytes

    eps = float(jnp.finfo(conv.out_dtype).eps) if jnp.issubdtype(conv.out_dtype, jnp.inexact) else 0.0
    allowed = TOLERANCE * eps * max(1, conv.contraction) ** 0.5
    rounds_more = eps and default_device().platform != "cpu"
    explained = max(allowed, COARSE if rounds_more else min(UNEXPLAINED * allowed, COARSE))
    return Job(
        key=conv.key,
        alternatives={name: alternative(candidate) for name, candidate in named.items()},
        inputs=inputs,
        bound=lambda written: max(2 * written if written <= explained else 0.0, allowed),
        context=conv.context,
        dims=lambda name: dims[name],
        least_work=least_work,
        form=lambda name: (conv, named[name]) if may_crash(named[name].lowering) else None,
        make=partial(conv_job, conv, candidates),
    )


def transpose_job(shape: Sequence[int], dtype: Any, permutation: Order, context: Context) -> Job:
    """The job of timing one transpose of a physical array."""

    def inputs() -> Any:
        array = random_array(np.random.default_rng(0), tuple(shape), dtype)
        return lambda name: (array,), None

    return Job(
        key=transpose_key(shape, dtype, permutation, context),
        alternatives={"transpose": lambda x: lax.transpose(x, permutation)},
        inputs=inputs,
        context=context,
        make=partial(transpose_job, shape, dtype, permutation, context),
    )


def transpose_key(shape: Sequence[int], dtype: Any, permutation: Order, context: Context) -> str:
    """The key of a transpose in the table."""
    return f"transpose={list(shape)}{dtype} by={list(permutation)} in={context}"


def coalesced(shape: Sequence[int], permutation: Order) -> tuple[tuple[int, ...], Order]:
    """The same transpose with unit axes dropped and axes that stay neighbours merged: one key for many."""
    groups: list[list[int]] = []
    for axis in (a for a in permutation if shape[a] != 1):
        between = range(groups[-1][-1] + 1, axis) if groups else ()
        if groups and axis > groups[-1][-1] and all(shape[b] == 1 for b in between):
            groups[-1].append(axis)
        else:
            groups.append([axis])
    ranked = sorted(groups)
    sizes = tuple(int(np.prod([shape[a] for a in group])) for group in ranked)
    return sizes, tuple(ranked.index(group) for group in groups)


def random_array(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Ordinary numbers of a dtype; small ones where it is an integer, so that sums stay exact."""
    if jnp.issubdtype(dtype, jnp.integer) or dtype == np.bool_:
        return rng.integers(0 if dtype.kind in "ub" else -3, 4, shape).astype(dtype)
    out = rng.standard_normal(shape, np.float32)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        out = out + 1j * rng.standard_normal(shape, np.float32)
    return out.astype(dtype)
