"""`Compiled`: a function compiled for the context that it is going to run in."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxlayout.convs.signature import Context

CompilerOptions = dict[str, Any] | None
"""Compiler options as `jax.jit` takes them."""


def with_options(given: CompilerOptions, more: Mapping[str, Any] | None) -> CompilerOptions:
    """Compiler options and some more, which win."""
    return {**(given or {}), **(more or {})} or None


@dataclass(frozen=True, slots=True)
class Compiled:
    """A function compiled for a context; called like the function."""

    program: Any
    first: tuple[Any, ...] = ()
    """What the program takes before the function's own arguments."""
    takes: tuple[int, ...] | None = None
    """Which of those arguments it takes; None for all."""

    def __call__(self, *args: Any) -> Any:
        return self.program(*self.first, *(args if self.takes is None else (args[i] for i in self.takes)))


def compile_in(
    context: Context, function: Callable[..., Any], args: Sequence[Any], compiler_options: CompilerOptions = None
) -> Compiled:
    """Compile a function of arrays for a context. The nested one is a branch that is always taken, which the
    compiler cannot know."""
    if context == "entry":
        return Compiled(jax.jit(function).lower(*args).compile(compiler_options))

    def branch(flag: Any, *args: Any) -> Any:
        shapes = jax.eval_shape(function, *args)
        return lax.cond(flag, function, lambda *_: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), *args)

    flag = jnp.array(True)
    return Compiled(jax.jit(branch).lower(flag, *args).compile(compiler_options), (flag,))


def program_hash(compiled: Any) -> str:
    """A hash of a compiled program without what does not matter: source lines, scope names, its own name."""
    text = compiled.as_text() or ""
    text = re.sub(r", metadata=\{[^{}]*\}", "", text)
    text = re.sub(r"(?m)^(HloModule|ENTRY) [^,\s]+", "", text)
    text = re.sub(r"(?ms)^FileNames$.*?(?=^(?:ENTRY|%))", "", text)
    return hashlib.sha256(text.encode()).hexdigest()[:16] if text else ""
