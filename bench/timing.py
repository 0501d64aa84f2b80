"""Timing that holds on a noisy machine: functions in turn in one process. Of two, `paired` is the package's."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxlayout.measure.environment import current_environment
from jaxlayout.runtime.timing import Paired, lasting, paired, sample, timed_call

__all__ = ["CORES", "Contender", "Paired", "first_call", "in_turn", "machine", "middle", "paired"]

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
"""How many this process may use."""

SAMPLE_NS = 1e8
"""How long the samples of `in_turn` last."""

Contender = Callable[[], Any]
"""Runs once, to the end."""


def machine() -> str:
    """What times are of: the version of jax, and the processor with the cores that this process may use, or the
    accelerator."""
    device = jax.devices()[0]
    cores = f"{current_environment(device).cpu}, {CORES} cores"
    return f"jax {jax.__version__}, {cores if device.platform == 'cpu' else device.device_kind}"


def first_call(f: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """What a function gives, and the seconds until it is there."""
    out, ns = timed_call(lambda: f(*args))
    return out, ns / 1e9


def in_turn(contenders: Mapping[str, Contender], rounds: int) -> dict[str, list[float]]:
    """Seconds of each in each round, warm by then. Each begins its turn with a call that is not timed, while the
    threads of the one before it go to sleep; short calls are repeated to 0.1 s; the order turns from round to round."""
    repeats = {}
    for name, call in contenders.items():
        call()
        _, repeats[name] = lasting(call, SAMPLE_NS)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for n in range(rounds):
        turned = names[n % len(names) :] + names[: n % len(names)]
        for name in turned if n % 2 == 0 else reversed(turned):
            contenders[name]()
            seconds[name].append(sample(contenders[name], repeats[name]) / 1e9)
    return seconds


def middle(values: Sequence[float]) -> tuple[float, float]:
    """The median, and half the interquartile range."""
    low, _, high = statistics.quantiles(values, n=4)
    return statistics.median(values), (high - low) / 2
