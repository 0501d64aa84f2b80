"""The demo's networks are the published ones: parameter counts, ordinary outputs, NCHW agreeing with NHWC."""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench.models import MODELS, Model
from bench.models.common import Apply, role

STATISTICS = {"mean", "var", "running_mean", "running_var"}


class Run(NamedTuple):
    apply: Apply
    params: Any
    images: jax.Array
    logits: jax.Array


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS.keys())
def model(request: pytest.FixtureRequest) -> Model:
    return request.param


@pytest.fixture(scope="module")
def shapes(model: Model) -> Any:
    return model.shapes()


@pytest.fixture(scope="module")
def small(model: Model) -> Run:
    apply, params, images = model.build(2, 32, jax.random.key(0))
    return Run(apply, params, images, jax.jit(apply)(params, images))


def test_parameter_count(model, shapes):
    leaves = jax.tree.leaves_with_path(shapes)
    assert sum(prod(leaf.shape) for path, leaf in leaves if role(path) not in STATISTICS) == model.parameters


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_full_size_gives_logits_of_the_dtype_it_is_given(model, shapes, dtype):
    shape = (3, model.size, model.size) if model.order == "NCHW" else (model.size, model.size, 3)
    images = jax.ShapeDtypeStruct((model.batch, *shape), jnp.float32)
    with jax.enable_x64(True):
        abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype), (shapes, images))
        logits = jax.eval_shape(model.apply, *abstract)
    assert (logits.shape, logits.dtype) == ((model.batch, 1000), dtype)


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
    (_, *same), (_, *other) = (model.build(2, 32, jax.random.key(seed)) for seed in (0, 1))
    jax.tree.map(np.testing.assert_array_equal, same, [small.params, small.images])
    assert not any(map(np.array_equal, jax.tree.leaves(same), jax.tree.leaves(other)))


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet50"])
def test_nchw_agrees_with_nhwc(name):
    nhwc, params, images = MODELS[name].build(2, 64, jax.random.key(0))
    nchw, ported = MODELS[f"{name}_nchw"], as_torch(params)
    assert {key: a.shape for key, a in ported.items()} == {key: a.shape for key, a in nchw.shapes().items()}
    expected = jax.jit(nhwc)(params, images)
    actual = jax.jit(nchw.apply)(ported, images.transpose(0, 3, 1, 2))
    np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)


def as_torch(params: Any) -> dict[str, jax.Array]:
    """A flax tree by PyTorch's names and in PyTorch's orders: HWIO to OIHW, (in, out) to (out, in)."""
    renamed = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
    state = {}
    for path, leaf in jax.tree.leaves_with_path(params):
        *scope, last = (part.key for part in path[1:])  # path[0] is 'params' or 'batch_stats'
        if last == "kernel":
            leaf = leaf.transpose(3, 2, 0, 1) if leaf.ndim == 4 else leaf.T
        state[".".join((*scope, renamed.get(last, last)))] = leaf
    return state
