"""What both share: classes in disguise, and arguments and results in two parts, arrays, which are traced, and all else
(`train=True`), which stays Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np


def bare(cls: type) -> type:
    """What a tuned class was made of."""
    return vars(cls).get("__wrapped__", cls)


def disguised(base: type, **methods: Any) -> type:
    """A subclass by the same name, with other methods."""
    names = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(base.__name__, (base,), {**names, **methods, "__wrapped__": base})


@jax.tree_util.register_static
class Static:
    """A hashable value that is no array, for an argument, a part of a pytree or a cache key. Unlike what they hold,
    `Static(True)` and `Static(1)` differ: a program traced for one is not that of the other."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and type(self.value) is type(other.value) and self.value == other.value

    def __hash__(self) -> int:
        return hash((type(self.value), self.value))


class _Array:
    """Stands where an array was."""


def is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def split(
    tree: Any, dynamic: Callable[[Any], bool] = is_array, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[list[Any], Static]:
    """The leaves of a tree that are dynamic, and the rest of it."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=is_leaf)
    rest = tuple(Static(_Array if dynamic(leaf) else leaf) for leaf in leaves)
    return [leaf for leaf in leaves if dynamic(leaf)], Static((structure, rest))


def join(arrays: Sequence[Any], rest: Static) -> Any:
    """The tree that `split` took apart."""
    structure, leaves = rest.value
    left = iter(arrays)
    return jax.tree.unflatten(structure, [next(left) if x.value is _Array else x.value for x in leaves])
