"""Training steps under `auto_layout` train as they do under `jax.jit`: the same losses, the same state.

The made-up costs of `forced` change every convolution's form; `rewritten` says so.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from helpers import close
from jax import lax
from sklearn.datasets import load_digits

from bench.models.resnet import ConvBN
from jaxlayout import AutoLayout, auto_layout
from jaxlayout.convs.primitive import tuned_conv_p
from jaxlayout.graph.program import equations

pytestmark = pytest.mark.usefixtures("forced")

#: with its usual eps, Adam would make a whole step of a gradient that is zero but for rounding
adam = partial(optax.adam, eps=1e-3)


def rewritten(tuned: AutoLayout, *args: Any) -> bool:
    """Whether a plan is applied, and every convolution is one that was chosen, some of them in another form."""
    outcome = tuned.outcome(*args)
    names = {eqn.primitive.name for eqn in equations(jax.make_jaxpr(lambda: tuned(*args))())}
    changed = not outcome.plan.trivial
    return outcome.kept and changed and tuned_conv_p.name in names and "conv_general_dilated" not in names


def trains(step: Any, state: Any, *batches: Any, tolerance: float = 1e-4, **jit: Any) -> Any:
    """Assert that `step(state, *batch)` -> (state, loss) is rewritten and agrees, over all batches; gives the state.
    `jit`: keywords by which the state is donated."""
    plain, tuned = jax.jit(step, **jit), auto_layout(step, **jit)
    ours = theirs = state
    if jit:
        ours, theirs = (jax.tree.map(jnp.copy, state) for _ in range(2))
    for batch in zip(*batches, strict=True):
        given = ours
        ours, loss = tuned(given, *batch)
        assert not jit or all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
        theirs, expected = plain(theirs, *batch)
        close((ours, loss), (theirs, expected), tolerance, least=1e-3)
    assert rewritten(tuned, state, *(b[0] for b in batches))
    moved = [float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (ours, state)), strict=True)]
    assert max(moved) > 1e-3
    return ours


class Net(nn.Module):
    """Two convolutions, one of stride 2, group norm, a dense head."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for features, stride in ((8, 1), (12, 2)):
            x = nn.Conv(features, (3, 3), stride, dtype=self.dtype)(x)
            x = nn.relu(nn.GroupNorm(4, dtype=self.dtype)(x))
        return nn.Dense(5, dtype=self.dtype)(x.mean((1, 2)))


STEPS = 4
_rng = np.random.default_rng(0)
IMAGES = jnp.asarray(_rng.standard_normal((STEPS, 4, 8, 8, 3)), jnp.float32)
LABELS = jnp.asarray(_rng.integers(0, 5, (STEPS, 4)), jnp.int32)
NET = Net()
PARAMS = jax.jit(NET.init)(jax.random.key(0), IMAGES[0])


def loss_of(params: Any, images: jax.Array, labels: jax.Array, net: nn.Module = NET) -> jax.Array:
    logits = net.apply(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels).mean()


def step_with(tx: Any, loss: Any = loss_of) -> Any:
    def step(state: Any, images: jax.Array, labels: jax.Array) -> Any:
        params, moments = state
        value, grads = jax.value_and_grad(loss)(params, images, labels)
        updates, moments = tx.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    return step


def test_a_loop_over_a_train_state():
    state = TrainState.create(apply_fn=NET.apply, params=PARAMS, tx=adam(1e-2))

    def train(state, images, labels):
        def step(state, batch):
            value, grads = jax.value_and_grad(loss_of)(state.params, *batch)
            return state.apply_gradients(grads=grads), value

        return lax.scan(step, state, (images, labels))

    assert trains(train, state, IMAGES[None], LABELS[None]).step == STEPS


def test_accumulated_gradients():
    tx = optax.MultiSteps(adam(1e-2), every_k_schedule=2)
    _, moments = trains(step_with(tx), (PARAMS, tx.init(PARAMS)), IMAGES, LABELS)
    assert moments.gradient_step == STEPS / 2


def test_mixed_precision():
    tx = adam(1e-2)
    net = Net(dtype=jnp.bfloat16)
    params, _ = trains(
        step_with(tx, partial(loss_of, net=net)), (PARAMS, tx.init(PARAMS)), IMAGES, LABELS, tolerance=0.1
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_averaged_parameters():
    tx = adam(1e-2)
    inner = step_with(tx)

    def step(state, images, labels):
        state, average = state
        state, value = inner(state, images, labels)
        return (state, optax.incremental_update(state[0], average, 0.1)), value

    trains(step, ((PARAMS, tx.init(PARAMS)), PARAMS), IMAGES, LABELS)


def test_donated_state():
    tx = adam(1e-2)
    trains(step_with(tx), (PARAMS, tx.init(PARAMS)), IMAGES, LABELS, donate_argnums=0)


class ResNet(nn.Module):
    """For 8x8 digits."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(ConvBN(16, 3)(x))
        y = ConvBN(32, 3)(nn.relu(ConvBN(32, 3, 2)(x)))
        x = nn.relu(y + ConvBN(32, 1, 2)(x))
        return nn.Dense(10)(x.mean((1, 2)))


def test_curves_of_a_resnet_on_digits():
    steps, batch, seen = 50, 64, 1297
    digits = load_digits()
    images, labels = jnp.asarray(digits.images[..., None] / 8 - 1, jnp.float32), jnp.asarray(digits.target, jnp.int32)
    net, tx = ResNet(), adam(2e-2)
    variables = jax.jit(net.init)(jax.random.key(0), images[:1])

    def step(state, images, labels):
        variables, moments = state

        def loss(params):
            logits, stats = net.apply({**variables, "params": params}, images, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), stats

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        updates, moments = tx.update(grads, moments)
        return ({"params": optax.apply_updates(variables["params"], updates), **stats}, moments), value

    def curve(step):
        state, losses = (variables, tx.init(variables["params"])), []
        rng = np.random.default_rng(0)
        for _ in range(steps):
            some = rng.integers(0, seen, batch)
            state, value = step(state, images[some], labels[some])
            losses.append(float(value))
        # Statistics move by 1% a step: too few steps for those stored, so the batch's.
        logits, _ = jax.jit(partial(net.apply, mutable=["batch_stats"]))(state[0], images[seen:])
        return losses, float((logits.argmax(1) == labels[seen:]).mean())

    tuned = auto_layout(step)
    (losses, accuracy), (expected, plain) = curve(tuned), curve(jax.jit(step))
    assert rewritten(tuned, (variables, tx.init(variables["params"])), images[:batch], labels[:batch])
    np.testing.assert_allclose(losses[:10], expected[:10], rtol=1e-3)
    assert losses[-1] < 0.3 * losses[0]
    assert plain > 0.9 and abs(accuracy - plain) <= 0.01
