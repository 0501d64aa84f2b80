"""What a drawn program is made of, and how a step draws its part: the kinds of step are in `steps`.

A drawn program is exact or smooth. An exact one computes with small whole numbers, which every order of
summation gives to the bit, so it may do anything (ties in a maximum, argmax, rounding) and results are compared for
equality. A smooth one computes with real numbers and is compared within a tolerance; what may jump at a
rounding error is left out of it, and kinks too where derivatives are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax import lax

SIZES = (1, 2, 3, 4, 5, 6, 8)
LARGEST = 2000  # elements of one value
BOUND = 4  # of exact values between steps


# Programs


@dataclass(frozen=True)
class Input:
    """An argument: whole numbers in [low, high], or normal numbers of that deviation where `low` is None."""

    shape: tuple[int, ...]
    dtype: Any
    low: int | None
    high: float

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        def part() -> np.ndarray:
            if self.low is None:
                return self.high * rng.standard_normal(self.shape)
            return rng.integers(self.low, int(self.high) + 1, self.shape)

        complex_ = jnp.issubdtype(self.dtype, jnp.complexfloating)
        return np.asarray(part() + 1j * part() if complex_ else part(), self.dtype)


@dataclass(frozen=True)
class Step:
    text: str
    fun: Callable[..., Any]
    operands: tuple[str, ...]
    results: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Program:
    """A function of flat arrays, and what is known of it."""

    inputs: dict[str, Input]
    steps: tuple[Step, ...]
    outputs: tuple[str, ...]
    exact: bool
    x64: bool
    eps: float
    """Of the coarsest floating-point dtype in it."""
    forward: bool
    """Whether it has a jvp (a custom_vjp function has none)."""

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        env = dict(zip(self.inputs, args, strict=True))
        for step in self.steps:
            out = step.fun(*(env[name] for name in step.operands))
            env.update(zip(step.results, out if isinstance(out, tuple | list) else (out,), strict=True))
        return tuple(env[name] for name in self.outputs)

    def __repr__(self) -> str:
        inputs = [f"{name}: {np.dtype(i.dtype)}{list(i.shape)}" for name, i in self.inputs.items()]
        steps = [f"{', '.join(s.results)} = {s.text}({', '.join(s.operands)})" for s in self.steps]
        kind = "exact" if self.exact else "smooth"
        return "\n    ".join([f"<{kind} program", *inputs, *steps, f"return {', '.join(self.outputs)}>"])

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))

    @contextmanager
    def config(self) -> Iterator[None]:
        """The configuration that it is traced and run under."""
        with jax.enable_x64(self.x64):
            yield

    def arguments(self, seed: int = 0, batch: tuple[int, ...] = ()) -> list[np.ndarray]:
        rng = np.random.default_rng(seed)
        return [Input((*batch, *i.shape), i.dtype, i.low, i.high).draw(rng) for i in self.inputs.values()]

    def jaxpr(self) -> Any:
        """Traced without values."""
        return jax.make_jaxpr(self)(*(jax.ShapeDtypeStruct(i.shape, i.dtype) for i in self.inputs.values()))


# Drawing them


class Builder:
    """A program under construction; a step draws its parameters and calls `do`."""

    def __init__(self, draw: Any, *, exact: bool, dtype: str, kinks: bool, x64: bool):
        self.draw, self.exact, self.dtype, self.kinks, self.x64 = draw, exact, dtype, kinks, x64
        self.inputs: dict[str, Input] = {}
        self.values: dict[str, Any] = {}
        self.steps: list[Step] = []
        self.forward, self.depth, self.convolutions = True, 0, 0

    def input(self, shape: Sequence[int], dtype: Any = None, high: float = 2, low: int | None = -2) -> str:
        """A new argument; by default an operand of ordinary size."""
        dtype = np.dtype(jnp.dtype(self.dtype if dtype is None else dtype))
        if not self.exact and jnp.issubdtype(dtype, jnp.inexact):
            low, high = None, 1.0
        return self.add_input(Input(tuple(shape), dtype, low, high))

    def add_input(self, spec: Input) -> str:
        name = f"a{len(self.inputs)}"
        self.inputs[name] = spec
        self.values[name] = jax.ShapeDtypeStruct(spec.shape, spec.dtype)
        return name

    def do(self, text: str, fun: Callable[..., Any], *operands: str) -> Any:
        """Append a step; gives the name of its result, or a tuple of names."""
        with jax.enable_x64(self.x64):
            out = jax.eval_shape(fun, *(self.values[name] for name in operands))
        many = isinstance(out, tuple | list)
        outs = tuple(out) if many else (out,)
        names = tuple(f"v{len(self.values) + i}" for i in range(len(outs)))
        self.values.update(zip(names, outs, strict=True))
        self.steps.append(Step(text, fun, operands, names))
        return names if many else names[0]

    def loose_ends(self, first: str) -> tuple[str, ...]:
        """A value, and all that no step uses."""
        used = {first, *self.inputs, *(name for step in self.steps for name in step.operands)}
        return (first, *(name for name in self.values if name not in used))

    def shape(self, x: str) -> tuple[int, ...]:
        return self.values[x].shape

    def rank(self, x: str) -> int:
        return len(self.shape(x))

    def axis(self, x: str) -> int:
        return self.draw(st.integers(0, self.rank(x) - 1))

    def axes(self, x: str, least: int = 1) -> tuple[int, ...]:
        return tuple(sorted(self.draw(st.sets(st.integers(0, self.rank(x) - 1), min_size=least))))

    def one(self, *choices: Any) -> Any:
        return self.draw(st.sampled_from(choices))

    def tame(self, x: str) -> str:
        """Keep exact values small, whatever has been done to them."""
        dtype = self.values[x].dtype
        if not self.exact or not jnp.issubdtype(dtype, np.number) or jnp.issubdtype(dtype, np.complexfloating):
            return x
        kind = self.one("clamp", "clip", "relu6")
        if kind == "clamp":
            return self.do(f"clamp{BOUND}", lambda x: lax.clamp(x.dtype.type(-BOUND), x, x.dtype.type(BOUND)), x)
        if kind == "clip":
            return self.do(f"clip{BOUND}", lambda x: jnp.clip(x, -BOUND, BOUND), x)
        return self.do(f"relu{BOUND}", lambda x: jnp.minimum(jax.nn.relu(x), BOUND), x)


@dataclass(frozen=True)
class Kind:
    """A kind of step and where it can stand."""

    name: str
    make: Callable[[Builder, str], str | None]
    dtypes: str
    """Of the value it is applied to: 'any', 'number' (bool excluded), 'real' (and complex excluded), 'float'."""
    when: str
    """'always'; 'exact': it may jump at a rounding error; 'smooth': its results are not whole numbers; 'kinked': its
    derivative may jump."""
    rank: int
    weight: int


KINDS: list[Kind] = []


def step(dtypes: str = "number", when: str = "always", rank: int = 1, weight: int = 2) -> Callable[[Any], Any]:
    def register(make: Any) -> Any:
        KINDS.append(Kind(make.__name__.strip("_"), make, dtypes, when, rank, weight))
        return make

    return register


def fits(b: Builder, kind: Kind, x: str) -> bool:
    dtype, shape = b.values[x].dtype, b.shape(x)
    allowed = {
        "any": True,
        "number": jnp.issubdtype(dtype, np.number),
        "real": jnp.issubdtype(dtype, np.number) and not jnp.issubdtype(dtype, np.complexfloating),
        "float": jnp.issubdtype(dtype, np.floating),
    }[kind.dtypes]
    fine = {"always": True, "exact": b.exact, "smooth": not b.exact, "kinked": b.exact or b.kinks}[kind.when]
    return allowed and fine and len(shape) >= kind.rank


def apply_random_step(b: Builder, x: str) -> str:
    """The value that a drawn step makes of x, or x where it makes none."""
    kind = b.draw(st.sampled_from([kind for kind in KINDS if fits(b, kind, x) for _ in range(kind.weight)]))
    made = kind.make(b, x)
    return x if made is None else made
