"""What the models share: how one is described, and how its weights are drawn.

No model is trained or downloaded. `draw` reads each leaf's role from its name and gives it random values of
ordinary size; batch-norm statistics too, since a variance of one or a mean of zero would hide a mistake.
NumPy draws them: the same numbers whatever the JAX, and no compilation for each shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod, sqrt
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

Params: TypeAlias = Any  # a pytree of arrays (or of ShapeDtypeStructs)
Apply: TypeAlias = Callable[[Params, jax.Array], jax.Array]
TrainApply: TypeAlias = Callable[[Params, jax.Array], tuple[jax.Array, Params]]

#: roles of what is not trained
STATISTICS = frozenset({"mean", "var", "running_mean", "running_var"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A network, of images or volumes whose values are about N(0, 1)."""

    name: str
    order: Literal["NHWC", "NCHW", "NDHWC"]  # of the images
    parameters: int  # how many are trainable, as published
    apply: Apply  # in inference mode
    shapes: Callable[[], Params]  # the parameters, abstractly
    batch: int = 8
    size: int = 224  # of an image's side, in pixels
    depth: int | None = None  # of a volume of this size; of other sizes in proportion, at least 2
    channels: int = 3
    train_apply: TrainApply | None = None  # in training mode: (logits, what `batch_stats` becomes, by that name)
    variance: float = 1.0  # the least of the batch norms' stored ones: so that signals neither fade nor blow up

    def images(self, batch: int, size: int) -> jax.ShapeDtypeStruct:
        """A batch of images, abstractly."""
        depth = () if self.depth is None else (max(2, self.depth * size // self.size),)
        side = (*depth, size, size)
        shape = (batch, self.channels, *side) if self.order == "NCHW" else (batch, *side, self.channels)
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def build(self, batch: int, size: int, key: jax.Array) -> tuple[Apply, Params, jax.Array]:
        """The function, its random parameters and a random batch of images: `apply(params, images)`."""
        weights, pixels = np.random.SeedSequence(np.asarray(jax.random.key_data(key)).tolist()).spawn(2)
        images = np.random.default_rng(pixels).standard_normal(self.images(batch, size).shape, np.float32)
        return self.apply, draw(self.shapes(), weights, self.variance), jnp.asarray(images)


def flax_model(name: str, module: Any, parameters: int, **sizes: Any) -> Model:
    """A `Model` of an NHWC (with a depth: NDHWC) `flax.linen` module."""

    def apply(params: Params, images: jax.Array) -> jax.Array:
        return module.apply(params, images)

    def train_apply(params: Params, images: jax.Array) -> tuple[jax.Array, Params]:
        return module.apply(params, images, mutable=["batch_stats"])

    def shapes() -> Params:
        return jax.eval_shape(module.init, jax.random.key(0), model.images(1, model.size))

    order = "NDHWC" if "depth" in sizes else "NHWC"
    model = Model(
        name=name, order=order, parameters=parameters, apply=apply, train_apply=train_apply, shapes=shapes, **sizes
    )
    return model


def draw(shapes: Params, seed: np.random.SeedSequence, variance: float = 1.0) -> Params:
    """Random parameters: weights as He et al. (arXiv:1502.01852) initialise them, the rest by its name."""
    rng = np.random.default_rng(seed)
    return jax.tree.map_with_path(lambda path, leaf: jnp.asarray(_draw(rng, role(path), leaf, variance)), shapes)


def role(path: tuple[Any, ...]) -> str:
    """The last part of a leaf's name: `kernel` of `['conv']['kernel']`, `weight` of `['conv.weight']`."""
    return path[-1].key.rsplit(".", 1)[-1]


def _draw(rng: np.random.Generator, role: str, leaf: jax.ShapeDtypeStruct, variance: float) -> np.ndarray:
    def normal(deviation: float) -> np.ndarray:
        return np.float32(deviation) * rng.standard_normal(leaf.shape, np.float32)

    match role:
        case "kernel":  # flax: (..., in, out)
            return normal(sqrt(2 / prod(leaf.shape[:-1])))
        case "weight" if leaf.ndim > 1:  # PyTorch: (out, in, ...)
            return normal(sqrt(2 / prod(leaf.shape[1:])))
        case "scale" | "weight":  # of a normalisation
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        case "var" | "running_var":
            return rng.uniform(variance, 2 * variance, leaf.shape).astype(np.float32)
        case "bias" | "mean" | "running_mean" | "gamma":
            return normal(0.1)
    raise ValueError(f"no rule to draw a parameter called {role!r}, of shape {leaf.shape}")


def as_torch(params: Params) -> dict[str, jax.Array]:
    """A flax tree by PyTorch's names and in PyTorch's orders: HWIO to OIHW, (in, out) to (out, in)."""
    renamed = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
    state = {}
    for path, leaf in jax.tree.leaves_with_path(params):
        *scope, last = (part.key for part in path[1:])  # path[0] is 'params' or 'batch_stats'
        if last == "kernel":
            leaf = leaf.transpose(leaf.ndim - 1, leaf.ndim - 2, *range(leaf.ndim - 2))
        state[".".join((*scope, renamed.get(last, last)))] = leaf
    return state
