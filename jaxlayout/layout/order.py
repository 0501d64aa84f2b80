"""Axis orders: how the axes a user sees are laid out in the array that is really there.

An `Order` is a permutation, one entry per axis of the physical array: physical axis `i` holds logical
axis `order[i]`, so `physical == transpose(logical, order)`. The identity is what the user wrote.
"""

from collections.abc import Sequence
from typing import TypeVar

Order = tuple[int, ...]
T = TypeVar("T")


def identity(rank: int) -> Order:
    """The order the user sees."""
    return tuple(range(rank))


def conversion(held: Order, wanted: Order) -> Order:
    """The permutation that takes an array held in one order to another.

    `transpose(transpose(x, held), conversion(held, wanted)) == transpose(x, wanted)`.
    """
    place = {axis: i for i, axis in enumerate(held)}
    return tuple(place[axis] for axis in wanted)


def permuted(values: Sequence[T], order: Order) -> tuple[T, ...]:
    """Per-axis values (a shape, strides, padding) of the physical array."""
    return tuple(values[axis] for axis in order)


def moves_data(shape: Sequence[int], held: Order, wanted: Order) -> bool:
    """Whether converting an array of logical `shape` moves elements: axes of size 1 move for free."""
    return [a for a in held if shape[a] != 1] != [a for a in wanted if shape[a] != 1]
