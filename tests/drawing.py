"""How much hypothesis draws. A test draws the same few examples in each run; with FUZZ=n in the environment n times as
many, and others each time (`make fuzz`)."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

FUZZ = int(os.environ.get("FUZZ", "0"))


def examples(number: int) -> settings:
    """The settings of a test that usually draws so many."""
    return settings(
        max_examples=number * max(1, FUZZ),
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
