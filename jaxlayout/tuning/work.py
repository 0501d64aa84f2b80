"""Equations of a graph that are no convolutions and whose order matters, as jobs to be timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxlayout.graph.build import Mode, Work
from jaxlayout.layout import Order
from jaxlayout.measure.jobs import Job, random_array


def mode_id(mode: Mode) -> str:
    """The key of a mode of an equation that is no convolution."""
    return f"{_digits(mode.operands)}->{_digits(mode.results)}"


def _digits(orders: Sequence[Order]) -> str:
    return ",".join(".".join(map(str, order)) for order in orders)


def work_job(work: Work, modes: Sequence[Mode]) -> Job:
    """The job of timing an equation in the orders it can work in."""
    by_id = {mode_id(mode): mode for mode in modes}

    def alternative(mode: Mode) -> Callable[..., Any]:
        return lambda *arrays: work.apply(mode, arrays)

    def inputs() -> Any:
        rng = np.random.default_rng(0)
        logical = [random_array(rng, value.shape, value.dtype) for value in work.operands]
        return lambda name: tuple(map(np.transpose, logical, by_id[name].operands)), None

    alternatives = {name: alternative(mode) for name, mode in by_id.items()}
    return Job(key=work.key, alternatives=alternatives, inputs=inputs, context=work.context)
