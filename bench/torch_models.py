"""The networks of `bench.models` in plain `torch.nn`, channels first, and checks that they are the same.

Layers have the names of their flax counterparts, so that `load` can give a network the same weights. `check` compares
the numbers of parameters and of multiply-adds: it computes nothing, and so costs little at any size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from bench.models import Model, convnext, efficientnet, mobilenet, resnet, unet, vae
from bench.models.common import STATISTICS, Params, as_torch, role
from jaxlayout.convs.signature import ConvSignature
from jaxlayout.graph.program import equations

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def chain(**layers: nn.Module) -> nn.Sequential:
    """Named layers, one after the other."""
    named = nn.Sequential()
    for name, layer in layers.items():
        named.add_module(name, layer)
    return named


def conv_bn(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """As `resnet.ConvBN`."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return chain(conv=conv, bn=nn.BatchNorm2d(outputs))


class Pool(nn.Module):
    """The mean of each channel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))


class Bottleneck(nn.Module):
    """As `resnet.Bottleneck`."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.reduce = conv_bn(inputs, width)
        self.spatial = conv_bn(width, width, 3, stride)
        self.expand = conv_bn(width, 4 * width)
        if inputs != 4 * width or stride > 1:
            self.shortcut = conv_bn(inputs, 4 * width, 1, stride)
        else:
            self.shortcut = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.spatial(F.relu(self.reduce(x))))
        return F.relu(self.expand(y) + self.shortcut(x))


def resnet50() -> nn.Module:
    """As `resnet.ResNet50`."""
    layers: dict[str, nn.Module] = {"stem": conv_bn(3, 64, 7, 2), "relu": nn.ReLU(), "max_pool": nn.MaxPool2d(3, 2, 1)}
    channels = 64
    for stage, (width, blocks, stride) in enumerate(resnet.STAGES):
        for block in range(blocks):
            layers[f"stage{stage}_{block}"] = Bottleneck(channels, width, stride if block == 0 else 1)
            channels = 4 * width
    return chain(**layers, pool=Pool(), classifier=nn.Linear(channels, 1000))


class SqueezeExcite(nn.Module):
    """As `efficientnet.SqueezeExcite`."""

    def __init__(self, channels: int, squeezed: int):
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.excite = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.silu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))
        return x * torch.sigmoid(self.excite(y))


class InvertedResidual(nn.Module):
    """As `mobilenet.InvertedResidual` and, with `squeeze`, `efficientnet.MBConv`."""

    def __init__(
        self,
        inputs: int,
        expansion: int,
        features: int,
        stride: int,
        kernel: int = 3,
        act: Callable[[], nn.Module] = nn.ReLU6,
        squeeze: bool = False,
    ):
        super().__init__()
        wide = expansion * inputs
        self.expand = chain(**conv_bn(inputs, wide)._modules, act=act()) if expansion != 1 else nn.Identity()
        self.depthwise = conv_bn(wide, wide, kernel, stride, groups=wide)
        self.act = act()
        self.se = SqueezeExcite(wide, inputs // 4) if squeeze else nn.Identity()
        self.project = conv_bn(wide, features)
        self.fits = stride == 1 and inputs == features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.project(self.se(self.act(self.depthwise(self.expand(x)))))
        return x + y if self.fits else y


def mobilenet_v2() -> nn.Module:
    """As `mobilenet.MobileNetV2`."""
    layers: dict[str, nn.Module] = {"stem": conv_bn(3, 32, 3, 2), "stem_act": nn.ReLU6()}
    channels = 32
    for stage, (expansion, features, blocks, stride) in enumerate(mobilenet.STAGES):
        for block in range(blocks):
            step = stride if block == 0 else 1
            layers[f"stage{stage}_{block}"] = InvertedResidual(channels, expansion, features, step)
            channels = features
    head = conv_bn(channels, 1280)
    return chain(**layers, head=head, head_act=nn.ReLU6(), pool=Pool(), classifier=nn.Linear(1280, 1000))


def efficientnet_b0() -> nn.Module:
    """As `efficientnet.EfficientNetB0`."""
    layers: dict[str, nn.Module] = {"stem": conv_bn(3, 32, 3, 2), "stem_act": nn.SiLU()}
    channels = 32
    for stage, (expansion, features, blocks, stride, kernel) in enumerate(efficientnet.STAGES):
        for block in range(blocks):
            step = stride if block == 0 else 1
            made = InvertedResidual(channels, expansion, features, step, kernel, nn.SiLU, squeeze=True)
            layers[f"stage{stage}_{block}"] = made
            channels = features
    head = conv_bn(channels, 1280)
    return chain(**layers, head=head, head_act=nn.SiLU(), pool=Pool(), classifier=nn.Linear(1280, 1000))


class ChannelNorm(nn.LayerNorm):
    """A LayerNorm over the channels of (batch, channels, ...)."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ConvNeXtBlock(nn.Module):
    """As `convnext.Block`."""

    def __init__(self, width: int):
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.expand = nn.Linear(width, 4 * width)
        self.project = nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.project(F.gelu(self.expand(y))) * self.gamma
        return x + y.permute(0, 3, 1, 2)


def convnext_tiny() -> nn.Module:
    """As `convnext.ConvNeXtTiny`."""
    layers: dict[str, nn.Module] = {}
    channels = 3
    for stage, (width, blocks) in enumerate(convnext.STAGES):
        if stage == 0:
            layers |= {"stem": nn.Conv2d(channels, width, 4, 4), "stem_norm": ChannelNorm(width)}
        else:
            layers[f"down{stage}_norm"] = ChannelNorm(channels)
            layers[f"down{stage}"] = nn.Conv2d(channels, width, 2, 2)
        layers |= {f"stage{stage}_{block}": ConvNeXtBlock(width) for block in range(blocks)}
        channels = width
    norm = nn.LayerNorm(channels, eps=1e-6)
    return chain(**layers, pool=Pool(), norm=norm, classifier=nn.Linear(channels, 1000))


def conv_bn_relu_3d(inputs: int, outputs: int) -> nn.Sequential:
    """As `unet.ConvBNReLU`."""
    conv = nn.Conv3d(inputs, outputs, 3, padding=1)
    return chain(conv=conv, bn=nn.BatchNorm3d(outputs, affine=False), relu=nn.ReLU())


class UNet3D(nn.Module):
    """As `unet.UNet3D`."""

    def __init__(self, classes: int = 3):
        super().__init__()
        channels, skipped = 3, []
        for level, widths in enumerate(unet.LEVELS):
            for n, width in enumerate(widths):
                self.add_module(f"down{level}_{n}", conv_bn_relu_3d(channels, width))
                channels = width
            skipped.append(channels)
        for level in reversed(range(len(skipped) - 1)):
            self.add_module(f"up{level}", nn.ConvTranspose3d(channels, channels, 2, 2, bias=False))
            channels += skipped[level]
            for n in range(2):
                self.add_module(f"up{level}_{n}", conv_bn_relu_3d(channels, skipped[level]))
                channels = skipped[level]
        self.classifier = nn.Conv3d(channels, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer, skipped = self.get_submodule, []
        for level in range(len(unet.LEVELS)):
            if level > 0:
                skipped.append(x)
                x = F.max_pool3d(x, 2)
            x = layer(f"down{level}_1")(layer(f"down{level}_0")(x))
        for level in reversed(range(len(skipped))):
            x = torch.cat((skipped[level], layer(f"up{level}")(x)), 1)
            x = layer(f"up{level}_1")(layer(f"up{level}_0")(x))
        return self.classifier(x)


class CausalConv(nn.Conv3d):
    """As `vae.causal_conv`."""

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int, int] = (3, 3, 3)):
        super().__init__(inputs, outputs, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))
        self.before = kernel[0] - 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(F.pad(x, (0, 0, 0, 0, self.before, 0)) if self.before else x)


class RMSNorm(nn.Module):
    """Over the channels of (batch, channels, ...)."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.movedim(1, -1), self.weight.shape, self.weight, 1e-6).movedim(-1, 1)


class Residual(nn.Module):
    """As `vae.Residual`."""

    def __init__(self, inputs: int, features: int):
        super().__init__()
        self.norm0, self.conv0 = RMSNorm(inputs), CausalConv(inputs, features)
        self.norm1, self.conv1 = RMSNorm(features), CausalConv(features, features)
        self.shortcut = CausalConv(inputs, features, (1, 1, 1)) if inputs != features else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv0(F.silu(self.norm0(x)))
        return self.conv1(F.silu(self.norm1(y))) + self.shortcut(x)


class Upsample(nn.Module):
    """As `vae.Upsample`; what moves is moved in channels-last order, once."""

    def __init__(self, channels: int, double: bool):
        super().__init__()
        self.time = CausalConv(channels, 2 * channels, (3, 1, 1)) if double else None
        self.space = nn.Conv2d(channels, channels // 2, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, channels, frames, height, width = x.shape
        x = x.permute(0, 2, 3, 4, 1)
        if self.time is not None:
            y = self.time(x.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)
            y = y.reshape(batch, frames, height, width, 2, channels).permute(0, 1, 4, 2, 3, 5)
            x = y.reshape(batch, 2 * frames, height, width, channels)[:, 1:]
        x = x.reshape(-1, height, width, channels).permute(0, 3, 1, 2)
        x = self.space(F.interpolate(x, scale_factor=2, mode="nearest")).permute(0, 2, 3, 1)
        return x.reshape(batch, -1, 2 * height, 2 * width, channels // 2).permute(0, 4, 1, 2, 3)


def vae3d_decoder() -> nn.Module:
    """As `vae.VAE3DDecoder`."""
    channels = vae.STAGES[0][0]
    layers: dict[str, nn.Module] = {"stem": CausalConv(vae.LATENT, channels)}
    layers |= {f"middle{n}": Residual(channels, channels) for n in range(2)}
    for stage, (width, then) in enumerate(vae.STAGES):
        for block in range(vae.BLOCKS):
            layers[f"stage{stage}_{block}"] = Residual(channels, width)
            channels = width
        if then is not None:
            layers[f"up{stage}"] = Upsample(channels, then == "double")
            channels //= 2
    return chain(**layers, norm=RMSNorm(channels), silu=nn.SiLU(), head=CausalConv(channels, 3))


TORCH_MODELS: dict[str, Callable[[], nn.Module]] = {
    made.__name__: made for made in (mobilenet_v2, efficientnet_b0, resnet50, convnext_tiny)
} | {"unet3d": UNet3D, "vae3d_decoder": vae3d_decoder}


def load(name: str, params: Params, train: bool = False) -> nn.Module:
    """The network for inference or training, with the weights of the flax one, in channels-last order."""
    module = TORCH_MODELS[name]().train(train).requires_grad_(train)
    state = {key: torch.from_numpy(np.array(leaf)) for key, leaf in as_torch(params).items()}
    for key, layer in module.named_modules():
        if isinstance(layer, nn.ConvTranspose3d):  # (in, out, ...), and flax does not flip the kernel
            state[f"{key}.weight"] = state[f"{key}.weight"].transpose(0, 1).flip(2, 3, 4)
    counters = {key: leaf for key, leaf in module.state_dict().items() if key.endswith("num_batches_tracked")}
    module.load_state_dict(state | counters)
    for leaf in module.parameters():
        if leaf.ndim in FORMATS:
            leaf.data = leaf.data.contiguous(memory_format=FORMATS[leaf.ndim])
    return module


def training(name: str, params: Params, images: Any, labels: Any, rate: float) -> tuple[nn.Module, Callable[[], float]]:
    """The network, and what does a step of gradient descent and gives the loss before it: cross entropy, in place."""
    module, pixels = load(name, params, train=True), channels_first(images)
    target = torch.from_numpy(np.array(labels, np.int64))
    sgd = torch.optim.SGD(module.parameters(), rate)

    def step() -> float:
        sgd.zero_grad()
        loss = F.cross_entropy(module(pixels), target)
        loss.backward()
        sgd.step()
        return loss.item()

    return module, step


def channels_first(images: Any) -> torch.Tensor:
    """NHWC (NDHWC) images as a tensor NCHW (NCDHW), in channels-last order: nothing moves."""
    return torch.from_numpy(np.array(images)).movedim(-1, 1)


def jax_counts(model: Model, batch: int, size: int) -> tuple[int, int]:
    """Trainable parameters, and multiply-adds of all convolutions and matrix products, without those by the zeros
    of a transposed convolution."""
    shapes = model.shapes()
    leaves = jax.tree.leaves_with_path(shapes)
    macs = 0
    for eqn in equations(jax.make_jaxpr(model.apply)(shapes, model.images(batch, size))):
        if eqn.primitive.name == "conv_general_dilated":
            conv = ConvSignature.of(eqn.invars[0].aval, eqn.invars[1].aval, eqn.params)
            macs += conv.macs // math.prod(conv.lhs_dilation)
        elif eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            lhs = eqn.invars[0].aval.shape
            macs += math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[i] for i in contracted)
    return sum(math.prod(leaf.shape) for path, leaf in leaves if role(path) not in STATISTICS), macs


def torch_counts(model: Model, batch: int, size: int) -> tuple[int, int]:
    """The same of the PyTorch network."""
    macs = 0

    def count(layer: Any, inputs: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        nonlocal macs
        swept = inputs[0] if isinstance(layer, nn.ConvTranspose3d) else out
        macs += swept.numel() * layer.weight[0].numel()  # (in, out, ...) if transposed, else (out, in, ...)

    with torch.device("meta"), torch.no_grad():
        module = TORCH_MODELS[model.name]().eval()
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d | nn.Conv3d | nn.ConvTranspose3d | nn.Linear):
                layer.register_forward_hook(count)
        module(torch.empty(model.images(batch, size).shape).movedim(-1, 1))
    return sum(leaf.numel() for leaf in module.parameters()), macs


def check(model: Model, batch: int, size: int) -> tuple[int, int]:
    """The parameters and multiply-adds of both; an error if they differ."""
    ours, theirs = jax_counts(model, batch, size), torch_counts(model, batch, size)
    if ours != theirs:
        raise AssertionError(f"{model.name}: (parameters, multiply-adds) {ours} in JAX, {theirs} in PyTorch")
    return ours
