"""Lowerings in the order of PyTorch that go wrong as a test wants it, and how they come to be chosen."""

from __future__ import annotations

import json
import os
from typing import Any

import jax.numpy as jnp
import pytest
from jax import lax

from jaxlayout import CostTable, Lowering
from jaxlayout.convs import candidates
from jaxlayout.convs.lowering import lowerings
from jaxlayout.layout import ConvDimensionNumbers
from jaxlayout.measure import trials
from jaxlayout.table.records import look


class Toy(Lowering):
    """In the order of PyTorch, by XLA; subclasses go wrong somewhere."""

    name = "toy"

    def dimension_numbers(self, conv):
        yield ConvDimensionNumbers.channels_first(conv.rank)

    def apply(self, conv, dims, lhs, prepared):
        return lax.conv_general_dilated(lhs, prepared, dimension_numbers=dims.to_lax(), **conv.params)


class Turncoat(Toy):
    """Right when it is measured, wrong in the program."""

    name = "turncoat"
    how: Any = None

    def apply(self, conv, dims, lhs, prepared):
        out = super().apply(conv, dims, lhs, prepared)
        return out if Turncoat.how is None else Turncoat.how(out)


def grow(out):
    """Needs four megabytes more."""
    many = lax.optimization_barrier(jnp.zeros((1 << 20,), jnp.float32) + out.ravel()[0])
    return out + 0 * lax.optimization_barrier(jnp.sort(many))[0]


def offer(monkeypatch: pytest.MonkeyPatch, *ways: Lowering | str) -> None:
    """Have these lowerings offered, and no others; those that come with the package by name."""
    offered = [lowerings()[way] if isinstance(way, str) else way for way in ways]
    monkeypatch.setattr(candidates, "lowerings", lambda: {way.name: way for way in offered})


def tempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of timing: any candidate is faster than the one written."""

    def race(trials: list[Any]) -> None:
        for i, trial in enumerate(trials):  # conversions are raced too, one at a time
            trial.samples = [1e9 if i == 0 and len(trials) > 1 else 1e3] * 9

    monkeypatch.setattr(trials, "time_in_rounds", race)


def table() -> CostTable:
    """The test's own."""
    return CostTable(os.environ["JAXLAYOUT_TABLE"])


def records() -> dict[str, Any]:
    """What it holds of convolutions, by candidate without version."""
    rows = look(os.environ["JAXLAYOUT_TABLE"])[0]["measurements"]
    return {row[2]: json.loads(row[3]) for row in rows if not row[1].startswith("transpose")}
