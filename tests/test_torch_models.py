"""The PyTorch networks are the JAX ones: as many parameters and multiply-adds, and with the same weights the same."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from bench.models import ALL_MODELS

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
