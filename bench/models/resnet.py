"""ResNet-50 v1.5 in flax, NHWC: He et al. (arXiv:1512.03385), the stride in the 3x3 as in torchvision."""

from __future__ import annotations

import flax.linen as nn
import jax

from bench.models.common import flax_model

#: width of the bottleneck, blocks, stride of the first of them
STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))


class ConvBN(nn.Module):
    """A convolution without bias, padded to keep the size at stride 1; batch norm, by stored statistics
    or, where those may be changed, by the batch's."""

    features: int
    kernel: int = 1
    stride: int = 1
    groups: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(
            self.features,
            kernel_size=(self.kernel, self.kernel),
            strides=self.stride,
            padding=self.kernel // 2,
            feature_group_count=self.groups,
            use_bias=False,
            name="conv",
        )(x)
        return nn.BatchNorm(use_running_average=not self.is_mutable_collection("batch_stats"), name="bn")(x)


class Bottleneck(nn.Module):
    """1x1 to `width`, 3x3, 1x1 to four times `width`; added to the input, projected if shapes differ."""

    width: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.relu(ConvBN(self.width, name="reduce")(x))
        y = nn.relu(ConvBN(self.width, 3, self.stride, name="spatial")(y))
        y = ConvBN(4 * self.width, name="expand")(y)
        if x.shape != y.shape:
            x = ConvBN(4 * self.width, 1, self.stride, name="shortcut")(x)
        return nn.relu(x + y)


class ResNet50(nn.Module):
    """Images (batch, height, width, 3) to logits (batch, classes)."""

    classes: int = 1000

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(ConvBN(64, 7, 2, name="stem")(x))
        x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))  # pyright: ignore[reportArgumentType]
        for stage, (width, blocks, stride) in enumerate(STAGES):
            for block in range(blocks):
                x = Bottleneck(width, stride if block == 0 else 1, name=f"stage{stage}_{block}")(x)
        return nn.Dense(self.classes, name="classifier")(x.mean((1, 2)))


resnet50 = flax_model("resnet50", ResNet50(), parameters=25_557_032)
