"""The vocabulary: axis orders, convolution layouts, dimension numbers, tensors that know how they are laid out."""

from jaxlayout.layout.names import ConvDimensionNumbers, ConvLayout, KernelLayout
from jaxlayout.layout.order import Order, conversion, identity, moves_data
from jaxlayout.layout.policy import LayoutPolicy
from jaxlayout.layout.tensor import Layout, LayoutTensor, LazyLayoutTensor

__all__ = [
    "ConvDimensionNumbers",
    "ConvLayout",
    "KernelLayout",
    "Layout",
    "LayoutPolicy",
    "LayoutTensor",
    "LazyLayoutTensor",
    "Order",
    "conversion",
    "identity",
    "moves_data",
]
