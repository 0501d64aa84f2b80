"""ConvNeXt-Tiny in flax, NHWC: Liu et al. (arXiv:2201.03545)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from bench.models.common import flax_model

#: channels, blocks
STAGES = ((96, 3), (192, 3), (384, 9), (768, 3))


class Block(nn.Module):
    """Depthwise 7x7, LayerNorm, an MLP four times as wide, a scale per channel; added to the input."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        y = nn.Conv(width, (7, 7), padding=3, feature_group_count=width, name="depthwise")(x)
        y = nn.LayerNorm(name="norm")(y)
        y = nn.gelu(nn.Dense(4 * width, name="expand")(y), approximate=False)
        y = nn.Dense(width, name="project")(y)
        return x + y * self.param("gamma", nn.initializers.constant(1e-6), (width,), jnp.float32)


class ConvNeXtTiny(nn.Module):
    """Images (batch, height, width, 3) to logits (batch, classes)."""

    classes: int = 1000

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for stage, (width, blocks) in enumerate(STAGES):
            if stage == 0:
                x = nn.Conv(width, (4, 4), strides=4, padding="VALID", name="stem")(x)
                x = nn.LayerNorm(name="stem_norm")(x)
            else:
                x = nn.LayerNorm(name=f"down{stage}_norm")(x)
                x = nn.Conv(width, (2, 2), strides=2, padding="VALID", name=f"down{stage}")(x)
            for block in range(blocks):
                x = Block(name=f"stage{stage}_{block}")(x)
        x = nn.LayerNorm(name="norm")(x.mean((1, 2)))
        return nn.Dense(self.classes, name="classifier")(x)


convnext_tiny = flax_model("convnext_tiny", ConvNeXtTiny(), parameters=28_589_128)
