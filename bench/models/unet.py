"""The 3-D U-Net in flax, NDHWC: Çiçek et al. (arXiv:1606.06650), padded, so that volumes keep their size.

As its published number of parameters has it: biases in the convolutions but not in the transposed ones, and a batch
norm without scale and shift.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from bench.models.common import flax_model

#: channels of the two convolutions of each level, on the way down
LEVELS = ((32, 64), (64, 128), (128, 256), (256, 512))


class ConvBNReLU(nn.Module):
    """3x3x3, batch norm as in `resnet.ConvBN`, relu."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(self.features, (3, 3, 3), padding=1, name="conv")(x)
        stored = not self.is_mutable_collection("batch_stats")
        return nn.relu(nn.BatchNorm(use_running_average=stored, use_scale=False, use_bias=False, name="bn")(x))


class UNet3D(nn.Module):
    """Volumes (batch, depth, height, width, channels) to as many logits (..., classes); sides in eighths."""

    classes: int = 3

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        skipped = []
        for level, widths in enumerate(LEVELS):
            if level > 0:
                skipped.append(x)
                x = nn.max_pool(x, (2, 2, 2), (2, 2, 2))
            for n, width in enumerate(widths):
                x = ConvBNReLU(width, name=f"down{level}_{n}")(x)
        for level in reversed(range(len(skipped))):
            x = nn.ConvTranspose(x.shape[-1], (2, 2, 2), strides=(2, 2, 2), use_bias=False, name=f"up{level}")(x)
            x = jnp.concatenate((skipped[level], x), axis=-1)
            for n in range(2):
                x = ConvBNReLU(LEVELS[level][1], name=f"up{level}_{n}")(x)
        return nn.Conv(self.classes, (1, 1, 1), name="classifier")(x)


unet3d = flax_model("unet3d", UNet3D(), parameters=19_069_955, batch=1, size=48, depth=24)
