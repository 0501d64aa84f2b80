"""Networks of the literature as their users write them in flax, narrower or shallower where said: for `bench.corpus`.

Images are NHWC and sequences NWC, the orders of flax. Batch norm by stored statistics, or where those may be changed,
by the batch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import flax.linen as nn
import jax
import jax.numpy as jnp

from bench.models.resnet import ConvBN


class DCGAN(nn.Module):
    """The generator of Radford et al. (arXiv:1511.06434), half as wide: (batch, 1, 1, 100) to images of 64x64."""

    widths: Sequence[int] = (512, 256, 128, 64)

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        stored = not self.is_mutable_collection("batch_stats")
        x = z
        for n, width in enumerate(self.widths):
            strides, padding = ((2, 2), "SAME") if n else ((1, 1), "VALID")
            x = nn.ConvTranspose(width, (4, 4), strides, padding, use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=stored)(x))
        return jnp.tanh(nn.ConvTranspose(3, (4, 4), (2, 2), "SAME")(x))


class DeepLab(nn.Module):
    """Dilated convolutions side by side (ASPP), after Chen et al. (arXiv:1706.05587), on a short trunk of stride 8."""

    classes: int = 21

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = images
        for width in (32, 64, 128):
            x = nn.relu(ConvBN(width, 3, 2)(x))
            x = nn.relu(x + ConvBN(width, 3)(x))
        size = x.shape[1:3]
        seen = [ConvBN(64)(x)]
        for rate in (6, 12, 18):
            y = nn.Conv(64, (3, 3), kernel_dilation=(rate, rate), use_bias=False)(x)
            seen.append(nn.BatchNorm(use_running_average=not self.is_mutable_collection("batch_stats"))(y))
        pooled = ConvBN(64)(x.mean((1, 2), keepdims=True))
        seen.append(jnp.broadcast_to(pooled, (len(x), *size, 64)))
        x = nn.relu(ConvBN(64)(nn.relu(jnp.concatenate(seen, -1))))
        x = nn.Conv(self.classes, (1, 1))(x)
        return jax.image.resize(x, (*images.shape[:3], self.classes), "bilinear")


class Glow(nn.Module):
    """A normalising flow of Kingma and Dhariwal (arXiv:1807.03039): latents and the logarithm of the determinant."""

    levels: int = 3
    depth: int = 4
    width: int = 128

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        latents, total = [], jnp.zeros(len(x))
        for level in range(self.levels):
            batch, height, width, features = x.shape
            x = x.reshape(batch, height // 2, 2, width // 2, 2, features).transpose(0, 1, 3, 5, 2, 4)
            x = x.reshape(batch, height // 2, width // 2, 4 * features)
            for _ in range(self.depth):
                x, determinant = Step(self.width)(x)
                total = total + determinant
            if level + 1 < self.levels:
                x, split = jnp.split(x, 2, axis=-1)
                latents.append(split)
        return [*latents, x], total


class Step(nn.Module):
    """One step of the flow: a norm by stored numbers, a 1x1 that can be inverted, an affine coupling."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        features, positions = x.shape[-1], x.shape[1] * x.shape[2]
        scale = self.param("scale", nn.initializers.ones, (features,))
        x = x * scale + self.param("bias", nn.initializers.zeros, (features,))
        kernel = self.param("kernel", nn.initializers.orthogonal(), (1, 1, features, features))
        x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        first, second = jnp.split(x, 2, axis=-1)
        y = nn.relu(nn.Conv(self.width, (3, 3))(first))
        y = nn.relu(nn.Conv(self.width, (1, 1))(y))
        shift, factor = jnp.split(nn.Conv(features, (3, 3))(y), 2, axis=-1)
        factor = nn.sigmoid(factor + 2.0)
        determinant = positions * jnp.log(jnp.abs(scale)).sum() + jnp.log(factor).sum((1, 2, 3))
        return jnp.concatenate((first, (second + shift) * factor), -1), determinant


class SqueezeNet(nn.Module):
    """Version 1.1 of Iandola et al. (arXiv:1602.07360)."""

    classes: int = 1000

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(64, (3, 3), 2)(x))
        for n, squeezed in enumerate((16, 16, 32, 32, 48, 48, 64, 64)):
            if n in (0, 2, 4):
                x = nn.max_pool(x, (3, 3), (2, 2))
            x = nn.relu(nn.Conv(squeezed, (1, 1))(x))
            sides = nn.Conv(4 * squeezed, (1, 1))(x), nn.Conv(4 * squeezed, (3, 3))(x)
            x = nn.relu(jnp.concatenate(sides, -1))
        return nn.relu(nn.Conv(self.classes, (1, 1))(x)).mean((1, 2))


class ShuffleNet(nn.Module):
    """Grouped 1x1 convolutions and a shuffle of the features: Zhang et al. (arXiv:1707.01083), three groups."""

    groups: int = 3
    classes: int = 1000

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(ConvBN(24, 3, 2)(x))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for width, blocks in ((240, 4), (480, 8), (960, 4)):
            for block in range(blocks):
                x = self.unit(x, width, 1 if block else 2)
        return nn.Dense(self.classes)(x.mean((1, 2)))

    def unit(self, x: jax.Array, width: int, stride: int) -> jax.Array:
        features = width - x.shape[-1] * (stride == 2)
        squeezed = width // 4
        y = nn.relu(ConvBN(squeezed, groups=1 if x.shape[-1] == 24 else self.groups)(x))
        split = (*y.shape[:-1], self.groups, squeezed // self.groups)
        y = y.reshape(split).swapaxes(-1, -2).reshape(y.shape)
        y = ConvBN(squeezed, 3, stride, groups=squeezed)(y)
        y = ConvBN(features, groups=self.groups)(y)
        if stride == 1:
            return nn.relu(x + y)
        return nn.relu(jnp.concatenate((nn.avg_pool(x, (3, 3), (2, 2), "SAME"), y), -1))


class EDSR(nn.Module):
    """Twice the resolution by a pixel shuffle: Lim et al. (arXiv:1707.02921), half its 16 blocks."""

    blocks: int = 8
    width: int = 64

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = first = nn.Conv(self.width, (3, 3))(images)
        for _ in range(self.blocks):
            y = nn.relu(nn.Conv(self.width, (3, 3))(x))
            x = x + 0.1 * nn.Conv(self.width, (3, 3))(y)
        x = first + nn.Conv(self.width, (3, 3))(x)
        return nn.Conv(3, (3, 3))(pixel_shuffle(nn.Conv(4 * self.width, (3, 3))(x), 2))


class FSRCNN(nn.Module):
    """Twice the resolution by a transposed 9x9: Dong et al. (arXiv:1608.00367)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.PReLU()(nn.Conv(56, (5, 5))(x))
        x = nn.PReLU()(nn.Conv(12, (1, 1))(x))
        for _ in range(4):
            x = nn.PReLU()(nn.Conv(12, (3, 3))(x))
        x = nn.PReLU()(nn.Conv(56, (1, 1))(x))
        return nn.ConvTranspose(1, (9, 9), strides=(2, 2))(x)


def pixel_shuffle(x: jax.Array, by: int) -> jax.Array:
    """Features to positions: (batch, height, width, by * by * features) to (..., by * height, by * width, features)."""
    batch, height, width, features = x.shape
    x = x.reshape(batch, height, width, by, by, features // by**2).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, by * height, by * width, -1)


class WaveNet(nn.Module):
    """Gated, dilated, causal convolutions: van den Oord et al. (arXiv:1609.03499)."""

    width: int = 64
    stacks: int = 2
    layers: int = 8

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(self.width, (2,), padding="CAUSAL")(x)
        skipped = jnp.zeros(())
        for layer in range(self.stacks * self.layers):
            rate = 2 ** (layer % self.layers)
            y = nn.Conv(2 * self.width, (2,), kernel_dilation=(rate,), padding="CAUSAL")(x)
            gate, y = jnp.split(y, 2, axis=-1)
            y = nn.sigmoid(gate) * jnp.tanh(y)
            skipped = skipped + nn.Conv(self.width, (1,))(y)
            x = x + nn.Conv(self.width, (1,))(y)
        return nn.Conv(256, (1,))(nn.relu(nn.Conv(self.width, (1,))(nn.relu(skipped))))


class QuartzNet(nn.Module):
    """Separable convolutions along time, of long kernels: Kriman et al. (arXiv:1910.10261), a block of each kind."""

    labels: int = 29

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(self.separable(x, 256, 33, 2))
        for width, kernel in ((256, 33), (256, 39), (512, 51), (512, 63)):
            shortcut = self.norm(nn.Conv(width, (1,), use_bias=False)(x))
            for n in range(3):
                x = self.separable(x, width, kernel)
                x = nn.relu(x if n < 2 else x + shortcut)
        return nn.Conv(self.labels, (1,))(x)

    def norm(self, x: jax.Array) -> jax.Array:
        return nn.BatchNorm(use_running_average=not self.is_mutable_collection("batch_stats"))(x)

    def separable(self, x: jax.Array, width: int, kernel: int, stride: int = 1) -> jax.Array:
        features = x.shape[-1]
        x = nn.Conv(features, (kernel,), stride, feature_group_count=features, use_bias=False)(x)
        return self.norm(nn.Conv(width, (1,), use_bias=False)(x))


class ConvTasNet(nn.Module):
    """Separates two speakers: Luo and Mesgarani (arXiv:1809.07454), a learned transform there and back, and between
    them depthwise dilated convolutions; half as wide and two of three repeats of six of eight blocks."""

    filters: int = 256
    width: int = 64
    repeats: int = 2
    blocks: int = 6

    @nn.compact
    def __call__(self, samples: jax.Array) -> jax.Array:
        seen = nn.relu(nn.Conv(self.filters, (16,), 8, padding=4)(samples))
        x = nn.Conv(self.width, (1,))(nn.LayerNorm()(seen))
        for _ in range(self.repeats):
            for block in range(self.blocks):
                wide = 4 * self.width
                y = nn.GroupNorm(1)(nn.relu(nn.Conv(wide, (1,))(x)))
                y = nn.Conv(wide, (3,), kernel_dilation=(2**block,), feature_group_count=wide)(y)
                x = x + nn.Conv(self.width, (1,))(nn.GroupNorm(1)(nn.relu(y)))
        masks = nn.sigmoid(nn.Conv(2 * self.filters, (1,))(nn.relu(x)))
        masked = masks.reshape(*seen.shape[:2], 2, self.filters) * seen[:, :, None]
        turned = masked.transpose(2, 0, 1, 3).reshape(-1, *seen.shape[1:])
        return nn.ConvTranspose(1, (16,), (8,))(turned).reshape(2, len(samples), -1)


class DDPM(nn.Module):
    """The U-Net of a diffusion model: Ho et al. (arXiv:2006.11239), half as wide, one block to a level, attention in
    the middle."""

    widths: Sequence[int] = (64, 128, 128)

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = nn.Conv(self.widths[0], (3, 3))(images)
        skipped = [x]
        for level, width in enumerate(self.widths):
            if level:
                x = nn.Conv(width, (3, 3), 2)(x)
                skipped.append(x)
            x = self.block(x, width)
            skipped.append(x)
        width = self.widths[-1]
        x = self.block(x, width)
        batch, *sides, _ = x.shape
        tokens = nn.GroupNorm(16)(x).reshape(batch, -1, width)
        x = x + nn.MultiHeadDotProductAttention(4)(tokens).reshape(batch, *sides, width)
        x = self.block(x, width)
        for below, width in reversed(list(pairwise((0, *self.widths)))):
            x = self.block(jnp.concatenate((x, skipped.pop()), -1), width)
            x = self.block(jnp.concatenate((x, skipped.pop()), -1), width)
            if below:
                batch, *sides, _ = x.shape
                x = jax.image.resize(x, (batch, 2 * sides[0], 2 * sides[1], width), "nearest")
                x = nn.Conv(width, (3, 3))(x)
        return nn.Conv(3, (3, 3))(nn.silu(nn.GroupNorm(16)(x)))

    def block(self, x: jax.Array, width: int) -> jax.Array:
        y = nn.Conv(width, (3, 3))(nn.silu(nn.GroupNorm(16)(x)))
        y = nn.Conv(width, (3, 3))(nn.silu(nn.GroupNorm(16)(y)))
        return y + (x if x.shape == y.shape else nn.Conv(width, (1, 1))(x))


class ViT(nn.Module):
    """A vision transformer, Dosovitskiy et al. (arXiv:2010.11929), two blocks: its one convolution cuts patches."""

    width: int = 192
    patch: int = 16
    blocks: int = 2

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = nn.Conv(self.width, (self.patch, self.patch), self.patch, "VALID")(images)
        x = x.reshape(len(x), -1, self.width)
        for _ in range(self.blocks):
            x = x + nn.MultiHeadDotProductAttention(3)(nn.LayerNorm()(x))
            y = nn.Dense(4 * self.width)(nn.LayerNorm()(x))
            x = x + nn.Dense(self.width)(nn.gelu(y))
        return nn.Dense(1000)(x.mean(1))


class LeNet(nn.Module):
    """LeCun et al., 1998, with max pooling: convolutions too small for anything to matter but starting them."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in (6, 16):
            x = nn.max_pool(nn.tanh(nn.Conv(width, (5, 5), padding="VALID")(x)), (2, 2), (2, 2))
        x = x.reshape(len(x), -1)
        for width in (120, 84):
            x = nn.tanh(nn.Dense(width)(x))
        return nn.Dense(10)(x)
