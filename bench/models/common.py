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


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A network in inference mode, from images (values about N(0, 1)) to 1000 logits each."""

    name: str
    order: Literal["NHWC", "NCHW"]  # of the images
    parameters: int  # how many are trainable, as published
    apply: Apply
    shapes: Callable[[], Params]  # the parameters, abstractly
    batch: int = 8
    size: int = 224  # of an image's side, in pixels

    def build(self, batch: int, size: int, key: jax.Array) -> tuple[Apply, Params, jax.Array]:
        """The function, its random parameters and a random batch of images: `apply(params, images)`."""
        weights, pixels = np.random.SeedSequence(np.asarray(jax.random.key_data(key)).tolist()).spawn(2)
        shape = (batch, size, size, 3) if self.order == "NHWC" else (batch, 3, size, size)
        images = np.random.default_rng(pixels).standard_normal(shape, np.float32)
        return self.apply, draw(self.shapes(), weights), jnp.asarray(images)


def flax_model(name: str, module: Any, parameters: int) -> Model:
    """A `Model` of an NHWC `flax.linen` module."""

    def apply(params: Params, images: jax.Array) -> jax.Array:
        return module.apply(params, images)

    def shapes() -> Params:
        image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
        return jax.eval_shape(module.init, jax.random.key(0), image)

    return Model(name=name, order="NHWC", parameters=parameters, apply=apply, shapes=shapes)


def draw(shapes: Params, seed: np.random.SeedSequence) -> Params:
    """Random parameters: weights as He et al. (arXiv:1502.01852) initialise them, the rest by its name."""
    rng = np.random.default_rng(seed)
    return jax.tree.map_with_path(lambda path, leaf: jnp.asarray(_draw(rng, role(path), leaf)), shapes)


def role(path: tuple[Any, ...]) -> str:
    """The last part of a leaf's name: `kernel` of `['conv']['kernel']`, `weight` of `['conv.weight']`."""
    return path[-1].key.rsplit(".", 1)[-1]


def _draw(rng: np.random.Generator, role: str, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    def normal(deviation: float) -> np.ndarray:
        return np.float32(deviation) * rng.standard_normal(leaf.shape, np.float32)

    match role:
        case "kernel":  # flax: (..., in, out)
            return normal(sqrt(2 / prod(leaf.shape[:-1])))
        case "weight" if leaf.ndim > 1:  # PyTorch: (out, in, ...)
            return normal(sqrt(2 / prod(leaf.shape[1:])))
        case "scale" | "weight":  # of a normalisation
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        case "var" | "running_var":  # above one, so that the sums over residual blocks do not blow up
            return rng.uniform(1, 2, leaf.shape).astype(np.float32)
        case "bias" | "mean" | "running_mean" | "gamma":
            return normal(0.1)
    raise ValueError(f"no rule to draw a parameter called {role!r}, of shape {leaf.shape}")
