"""What a program is, whatever it is called: a canonical hash of a jaxpr, and how many transposes it has."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from jax.extend.core import Literal, jaxprs_in_params

from jaxlayout.convs.primitive import CONVOLUTIONS
from jaxlayout.convs.signature import ConvSignature
from jaxlayout.layout import identity, moves_data
from jaxlayout.runtime._compat import is_array, open_jaxpr


@dataclass(frozen=True, slots=True)
class ProgramKey:
    """Equal keys: the same plan serves. Constants enter by shape and dtype, the user's functions by name."""

    function: str
    """A hash of everything."""
    skeleton: str
    """A hash of everything but sizes, those of convolutions' kernels and features excepted: equal for one network at
    two batch or image sizes."""
    sizes: tuple[int, ...]
    """The sizes of all arguments' axes."""


def program_key(
    jaxpr: Any, frozen: Sequence[bool] = (), divided: Mapping[Any, Any] = MappingProxyType({})
) -> ProgramKey:
    """The key of a closed jaxpr, some of whose arguments may be frozen, or divided among devices (see `shards`)."""
    marks = b"".join(b"01"[held : held + 1] for held in frozen)
    inner = open_jaxpr(jaxpr)
    parts = [divided.get(var, ()) for var in (*inner.constvars, *inner.invars)]
    marks += plain(parts).encode() if any(map(any, parts)) else b""
    full, bare = hashlib.sha256(marks), hashlib.sha256(marks)
    for exact, rough in _tokens(jaxpr):
        full.update(exact.encode() + b"\0")
        bare.update(rough.encode() + b"\0")
    sizes = tuple(int(s) for v in inner.invars for s in getattr(v.aval, "shape", ()) if isinstance(s, int))
    return ProgramKey(full.hexdigest()[:32], bare.hexdigest()[:32], sizes)


def _tokens(jaxpr: Any) -> Iterator[tuple[str, str]]:
    """Exact and size-free text of a jaxpr, piece by piece."""
    inner = open_jaxpr(jaxpr)
    numbers: dict[Any, int] = {}

    def name(atom: Any) -> tuple[str, str]:
        if isinstance(atom, Literal):
            return f"={plain(atom.val)}:{atom.aval}", f"={getattr(atom.aval, 'ndim', '')}"
        number = numbers.setdefault(atom, len(numbers))
        return f"{number}:{atom.aval}", f"{number}:{len(getattr(atom.aval, 'shape', ()))}"

    for var in (*inner.constvars, *inner.invars):
        yield name(var)
    yield "in", "in"
    context = None
    for eqn in inner.eqns:
        if eqn.ctx is not context:  # settings and meshes that lowering goes by
            context = eqn.ctx
            text = plain(context)
            yield text, text
        yield str(eqn.primitive), f"{eqn.primitive}{_kind(eqn)}"
        for param, value in sorted(eqn.params.items()):
            if not list(jaxprs_in_params({param: value})):
                yield f"{param}={plain(value)}", param
        for sub in jaxprs_in_params(eqn.params):
            yield from _tokens(sub)
        for atom in (*eqn.invars, *eqn.outvars):
            yield name(atom)
    for atom in inner.outvars:
        yield name(atom)


def _kind(eqn: Any) -> str:
    """What stays of a convolution's size where the batch and the images change theirs."""
    if eqn.primitive not in CONVOLUTIONS:
        return ""
    lhs, rhs = eqn.invars
    conv = ConvSignature.of(lhs.aval, rhs.aval, eqn.params)
    still = (conv.batch,) if conv.is_kernel_gradient else (conv.in_features, *conv.kernel)
    steps = conv.strides, conv.lhs_dilation, conv.rhs_dilation, conv.feature_groups, conv.batch_groups
    return f"{still}{conv.out_features}{steps}{plain(eqn.params['dimension_numbers'])}"


def plain(value: Any) -> str:
    """Text of a parameter that is the same in every process."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{value.shape}{hashlib.sha256(value.tobytes()).hexdigest()}"
    if callable(value) and not isinstance(value, type):
        return getattr(value, "__qualname__", type(value).__qualname__)
    if isinstance(value, set | frozenset):
        return f"{{{','.join(sorted(map(plain, value)))}}}"
    if isinstance(value, tuple | list):
        return f"({','.join(map(plain, value))})"
    if isinstance(value, dict):
        return f"({','.join(f'{k}:{plain(v)}' for k, v in value.items())})"
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations, those of called jaxprs too."""
    for eqn in open_jaxpr(jaxpr).eqns:
        yield eqn
        for sub in jaxprs_in_params(eqn.params):
            yield from equations(sub)


def has_effects(jaxpr: Any) -> bool:
    """Whether a program does more than give results: prints, calls back, is given references, which it may write to."""
    inner = open_jaxpr(jaxpr)
    return bool(inner.effects) or not all(is_array(v.aval) for v in inner.invars)


def runs_host_code(jaxpr: Any) -> bool:
    """Whether a program calls the user's Python when it runs: whatever that says of itself, it may count its calls."""
    return any(eqn.primitive.name.endswith("callback") for eqn in equations(jaxpr))


def needs_real_arguments(jaxpr: Any) -> bool:
    """Whether made-up arguments may upset a program: a loop with a condition might not end."""
    return any(eqn.primitive.name == "while" for eqn in equations(jaxpr))


def count_transposes(jaxpr: Any) -> int:
    """How many transposes of a program move data."""
    return sum(
        eqn.primitive.name == "transpose"
        and moves_data(eqn.invars[0].aval.shape, identity(eqn.invars[0].aval.ndim), eqn.params["permutation"])
        for eqn in equations(jaxpr)
    )
