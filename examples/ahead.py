"""Tune before the first call, from shapes alone, and ship the plan: a server with it measures and compares nothing.

Prints what came of tuning, and where the deployed function has its plan from. Tune on a machine like the one that
serves. At the command line the first half is

    jaxlayout tune ahead.py:predict --plan plan.json --args '[f32[8,1,3,3], f32[8,8,1,1]]' f32[2,8,32,32]
"""

import tempfile
from pathlib import Path

import jax
import numpy as np
from jax import lax

from jaxlayout import Plan, auto_layout, tune

SHAPES = (8, 1, 3, 3), (8, 8, 1, 1), (2, 8, 32, 32)


def predict(kernels, images):
    """Images (batch, 8, height, width) to features (batch, 8, height, width)."""
    depthwise, pointwise = kernels
    x = jax.nn.relu(lax.conv_general_dilated(images, depthwise, (1, 1), "SAME", feature_group_count=8))
    return lax.conv_general_dilated(x, pointwise, (1, 1), "SAME")


def build(path):
    """Tune for these shapes, and save the plan: an empty one where the function is left as it is."""
    *kernels, images = (jax.ShapeDtypeStruct(shape, "float32") for shape in SHAPES)
    outcome = tune(predict, kernels, images)
    print(f"{'kept' if outcome.kept else 'left as it is'}: {outcome.verdict.reason}")
    outcome.applied.save(path)


def serve(path, kernels, images):
    """The features that the deployed function gives."""
    deployed = auto_layout(predict, plan=Plan.load(path))
    print(f"the plan is {deployed.outcome(kernels, images).source}")
    return deployed(kernels, images)


def inputs():
    """Random kernels and images of those shapes."""
    rng = np.random.default_rng(0)
    *kernels, images = (rng.standard_normal(shape, np.float32) for shape in SHAPES)
    return kernels, images


def main():
    """The features of random images."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        build(path)
        return serve(path, *inputs())


if __name__ == "__main__":
    main()
