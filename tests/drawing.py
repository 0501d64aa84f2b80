"""How much hypothesis draws. In the suite a test draws the same few examples each time; with FUZZ=n in the environment
many times as many, and others each time (`make fuzz`)."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

FUZZ = int(os.environ.get("FUZZ", "0"))
SHARE = 4
"""Of what a test draws at FUZZ=1, the suite draws one in so many."""


def examples(number: int) -> settings:
    """The settings of a test that draws so many at FUZZ=1."""
    return settings(
        max_examples=number * FUZZ or max(1, number // SHARE),
        derandomize=not FUZZ,
        deadline=None,
        print_blob=True,
        suppress_health_check=[
            HealthCheck.too_slow,
            HealthCheck.data_too_large,
            HealthCheck.large_base_example,
            HealthCheck.function_scoped_fixture,
        ],
    )
