"""Inference with frozen weights: what depends on them alone is done once, not in every request.

Kernels are converted and packed, and a batch normalisation is folded into the kernel before it. Prints the class of
each image of each request. New weights need a new `freeze`.
"""

import jax
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
    keys = jax.random.split(jax.random.key(0), 4)
    kernels = [jax.random.normal(keys[i], (16, n, 3, 3)) for i, n in enumerate((3, 16))]
    vectors = [jax.random.uniform(key, (4, 16), minval=0.5, maxval=1.0) for key in keys[2:]]
    return [{"kernel": k, "vectors": v} for k, v in zip(kernels, vectors, strict=True)]


def requests():
    """Batches of images, of one shape: each new shape would be tuned anew."""
    return [jax.random.normal(jax.random.key(i), (4, 3, 32, 32)) for i in range(3)]


def main():
    """The logits of each request."""
    infer = predict.freeze(weights())  # in copies of its own
    logits = [infer(images) for images in requests()]  # the first call of a shape tunes and prepares
    print(*(found.argmax(-1) for found in logits), sep="\n")
    return logits


if __name__ == "__main__":
    main()
