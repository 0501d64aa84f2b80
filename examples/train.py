"""A Flax model with a tuned module, trained by optax in `lax.scan`.

`linen.auto_layout(Network())` has the variables of `Network()`, name for name. The gradients' convolutions, which JAX
writes, are tuned too, when it compiles the loop. Prints the loss of each step, which falls.
"""

import flax.linen as nn
import jax
import numpy as np
import optax
from jax import lax

from jaxlayout.flax import linen


class Network(nn.Module):
    """Images (batch, height, width, channels) to logits (batch, 4)."""

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.relu(nn.Conv(8, (3, 3))(x))
        return nn.Dense(4)(x.mean((1, 2)))


def train(model, steps=8):
    """The losses (steps,) of as many steps on one batch."""
    images = np.random.default_rng(0).standard_normal((8, 16, 16, 3), np.float32)
    labels = np.arange(8) % 4
    params, optimiser = model.init(jax.random.key(0), images), optax.adamw(0.01)

    def loss(params):
        return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, images), labels).mean()

    def step(state, _):
        params, moments = state
        value, grads = jax.value_and_grad(loss)(params)
        updates, moments = optimiser.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    return jax.jit(lambda state: lax.scan(step, state, length=steps))((params, optimiser.init(params)))[1]


def main():
    """The losses of the tuned model."""
    losses = train(linen.auto_layout(Network()))
    print(np.round(losses, 3))
    return losses


if __name__ == "__main__":
    main()
