"""MobileNetV2 and ResNet-50 in plain `jax.lax`, NCHW/OIHW: what a port of PyTorch code looks like.

The parameters are a flat dict in PyTorch's manner: `stage2_0.expand.conv.weight` is (out, in, height, width).
Kernel sizes and groups are read off the weights' shapes, so that a network is its names and its strides.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from bench.models import mobilenet, resnet
from bench.models.common import Model

CLASSES = 1000
BN_EPSILON = 1e-5

Params = dict[str, jax.Array]
Shapes = dict[str, jax.ShapeDtypeStruct]


def conv_bn(p: Params, name: str, x: jax.Array, stride: int = 1) -> jax.Array:
    w = p[f"{name}.conv.weight"]
    pad = w.shape[-1] // 2
    y = lax.conv_general_dilated(
        x,
        w,
        window_strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        dimension_numbers=("NCHW", "OIHW", "NCHW"),
        feature_group_count=x.shape[1] // w.shape[1],
    )
    leaves = ("running_mean", "running_var", "weight", "bias")
    mean, var, scale, bias = (p[f"{name}.bn.{leaf}"][None, :, None, None] for leaf in leaves)
    return (y - mean) * lax.rsqrt(var + BN_EPSILON) * scale + bias


def relu6(x: jax.Array) -> jax.Array:
    return jnp.clip(x, 0, 6)


def max_pool(x: jax.Array) -> jax.Array:
    pad = ((0, 0), (0, 0), (1, 1), (1, 1))
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 3, 3), (1, 1, 2, 2), pad)


def classify(p: Params, x: jax.Array) -> jax.Array:
    return x.mean((2, 3)) @ p["classifier.weight"].T + p["classifier.bias"]


def resnet50(p: Params, images: jax.Array) -> jax.Array:
    x = max_pool(jax.nn.relu(conv_bn(p, "stem", images, 2)))
    for stage, (_, blocks, first) in enumerate(resnet.STAGES):
        for block in range(blocks):
            name, stride = f"stage{stage}_{block}", first if block == 0 else 1
            y = jax.nn.relu(conv_bn(p, f"{name}.reduce", x))
            y = jax.nn.relu(conv_bn(p, f"{name}.spatial", y, stride))
            y = conv_bn(p, f"{name}.expand", y)
            if x.shape != y.shape:
                x = conv_bn(p, f"{name}.shortcut", x, stride)
            x = jax.nn.relu(x + y)
    return classify(p, x)


def resnet50_shapes() -> Shapes:
    shapes, channels = conv_bn_shapes("stem", 3, 64, 7), 64
    for stage, (width, blocks, _) in enumerate(resnet.STAGES):
        for block in range(blocks):
            name = f"stage{stage}_{block}"
            shapes |= conv_bn_shapes(f"{name}.reduce", channels, width)
            shapes |= conv_bn_shapes(f"{name}.spatial", width, width, 3)
            shapes |= conv_bn_shapes(f"{name}.expand", width, 4 * width)
            if block == 0:
                shapes |= conv_bn_shapes(f"{name}.shortcut", channels, 4 * width)
            channels = 4 * width
    return shapes | classifier_shapes(channels)


def mobilenet_v2(p: Params, images: jax.Array) -> jax.Array:
    x = relu6(conv_bn(p, "stem", images, 2))
    for stage, (expansion, _, blocks, first) in enumerate(mobilenet.STAGES):
        for block in range(blocks):
            name, stride = f"stage{stage}_{block}", first if block == 0 else 1
            y = relu6(conv_bn(p, f"{name}.expand", x)) if expansion != 1 else x
            y = relu6(conv_bn(p, f"{name}.depthwise", y, stride))
            y = conv_bn(p, f"{name}.project", y)
            x = x + y if x.shape == y.shape else y
    return classify(p, relu6(conv_bn(p, "head", x)))


def mobilenet_v2_shapes() -> Shapes:
    shapes, channels = conv_bn_shapes("stem", 3, 32, 3), 32
    for stage, (expansion, features, blocks, _) in enumerate(mobilenet.STAGES):
        for block in range(blocks):
            name, wide = f"stage{stage}_{block}", expansion * channels
            if expansion != 1:
                shapes |= conv_bn_shapes(f"{name}.expand", channels, wide)
            shapes |= conv_bn_shapes(f"{name}.depthwise", 1, wide, 3)
            shapes |= conv_bn_shapes(f"{name}.project", wide, features)
            channels = features
    return shapes | conv_bn_shapes("head", channels, 1280) | classifier_shapes(1280)


def conv_bn_shapes(name: str, inputs: int, outputs: int, kernel: int = 1) -> Shapes:
    """`inputs` is the number of channels that each group of the convolution sees."""
    norm = {f"{name}.bn.{leaf}": _f32(outputs) for leaf in ("weight", "bias", "running_mean", "running_var")}
    return {f"{name}.conv.weight": _f32(outputs, inputs, kernel, kernel)} | norm


def classifier_shapes(inputs: int) -> Shapes:
    return {"classifier.weight": _f32(CLASSES, inputs), "classifier.bias": _f32(CLASSES)}


def _f32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


mobilenet_v2_nchw = Model(
    name="mobilenet_v2_nchw",
    order="NCHW",
    parameters=mobilenet.mobilenet_v2.parameters,
    apply=mobilenet_v2,
    shapes=mobilenet_v2_shapes,
)
resnet50_nchw = Model(
    name="resnet50_nchw",
    order="NCHW",
    parameters=resnet.resnet50.parameters,
    apply=resnet50,
    shapes=resnet50_shapes,
)
