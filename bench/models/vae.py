"""A video decoder after Wan's VAE (arXiv:2503.20314), in flax, NDHWC: a quarter of its channels, no attention.

Latents of t frames become 4 (t - 1) + 1 frames of eight times the side: three stages enlarge the frames, by nearest
neighbours and a 2-D convolution each, and the first two of them also double their number, but for the first frame.
No frame sees a later one.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from bench.models.common import flax_model

LATENT = 16
#: channels of the residual blocks, frames after them: "double" them in number and side, "enlarge" the side alone
STAGES = ((96, "double"), (96, "double"), (48, "enlarge"), (24, None))
BLOCKS = 3  # of each stage


def causal_conv(features: int, name: str, kernel: tuple[int, int, int] = (3, 3, 3)) -> nn.Conv:
    """A 3-D convolution that keeps the size, padded in time by what was before."""
    frames, *sides = kernel
    return nn.Conv(features, kernel, padding=((frames - 1, 0), *((k // 2, k // 2) for k in sides)), name=name)


class Residual(nn.Module):
    """Twice RMS norm, silu and a causal 3x3x3; added to the input, projected if the channels differ."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = causal_conv(self.features, "conv0")(nn.silu(nn.RMSNorm(name="norm0")(x)))
        y = causal_conv(self.features, "conv1")(nn.silu(nn.RMSNorm(name="norm1")(y)))
        if x.shape != y.shape:
            x = causal_conv(self.features, "shortcut", (1, 1, 1))(x)
        return x + y


class Upsample(nn.Module):
    """Frames of twice the side and half the channels; with `double` 2 t - 1 of them instead of t."""

    double: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, frames, height, width, channels = x.shape
        if self.double:
            y = causal_conv(2 * channels, "time", (3, 1, 1))(x)
            y = y.reshape(batch, frames, height, width, 2, channels).transpose(0, 1, 4, 2, 3, 5)
            x = y.reshape(batch, 2 * frames, height, width, channels)[:, 1:]
        x = x.reshape(-1, height, width, channels)
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        x = nn.Conv(channels // 2, (3, 3), padding=1, name="space")(x)
        return x.reshape(batch, -1, 2 * height, 2 * width, channels // 2)


class VAE3DDecoder(nn.Module):
    """Latents (batch, t, height, width, 16) to a video (batch, 4 t - 3, 8 height, 8 width, 3)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = causal_conv(STAGES[0][0], "stem")(x)
        for n in range(2):
            x = Residual(STAGES[0][0], name=f"middle{n}")(x)
        for stage, (width, then) in enumerate(STAGES):
            for block in range(BLOCKS):
                x = Residual(width, name=f"stage{stage}_{block}")(x)
            if then is not None:
                x = Upsample(then == "double", name=f"up{stage}")(x)
        return causal_conv(3, "head")(nn.silu(nn.RMSNorm(name="norm")(x)))


vae3d_decoder = flax_model(
    "vae3d_decoder", VAE3DDecoder(), parameters=4_579_995, batch=1, size=16, depth=4, channels=LATENT
)
