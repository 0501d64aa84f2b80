"""Read a report as data: what a program, a log or a test would want to know of what was chosen.

Prints a line for each convolution (where it stands, the form written, the form chosen, and the time of each as far as
it was measured), the conversions put in, and what stopped an order: the sort, which has no rule.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxlayout import auto_layout


@auto_layout
def score(kernels, images):
    """Images (batch, 8, height, width) to their 5 largest features (batch, 5)."""
    x = jax.nn.relu(lax.conv_general_dilated(images, kernels[0], (1, 1), "SAME"))  # channels first
    x = lax.conv_general_dilated(x, kernels[1], (2, 2), "SAME", feature_group_count=8)
    return jnp.sort(x.reshape(len(x), -1))[:, -5:]


def inputs():
    """Random kernels and images."""
    draw = np.random.default_rng(0).standard_normal
    return [draw((8, 8, 1, 1), np.float32), draw((8, 1, 3, 3), np.float32)], draw((2, 8, 24, 24), np.float32)


def shown(tried):
    """A form and its time."""
    found = tried.measurement
    time = "not timed" if found is None or found.median_ns is None else f"{found.median_ns / 1e6:.3f} ms"
    return f"{tried.candidate} ({time})"


def main():
    """The report, also as plain data."""
    report = score.explain(*inputs())
    print("kept" if report.outcome.kept else report.nothing_gained)
    for site in report.sites:
        print(f"{site.kind}, {site.line}: {shown(site.written)} → {shown(site.chosen)}, {len(site.tried)} tried")
    for move in report.moves:
        print(f"conversion of {move.dtype}{list(move.shape)}: {move.held} → {move.wanted}")
    print("orders stop at", ", ".join(barrier.name for barrier in report.barriers))
    return report, report.to_json()


if __name__ == "__main__":
    main()
