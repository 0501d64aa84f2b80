"""The PyTorch networks are the JAX ones: as many parameters and multiply-adds, and with the same weights the same."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from bench.models import ALL_MODELS
from bench.models.common import as_torch

torch = pytest.importorskip("torch")
torch_models = pytest.importorskip("bench.torch_models")

#: multiply-adds of one image, as published with the networks or with torchvision, in thousands of millions
PUBLISHED = {"mobilenet_v2": 0.30, "efficientnet_b0": 0.39, "resnet50": 4.09, "convnext_tiny": 4.46}


@pytest.mark.parametrize("name", torch_models.TORCH_MODELS)
def test_counts_agree_at_full_size(name):
    model = ALL_MODELS[name]
    parameters, macs = torch_models.check(model, model.batch, model.size)
    assert parameters == model.parameters
    if name in PUBLISHED:
        assert macs / model.batch / 1e9 == pytest.approx(PUBLISHED[name], abs=0.005)


@pytest.mark.parametrize("name", torch_models.TORCH_MODELS)
def test_same_weights_give_the_same_numbers(name):
    size = {"unet3d": 16, "vae3d_decoder": 4}.get(name, 64)
    apply, params, images = ALL_MODELS[name].build(2, size, jax.random.key(0))
    expected = np.asarray(jax.jit(apply)(params, images))
    with torch.no_grad():
        found = torch_models.load(name, params)(torch_models.channels_first(images)).movedim(1, -1).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("name", ["mobilenet_v2", "convnext_tiny"])
def test_a_training_step_is_the_same(name):
    rate, model = 0.1, ALL_MODELS[name]
    _, variables, images = model.build(4, 64, jax.random.key(0))
    params, labels = variables["params"], np.arange(4)

    def loss(params):
        logits, _ = model.train_apply({**variables, "params": params}, images)
        return -jax.nn.log_softmax(logits)[labels, labels].mean()

    expected, grads = jax.jit(jax.value_and_grad(loss))(params)
    module, step = torch_models.training(name, variables, images, labels, rate)
    before = {key: leaf.detach().clone() for key, leaf in module.named_parameters()}
    assert step() == pytest.approx(float(expected), rel=1e-3)
    wanted = as_torch({"params": grads})
    assert wanted.keys() == before.keys()

    def rms(x):
        return float(np.sqrt(np.mean(np.asarray(x) ** 2)))

    noise = 1e-4 * max(map(rms, wanted.values()))  # a bias before a batch norm has no gradient but rounding
    for key, leaf in module.named_parameters():
        found = (before[key] - leaf.detach()).numpy() / rate
        assert rms(found - wanted[key]) < 0.02 * rms(wanted[key]) + noise, key
    assert step() < expected
