"""Inference with frozen weights: what depends on them alone is done once, not in every request.

Kernels are converted and packed, and a batch normalisation is folded into the kernel before it. Prints the largest
logit of each image of each request. New weights need a new `freeze`.
"""

import jax
import numpy as np
from jax import lax

from jaxlayout import auto_layout


def normalised(p, x):
    """A convolution, channels first, and a batch normalisation with stored statistics."""
    y = lax.conv_general_dilated(x, p["kernel"], (2, 2), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW"))
    mean, var, scale, bias = p["vectors"][:, :, None, None]
    return (y - mean) * lax.rsqrt(var + 1e-5) * scale + bias


@auto_layout
def predict(params, images):
    """Images (batch, 3, height, width) to logits (batch, 16)."""
    x = images
    for p in params:
        x = jax.nn.relu(normalised(p, x))
    return x.mean((2, 3))


def weights():
    """Random ones of two layers, from 3 to 16 to 16 channels."""
    rng = np.random.default_rng(0)
    kernels = [rng.standard_normal((16, channels, 3, 3), np.float32) for channels in (3, 16)]
    return [{"kernel": kernel, "vectors": rng.random((4, 16), np.float32) + 0.5} for kernel in kernels]


def requests():
    """Batches of images, of one shape: each new shape would be tuned anew."""
    return [np.random.default_rng(i).standard_normal((4, 3, 32, 32), np.float32) for i in range(3)]


def main():
    """The logits of each request."""
    infer = predict.freeze(weights())  # in copies of its own
    logits = [infer(images) for images in requests()]  # the first call of a shape tunes and prepares
    print(*(found.max(-1) for found in logits), sep="\n")
    return logits


if __name__ == "__main__":
    main()
