"""Networks from packages that are installed: Keras on JAX, Haiku, flaxmodels, jax-resnet, and two written with
Equinox. Each builder imports its package when it is called; weights are drawn here, nothing is downloaded.

A builder gives a function and its arguments: `(weights, x)` for inference, `(weights, state, x)` for the mean square of
what the network gives in training, and its gradients with respect to the weights.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from math import prod, sqrt
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

os.environ["KERAS_BACKEND"] = "jax"  # read where Keras is imported

Program = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function and its arguments."""

_rng = np.random.default_rng(0)


def drawn(name: str, leaf: Any, out: int = -1) -> jax.Array:
    """Random values of a parameter by its name, so that signals neither fade nor blow up. `out`: the axis of a kernel
    that counts the features it gives (not their number for each feature taken: a depthwise one is (..., 1, features)).
    """
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return jnp.zeros(leaf.shape, leaf.dtype)
    name = name.lower()
    if prod(leaf.shape) == max((1, *leaf.shape)):  # a vector, whatever its rank
        if "var" in name:
            values = _rng.uniform(1.0, 2.0, leaf.shape)
        elif any(word in name for word in ("scale", "gamma", ".weight")):
            values = _rng.uniform(0.5, 1.5, leaf.shape)
        else:
            values = 0.1 * _rng.standard_normal(leaf.shape)
        return jnp.asarray(values, leaf.dtype)
    terms = prod(leaf.shape) / leaf.shape[out]
    return jnp.asarray(sqrt(2 / terms) * _rng.standard_normal(leaf.shape), leaf.dtype)


def drawn_tree(shapes: Any, out: int = -1) -> Any:
    """`drawn` for each leaf of a tree."""
    return jax.tree.map_with_path(lambda path, leaf: drawn(jax.tree_util.keystr(path), leaf, out), shapes)


def mean_square(out: Any) -> jax.Array:
    """Of all elements of all results, each array's for itself, summed up."""
    return sum((jnp.square(x).mean() for x in jax.tree.leaves(out)), start=jnp.zeros(()))


def graded(apply: Callable[[Any, Any, Any], Any]) -> Callable[..., Any]:
    """Loss and gradients with respect to the weights of what gives results of (weights, state, x)."""

    def loss(weights: Any, state: Any, x: Any) -> jax.Array:
        return mean_square(apply(weights, state, x))

    return jax.value_and_grad(loss)


def flax_program(module: Any, x: jax.Array, gradient: bool = False, **keywords: Any) -> Program:
    """Of a `flax.linen` module whose weights are drawn; keywords are its call's."""
    variables = drawn_tree(jax.eval_shape(lambda x: module.init(jax.random.key(0), x, **keywords), x))
    if not gradient:
        return lambda variables, x: module.apply(variables, x, **keywords), (variables, x)

    def apply(params: Any, state: Any, x: Any) -> Any:
        return module.apply({"params": params, **state}, x, mutable=list(state), **keywords)[0]

    params = variables.pop("params")
    return graded(apply), (params, variables, x)


def keras_program(name: str, x: jax.Array, gradient: bool = False, **keywords: Any) -> Program:
    """A network of `keras.applications`."""
    import keras

    build = getattr(keras.applications, name)
    model = build(weights=None, input_shape=x.shape[1:], classifier_activation=None, **keywords)

    def values(variables: Any) -> list[jax.Array]:
        # A depthwise kernel is (height, width, features, 1) here.
        def value(v: Any) -> jax.Array:
            if not jnp.issubdtype(v.value.dtype, jnp.floating):
                return v.value  # a random number generator's
            return drawn(v.path, v.value, 2 if len(v.shape) == 4 and v.shape[-1] == 1 else -1)

        return [value(v) for v in variables]

    weights, state = values(model.trainable_variables), values(model.non_trainable_variables)
    if gradient:
        return graded(lambda w, s, x: model.stateless_call(w, s, x, training=True)[0]), (weights, state, x)

    def apply(variables: Any, x: Any) -> Any:
        return model.stateless_call(*variables, x, training=False)[0]

    return apply, ((weights, state), x)


def haiku_program(name: str, x: jax.Array, gradient: bool = False) -> Program:
    """A network of `haiku.nets`."""
    import haiku as hk

    def forward(x: jax.Array, training: bool) -> jax.Array:
        return getattr(hk.nets, name)(num_classes=1000)(x, is_training=training)

    net = hk.without_apply_rng(hk.transform_with_state(forward))
    # Only training makes the state.
    weights, state = drawn_tree(jax.eval_shape(lambda x: net.init(jax.random.key(0), x, True), x))
    if gradient:
        return graded(lambda weights, state, x: net.apply(weights, state, x, True)[0]), (weights, state, x)
    return lambda variables, x: net.apply(*variables, x, False)[0], ((weights, state), x)


def flaxmodels_program(name: str, x: jax.Array, gradient: bool = False) -> Program:
    """A network of `flaxmodels`; a VGG without its head, whose weights are most of a gigabyte."""
    import flaxmodels

    told = {"include_head": False} if name.startswith("VGG") else {}
    module = getattr(flaxmodels, name)(output="logits", pretrained=None, **told)
    return flax_program(module, x, gradient, train=gradient)


def jax_resnet_program(name: str, x: jax.Array, gradient: bool = False) -> Program:
    """A network of `jax_resnet`."""
    import jax_resnet

    return flax_program(getattr(jax_resnet, name)(n_classes=1000), x, gradient)


BUILDERS: dict[str, Callable[..., Program]] = {
    "keras": keras_program,
    "haiku": haiku_program,
    "flaxmodels": flaxmodels_program,
    "jax_resnet": jax_resnet_program,
}
"""Of a network of images, by the module that it comes from: (name, images, gradient)."""


def equinox_program(build: Callable[[Any], Any], x: jax.Array, gradient: bool = False) -> Program:
    """Of an Equinox module of one example, under `vmap`."""
    import equinox as eqx

    # Traced, so that its own initialisation costs nothing.
    model = eqx.filter_eval_shape(build, jax.random.key(0))
    shapes, rest = eqx.partition(model, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    weights = drawn_tree(shapes, out=0)

    def apply(weights: Any, x: Any) -> Any:
        return jax.vmap(eqx.combine(weights, rest))(x)

    if gradient:
        return graded(lambda weights, state, x: apply(weights, x)), (weights, (), x)
    return apply, (weights, x)


def equinox_unet(width: int = 32, levels: int = 3) -> Callable[[Any], Any]:
    """A U-Net with group norm, (3, height, width) to (1, height, width)."""
    import equinox as eqx

    class Block(eqx.Module):
        convs: list[Any]
        norms: list[Any]

        def __init__(self, features: int, width: int, key: Any):
            first, second = jax.random.split(key)
            self.convs = [
                eqx.nn.Conv2d(features, width, 3, padding=1, key=first),
                eqx.nn.Conv2d(width, width, 3, padding=1, key=second),
            ]
            self.norms = [eqx.nn.GroupNorm(8, width), eqx.nn.GroupNorm(8, width)]

        def __call__(self, x: Any) -> Any:
            for conv, norm in zip(self.convs, self.norms, strict=True):
                x = jax.nn.relu(norm(conv(x)))
            return x

    class UNet(eqx.Module):
        down: list[Any]
        enlarge: list[Any]
        up: list[Any]
        pool: Any
        head: Any

        def __init__(self, key: Any):
            keys = iter(jax.random.split(key, 4 * levels))
            widths = [width * 2**level for level in range(levels)]
            self.down = [Block(i, o, next(keys)) for i, o in zip([3, *widths], widths, strict=False)]
            pairs = [(widths[n + 1], widths[n]) for n in reversed(range(levels - 1))]
            self.enlarge = [eqx.nn.ConvTranspose2d(i, o, 2, stride=2, key=next(keys)) for i, o in pairs]
            self.up = [Block(2 * o, o, next(keys)) for _, o in pairs]
            self.pool = eqx.nn.MaxPool2d(2, 2)
            self.head = eqx.nn.Conv2d(width, 1, 1, key=next(keys))

        def __call__(self, x: Any) -> Any:
            skipped = []
            for level, block in enumerate(self.down):
                if level:
                    skipped.append(x)
                    x = self.pool(x)
                x = block(x)
            for enlarge, block in zip(self.enlarge, self.up, strict=True):
                x = block(jnp.concatenate((skipped.pop(), enlarge(x))))
            return self.head(x)

    return UNet


def equinox_vocoder(
    width: int = 128, rates: tuple[int, ...] = (8, 8, 2), kernels: tuple[int, ...] = (3, 7)
) -> Callable[[Any], Any]:
    """The generator of HiFi-GAN (arXiv:2010.05646), a quarter as wide: (80, frames) to (1, 128 frames) of sound."""
    import equinox as eqx

    class Residual(eqx.Module):
        dilated: list[Any]
        plain: list[Any]

        def __init__(self, width: int, kernel: int, key: Any):
            keys = iter(jax.random.split(key, 6))
            self.dilated = [
                eqx.nn.Conv1d(width, width, kernel, padding=rate * (kernel // 2), dilation=rate, key=next(keys))
                for rate in (1, 3, 5)
            ]
            self.plain = [eqx.nn.Conv1d(width, width, kernel, padding=kernel // 2, key=next(keys)) for _ in range(3)]

        def __call__(self, x: Any) -> Any:
            for dilated, plain in zip(self.dilated, self.plain, strict=True):
                y = dilated(jax.nn.leaky_relu(x, 0.1))
                x = x + 0.3 * plain(jax.nn.leaky_relu(y, 0.1))
            return x

    class Vocoder(eqx.Module):
        stem: Any
        enlarge: list[Any]
        blocks: list[list[Any]]
        head: Any

        def __init__(self, key: Any):
            keys = iter(jax.random.split(key, 2 + len(rates) * (1 + len(kernels))))
            widths = [width // 2**n for n in range(len(rates) + 1)]
            self.stem = eqx.nn.Conv1d(80, width, 7, padding=3, key=next(keys))
            self.enlarge = [
                eqx.nn.ConvTranspose1d(widths[n], widths[n + 1], 2 * r, stride=r, padding=r // 2, key=next(keys))
                for n, r in enumerate(rates)
            ]
            self.blocks = [[Residual(w, k, next(keys)) for k in kernels] for w in widths[1:]]
            self.head = eqx.nn.Conv1d(widths[-1], 1, 7, padding=3, key=next(keys))

        def __call__(self, x: Any) -> Any:
            x = self.stem(x)
            for enlarge, blocks in zip(self.enlarge, self.blocks, strict=True):
                x = enlarge(jax.nn.leaky_relu(x, 0.1))
                x = sum(block(x) for block in blocks) / len(blocks)
            return jnp.tanh(self.head(jax.nn.leaky_relu(x)))

    return Vocoder
