"""MobileNetV2 1.0 in flax, NHWC: Sandler et al. (arXiv:1801.04381)."""

from __future__ import annotations

import flax.linen as nn
import jax

from bench.models.common import flax_model
from bench.models.resnet import ConvBN

#: expansion, channels out, blocks, stride of the first of them
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """1x1 to `expansion` times the channels, depthwise 3x3, linear 1x1; added to the input if that fits."""

    expansion: int
    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        wide = self.expansion * x.shape[-1]
        y = x
        if self.expansion != 1:
            y = nn.relu6(ConvBN(wide, name="expand")(y))
        y = nn.relu6(ConvBN(wide, 3, self.stride, groups=wide, name="depthwise")(y))
        y = ConvBN(self.features, name="project")(y)
        return x + y if x.shape == y.shape else y


class MobileNetV2(nn.Module):
    """Images (batch, height, width, 3) to logits (batch, classes)."""

    classes: int = 1000

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu6(ConvBN(32, 3, 2, name="stem")(x))
        for stage, (expansion, features, blocks, stride) in enumerate(STAGES):
            for block in range(blocks):
                name = f"stage{stage}_{block}"
                x = InvertedResidual(expansion, features, stride if block == 0 else 1, name=name)(x)
        x = nn.relu6(ConvBN(1280, name="head")(x))
        return nn.Dense(self.classes, name="classifier")(x.mean((1, 2)))


mobilenet_v2 = flax_model("mobilenet_v2", MobileNetV2(), parameters=3_504_872)
