"""EfficientNet-B0 in flax, NHWC: Tan and Le (arXiv:1905.11946), padded symmetrically as in torchvision."""

from __future__ import annotations

import flax.linen as nn
import jax

from bench.models.common import flax_model
from bench.models.resnet import ConvBN

#: expansion, channels out, blocks, stride of the first of them, kernel
STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)


class SqueezeExcite(nn.Module):
    """Scales each channel by what a small MLP makes of all channels' means."""

    squeezed: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.mean((1, 2), keepdims=True)
        y = nn.silu(nn.Conv(self.squeezed, (1, 1), name="squeeze")(y))
        return x * nn.sigmoid(nn.Conv(x.shape[-1], (1, 1), name="excite")(y))


class MBConv(nn.Module):
    """1x1 to `expansion` times the channels, depthwise, squeeze-and-excite, linear 1x1; added to x if that fits."""

    expansion: int
    features: int
    stride: int
    kernel: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        wide = self.expansion * x.shape[-1]
        y = x
        if self.expansion != 1:
            y = nn.silu(ConvBN(wide, name="expand")(y))
        y = nn.silu(ConvBN(wide, self.kernel, self.stride, groups=wide, name="depthwise")(y))
        y = SqueezeExcite(x.shape[-1] // 4, name="se")(y)
        y = ConvBN(self.features, name="project")(y)
        return x + y if x.shape == y.shape else y


class EfficientNetB0(nn.Module):
    """Images (batch, height, width, 3) to logits (batch, classes)."""

    classes: int = 1000

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.silu(ConvBN(32, 3, 2, name="stem")(x))
        for stage, (expansion, features, blocks, stride, kernel) in enumerate(STAGES):
            for block in range(blocks):
                name = f"stage{stage}_{block}"
                x = MBConv(expansion, features, stride if block == 0 else 1, kernel, name=name)(x)
        x = nn.silu(ConvBN(1280, name="head")(x))
        return nn.Dense(self.classes, name="classifier")(x.mean((1, 2)))


efficientnet_b0 = flax_model("efficientnet_b0", EfficientNetB0(), parameters=5_288_548, variance=0.56)
