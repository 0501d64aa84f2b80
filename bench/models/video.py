"""The decoder of a causal video VAE in plain `jax.lax`, NCDHW: what a port of PyTorch code looks like.

Group norm in float32, silu, 3x3x3 convolutions after an explicit padding, in time by what was before; nearest
neighbours and a convolution enlarge, the first two times the number of frames as well, but for the first. The form is
that of HunyuanVideo's decoder (arXiv:2412.03603), the 48 features of the latents are Wan 2.2's; the widths are a
sixteenth, and the latents (1, 48, 3, 9, 15) instead of (1, 48, 7, 34, 60): a second's work for two cores.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bench.models.common import draw

LATENT = (1, 48, 3, 9, 15)
SMALL_LATENT = (1, 8, 2, 3, 4)
#: features of the residual blocks, frames after them: "double" them in number and side, "enlarge" the side alone
STAGES = ((64, "double"), (64, "double"), (32, "enlarge"), (16, None))
BLOCKS = 2  # of each stage
GROUPS = 8
EPSILON = 1e-6

Params = dict[str, jax.Array]


def causal_conv(p: Params, name: str, x: jax.Array) -> jax.Array:
    """Keeps the size; no frame sees a later one."""
    w = p[f"{name}.weight"]
    frames, *sides = w.shape[2:]
    padded = jnp.pad(x, ((0, 0), (0, 0), (frames - 1, 0), *((k // 2, k // 2) for k in sides)))
    y = lax.conv_general_dilated(padded, w, (1, 1, 1), "VALID", dimension_numbers=("NCDHW", "OIDHW", "NCDHW"))
    return y + p[f"{name}.bias"][:, None, None, None]


def norm_silu(p: Params, name: str, x: jax.Array) -> jax.Array:
    """Group norm and silu, in float32 whatever the rest is in."""
    y = x.astype(jnp.float32).reshape(x.shape[0], GROUPS, -1, *x.shape[2:])
    mean, var = y.mean((2, 3, 4, 5), keepdims=True), y.var((2, 3, 4, 5), keepdims=True)
    y = ((y - mean) * lax.rsqrt(var + EPSILON)).reshape(x.shape)
    scale, shift = (p[f"{name}.{leaf}"].astype(jnp.float32)[:, None, None, None] for leaf in ("weight", "bias"))
    return jax.nn.silu(y * scale + shift).astype(x.dtype)


def residual(p: Params, name: str, x: jax.Array) -> jax.Array:
    y = causal_conv(p, f"{name}.conv0", norm_silu(p, f"{name}.norm0", x))
    y = causal_conv(p, f"{name}.conv1", norm_silu(p, f"{name}.norm1", y))
    return y + (causal_conv(p, f"{name}.shortcut", x) if f"{name}.shortcut.weight" in p else x)


def upsample(p: Params, name: str, x: jax.Array, then: str) -> jax.Array:
    if then == "double":
        x = jnp.repeat(x, 2, axis=2)[:, :, 1:]
    return causal_conv(p, name, jnp.repeat(jnp.repeat(x, 2, axis=3), 2, axis=4))


def decode(p: Params, latent: jax.Array) -> jax.Array:
    """Latents (batch, features, t, height, width) to a video (batch, 3, 4 t - 3, 8 height, 8 width)."""
    x = causal_conv(p, "stem", latent)
    for stage, (_, then) in enumerate(STAGES):
        for block in range(BLOCKS):
            x = residual(p, f"stage{stage}_{block}", x)
        if then is not None:
            x = upsample(p, f"up{stage}", x, then)
    return causal_conv(p, "head", norm_silu(p, "norm", x))


def shapes(features: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The parameters for latents of so many features."""

    def conv(name: str, inputs: int, outputs: int, kernel: int = 3) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (outputs, inputs, *(kernel,) * 3)
        yield f"{name}.bias", (outputs,)

    def norm(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (width,)
        yield f"{name}.bias", (width,)

    def every() -> Iterator[tuple[str, tuple[int, ...]]]:
        before = STAGES[0][0]
        yield from conv("stem", features, before)
        for stage, (width, then) in enumerate(STAGES):
            for block in range(BLOCKS):
                name = f"stage{stage}_{block}"
                yield from (*norm(f"{name}.norm0", before), *conv(f"{name}.conv0", before, width))
                yield from (*norm(f"{name}.norm1", width), *conv(f"{name}.conv1", width, width))
                if before != width:
                    yield from conv(f"{name}.shortcut", before, width, 1)
                before = width
            if then is not None:
                yield from conv(f"up{stage}", width, width)
        yield from (*norm("norm", before), *conv("head", before, 3))

    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in every()}


def build(small: bool, dtype: Any = jnp.float32) -> tuple[Params, jax.Array]:
    """Random parameters and latents of a dtype."""
    shape = SMALL_LATENT if small else LATENT
    weights, values = np.random.SeedSequence(0).spawn(2)
    latent = np.random.default_rng(values).standard_normal(shape, np.float32)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), draw(shapes(shape[1]), weights))
    return params, jnp.asarray(latent, dtype)
