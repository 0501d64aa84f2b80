"""Arrays that know how they are laid out: `LayoutTensor`, and `LazyLayoutTensor`, whose conversions wait until they are
read."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import numpy as np
from jax import lax
from jax.extend.core import get_opaque_trace_state

from jaxlayout.layout.names import ConvLayout, KernelLayout, layout_named
from jaxlayout.layout.order import Order, conversion, identity, moves_data, permuted

Layout = Order | ConvLayout | KernelLayout
"""An order of axes that have no names, or of those of an image batch or a kernel."""


def order_of(layout: Layout) -> Order:
    """The order that a layout stands for."""
    return layout if isinstance(layout, tuple) else layout.order


def _alike(layout: Layout | str, held: Layout) -> Layout:
    """A layout for a tensor that is held in another. ValueError where it has other axes."""
    if layout == held:
        return held
    found = layout_named(layout) if isinstance(layout, str) else layout
    if isinstance(found, tuple) and not isinstance(held, tuple) and sorted(found) == list(range(len(held.axes))):
        found = type(held).from_order(found)
    axes, own = (sorted(x if isinstance(x, tuple) else x.axes) for x in (found, held))
    if type(found) is not type(held) or axes != own:
        raise ValueError(f"a tensor laid out as {held} has no layout {layout}: expected the same axes in some order")
    return found


def _elementwise(op: Callable[[Any, Any], Any], swapped: bool = False) -> Callable[[LayoutTensor, Any], Any]:
    def method(self: LayoutTensor, other: Any) -> Any:
        operand = self._operand(other)
        if operand is NotImplemented:
            return NotImplemented
        return LayoutTensor(op(operand, self.data) if swapped else op(self.data, operand), self.layout)

    return method


@partial(jax.tree_util.register_dataclass, data_fields=["data"], meta_fields=["layout"])
@dataclass(frozen=True, slots=True, eq=False)
class LayoutTensor:
    """`data` holds the axes of a logical array in the order of `layout`: `data == transpose(logical, order)`.

    `layout` is an order, a tuple of axes, or a `ConvLayout` or `KernelLayout` or the text of one ('NHWC', 'HWIO'). The
    logical axes of those are N, C (O, I) and then the spatial ones, so that equal tensors have equal shapes.

    Arithmetic is elementwise, in the tensor's own layout: with numbers, and with another tensor of the same axes, which
    is converted to it. A plain array of one axis or more is refused: nothing says which of its axes is which.

    A pytree, with the layout as static data. Under `vmap` the tensor inside is one of those that are stacked outside,
    and has their layout; outside, a stack is only for `vmap` again: its shape, conversions and sums are refused.
    """

    data: jax.Array
    layout: Layout

    __array_ufunc__: ClassVar[None] = None  # NumPy arrays leave arithmetic to us

    def __post_init__(self) -> None:
        layout: Any = self.layout
        if isinstance(layout, str):
            object.__setattr__(self, "layout", layout_named(layout))
        elif isinstance(layout, tuple) and sorted(layout) != list(range(len(layout))):
            raise ValueError(f"{layout} is no order: expected each axis from 0 once")

    @classmethod
    def logical(cls, array: jax.Array) -> LayoutTensor:
        """An array as the user sees it, its axes without names."""
        return cls(array, identity(array.ndim))

    @property
    def order(self) -> Order:
        """The logical axis that each axis of `data` is."""
        return order_of(self.layout)

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape. ValueError where `data` has not as many axes as the layout."""
        self._refuse_stack()
        return permuted(self.data.shape, conversion(self.order, identity(self.ndim)))

    @property
    def ndim(self) -> int:
        """How many axes."""
        return len(self.order)

    @property
    def dtype(self) -> Any:
        """That of `data`."""
        return self.data.dtype

    def to_layout(self, layout: Layout | str) -> LayoutTensor:
        """The same tensor in another layout: itself when equal, a reshape where only axes of size 1 move, one transpose
        otherwise. ValueError for a layout of other axes."""
        wanted = _alike(layout, self.layout)
        if wanted == self.layout:
            return self
        held, order = self.order, order_of(wanted)
        if not moves_data(self.shape, held, order):
            return LayoutTensor(lax.reshape(self.data, permuted(self.shape, order)), wanted)
        return LayoutTensor(lax.transpose(self.data, conversion(held, order)), wanted)

    def map(self, fun: Callable[[jax.Array], jax.Array]) -> LayoutTensor:
        """A function of each element by itself (relu, a cast) of this tensor, in its layout."""
        return LayoutTensor(fun(self.data), self.layout)

    def _refuse_stack(self) -> None:
        if self.data.ndim != self.ndim:
            shape = self.data.shape
            raise ValueError(f"an array of shape {shape} is not laid out as {self.layout}; a stack is for vmap")

    def _operand(self, other: Any) -> Any:
        """The other side of an elementwise operation, as it meets `data`."""
        if isinstance(other, LazyLayoutTensor):
            other = other.request_layout(self.layout).materialize()
        if isinstance(other, LayoutTensor):
            self._refuse_stack()
            other._refuse_stack()
            return other.to_layout(self.layout).data
        if not isinstance(other, int | float | complex | np.generic | np.ndarray | jax.Array):
            return NotImplemented
        if np.ndim(other) > 0:
            raise TypeError(f"an array of shape {np.shape(other)} has no layout; give LayoutTensor(array, layout)")
        return other

    __add__, __radd__ = _elementwise(operator.add), _elementwise(operator.add, swapped=True)
    __sub__, __rsub__ = _elementwise(operator.sub), _elementwise(operator.sub, swapped=True)
    __mul__, __rmul__ = _elementwise(operator.mul), _elementwise(operator.mul, swapped=True)
    __truediv__, __rtruediv__ = _elementwise(operator.truediv), _elementwise(operator.truediv, swapped=True)
    __pow__, __rpow__ = _elementwise(operator.pow), _elementwise(operator.pow, swapped=True)

    def __neg__(self) -> LayoutTensor:
        return self.map(operator.neg)


@jax.tree_util.register_pytree_node_class
class LazyLayoutTensor:
    """A tensor whose conversion to `layout` is pending: it is done when it is read, and then kept.

    A request for another layout replaces the pending one, so two conversions come to one, or to none where the second
    leads back. All that are requested of one tensor share what has been converted. A pytree, of the tensor as it is
    held: what has been converted stays behind.
    """

    __slots__ = ("_made", "_trace", "layout")

    def __init__(self, tensor: LayoutTensor):
        self.layout: Layout = tensor.layout
        """That in which it will be read."""
        self._made: dict[Layout, LayoutTensor] = {tensor.layout: tensor}
        self._trace: object = get_opaque_trace_state()

    @property
    def held(self) -> LayoutTensor:
        """The tensor as it came."""
        return next(iter(self._made.values()))

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape."""
        return self.held.shape

    @property
    def ndim(self) -> int:
        """How many axes."""
        return self.held.ndim

    @property
    def dtype(self) -> Any:
        """That of the array."""
        return self.held.dtype

    @property
    def is_pending(self) -> bool:
        """Whether reading it takes a conversion."""
        return self.layout not in self._made

    def request_layout(self, layout: Layout | str) -> LazyLayoutTensor:
        """The same tensor, to be read in another layout; nothing is done yet. ValueError for one of other axes."""
        wanted = _alike(layout, self.layout)
        if wanted == self.layout:
            return self
        asked = object.__new__(type(self))
        asked.layout, asked._made, asked._trace = wanted, self._made, self._trace
        return asked

    def try_cancel_conversion(self, layout: Layout | str) -> LayoutTensor | None:
        """The tensor in a layout that it exists in already, without the conversion that is pending; None where it does
        not."""
        return self._made.get(_alike(layout, self.layout))

    def materialize(self) -> LayoutTensor:
        """The tensor in the layout requested, converted from what is held if it has not been before."""
        found = self._made.get(self.layout)
        if found is None:
            found = self.held.to_layout(self.layout)
            if get_opaque_trace_state() == self._trace:  # what an inner trace makes is of no use outside
                self._made[self.layout] = found
        return found

    def tree_flatten(self) -> tuple[tuple[Any], tuple[Layout, Layout]]:
        """For JAX."""
        return (self.held.data,), (self.held.layout, self.layout)

    @classmethod
    def tree_unflatten(cls, layouts: tuple[Layout, Layout], leaves: tuple[Any]) -> LazyLayoutTensor:
        """For JAX."""
        held, wanted = layouts
        return cls(LayoutTensor(*leaves, held)).request_layout(wanted)
