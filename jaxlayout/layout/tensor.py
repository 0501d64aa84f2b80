"""`LayoutTensor`: an array together with its order, the value that the interpreter carries."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import jax
from jax import lax

from jaxlayout.layout.order import Order, conversion, identity, moves_data, permuted


@partial(jax.tree_util.register_dataclass, data_fields=["data"], meta_fields=["order"])
@dataclass(frozen=True, slots=True)
class LayoutTensor:
    """`data` holds the axes of a logical array in `order`: `data == transpose(logical, order)`."""

    data: jax.Array
    order: Order = field(default=())

    @classmethod
    def logical(cls, array: jax.Array) -> LayoutTensor:
        """An array as the user sees it."""
        return cls(array, identity(array.ndim))

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape."""
        return permuted(self.data.shape, conversion(self.order, identity(self.data.ndim)))

    def to(self, order: Order) -> LayoutTensor:
        """The same tensor in another order: itself when equal, a reshape where only axes of size 1 move,
        one transpose otherwise."""
        if order == self.order:
            return self
        if not moves_data(self.shape, self.order, order):
            return LayoutTensor(lax.reshape(self.data, permuted(self.shape, order)), order)
        return LayoutTensor(lax.transpose(self.data, conversion(self.order, order)), order)
