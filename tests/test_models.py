"""The networks are the published ones: parameter counts, ordinary outputs, NCHW agreeing with NHWC."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from once import once

from bench.models import ALL_MODELS, Model, vae
from bench.models.common import STATISTICS, Apply, as_torch, role

pytestmark = once

#: at full size, where it is not logits of 1000 classes
OUTPUTS = {"unet3d": (1, 24, 48, 48, 3), "vae3d_decoder": (1, 13, 128, 128, 3)}
PAIRS = {"mobilenet_v2": "mobilenet_v2_nchw", "resnet50": "resnet50_nchw"}
#: sides, where 32 are too many for a test, or too few for the last convolutions to tell one tap from another
SIDES = {"unet3d": 8, "vae3d_decoder": 2} | dict.fromkeys((*PAIRS, *PAIRS.values()), 64)


class Run(NamedTuple):
    size: int
    apply: Apply
    compiled: Apply
    params: Any
    images: jax.Array
    logits: jax.Array


@pytest.fixture(scope="module", params=ALL_MODELS.values(), ids=ALL_MODELS.keys())
def model(request: pytest.FixtureRequest) -> Model:
    return request.param


@pytest.fixture(scope="module")
def shapes(model: Model) -> Any:
    return model.shapes()


_runs: dict[str, Run] = {}


def run_of(name: str) -> Run:
    """A network of a small side, applied: to compile one takes seconds."""
    if name not in _runs:
        size = SIDES.get(name, 32)
        apply, params, images = ALL_MODELS[name].build(2, size, jax.random.key(0))
        compiled = jax.jit(apply)
        _runs[name] = Run(size, apply, compiled, params, images, compiled(params, images))
    return _runs[name]


@pytest.fixture(scope="module")
def small(model: Model) -> Iterator[Run]:
    yield run_of(model.name)
    if model.name not in (*PAIRS, *PAIRS.values()):
        del _runs[model.name]


def test_parameter_count(model, shapes):
    leaves = jax.tree.leaves_with_path(shapes)
    assert sum(prod(leaf.shape) for path, leaf in leaves if role(path) not in STATISTICS) == model.parameters


def test_parameter_count_of_the_video_decoder():
    """Its own design: as the sum of its layers."""

    def conv(inputs, outputs, taps=27):
        return taps * inputs * outputs + outputs

    def residual(inputs, outputs):
        shortcut = conv(inputs, outputs, 1) if inputs != outputs else 0
        return inputs + conv(inputs, outputs) + outputs + conv(outputs, outputs) + shortcut

    stages = residual(96, 96) * 2 + residual(96, 96) * 3  # the middle, then stage by stage
    stages += residual(48, 96) + residual(96, 96) * 2 + residual(48, 48) * 3 + residual(24, 24) * 3
    up = 2 * (conv(96, 192, 3) + conv(96, 48, 9)) + conv(48, 24, 9)
    assert conv(16, 96) + stages + up + 24 + conv(24, 3) == ALL_MODELS["vae3d_decoder"].parameters


def test_no_frame_of_the_video_sees_a_later_one():
    model = ALL_MODELS["vae3d_decoder"]
    apply, params, latents = model.build(1, 8, jax.random.key(0))
    assert latents.shape == (1, 2, 8, 8, vae.LATENT)
    video, other = (np.asarray(jax.jit(apply)(params, x)) for x in (latents, latents.at[:, 1].add(1)))
    assert video.shape == (1, 5, 64, 64, 3)
    np.testing.assert_array_equal(video[:, :1], other[:, :1])
    assert (np.abs(video - other)[:, 1:].max((0, 2, 3, 4)) > 1e-3).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_full_size_gives_logits_of_the_dtype_it_is_given(model, shapes, dtype):
    images = model.images(model.batch, model.size)
    with jax.enable_x64(True):
        abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype), (shapes, images))
        logits = jax.eval_shape(model.apply, *abstract)
    assert (logits.shape, logits.dtype) == (OUTPUTS.get(model.name, (model.batch, 1000)), dtype)


def test_parameters_are_float32_whatever_the_default(model):
    with jax.enable_x64(True):
        assert {leaf.dtype for leaf in jax.tree.leaves(model.shapes())} == {jnp.dtype("float32")}


def test_parameters_are_of_the_declared_shapes(shapes, small):
    declared = [(path, a.shape, a.dtype) for path, a in jax.tree.leaves_with_path(shapes)]
    assert [(path, a.shape, a.dtype) for path, a in jax.tree.leaves_with_path(small.params)] == declared


def test_logits_are_finite_ordinary_and_depend_on_the_image(small):
    logits = np.asarray(small.logits)
    assert np.isfinite(logits).all()
    assert 0.1 < logits.std() < 100
    assert (logits[0] - logits[1]).std() > 0.05 * logits.std()


def test_float64_is_a_reference_for_float32(small):
    with jax.enable_x64(True):
        params, images = jax.tree.map(lambda a: a.astype(jnp.float64), (small.params, small.images))
        exact = jax.jit(small.apply)(params, images)
    assert exact.dtype == jnp.float64
    np.testing.assert_allclose(small.logits, exact, atol=1e-4 * np.abs(exact).max(), rtol=0)


def test_build_depends_on_the_key_alone(model, small):
    (_, *same), (_, *other) = (model.build(2, small.size, jax.random.key(seed)) for seed in (0, 1))
    jax.tree.map(np.testing.assert_array_equal, same, [small.params, small.images])
    assert not any(map(np.array_equal, jax.tree.leaves(same), jax.tree.leaves(other)))


@pytest.mark.parametrize("name", PAIRS)
def test_nchw_agrees_with_nhwc(name):
    nhwc, nchw = run_of(name), run_of(PAIRS[name])
    ported = as_torch(nhwc.params)
    assert {key: a.shape for key, a in ported.items()} == {key: a.shape for key, a in nchw.params.items()}
    actual = nchw.compiled(ported, nhwc.images.transpose(0, 3, 1, 2))
    np.testing.assert_allclose(actual, nhwc.logits, atol=1e-4 * np.abs(nhwc.logits).max(), rtol=0)
