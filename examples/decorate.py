"""A depthwise network in plain JAX, decorated: `@auto_layout` stands where `@jax.jit` would.

Prints the report of `explain`: every convolution with the form it was written in and the form it got, the forms that
were tried, and whether the rewritten function was kept. The numbers are those of `jax.jit`, up to rounding.
"""

import math

import jax
import numpy as np
from jax import lax

from jaxlayout import auto_layout


def conv(x, kernel, groups=1):
    """A convolution, channels last."""
    layouts = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layouts, feature_group_count=groups)


@auto_layout
def predict(params, images):
    """Images (batch, height, width, 3) to logits (batch, 10)."""
    x = jax.nn.relu(conv(images, params["stem"]))
    for depthwise, pointwise in params["blocks"]:
        y = jax.nn.relu(conv(x, depthwise, groups=x.shape[-1]))
        x = x + conv(y, pointwise)
    return x.mean((1, 2)) @ params["head"]


def inputs():
    """Random weights and images."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.standard_normal(shape, np.float32) / math.sqrt(math.prod(shape[:-1]))

    params = {
        "stem": draw(3, 3, 3, 16),
        "blocks": [(draw(3, 3, 1, 16), draw(1, 1, 16, 16)) for _ in range(2)],
        "head": draw(16, 10),
    }
    return params, rng.standard_normal((4, 32, 32, 3), np.float32)


def main():
    """The logits of a batch."""
    params, images = inputs()
    logits = predict(params, images)  # the first call of these shapes tunes; later ones are `jax.jit` calls
    print(predict.explain(params, images))
    return logits


if __name__ == "__main__":
    main()
