"""The vocabulary: axis orders, convolution layouts, dimension numbers, tensors that know their order."""

from jaxlayout.layout.names import ConvDimensionNumbers, ConvLayout, KernelLayout
from jaxlayout.layout.order import Order, conversion, identity, moves_data
from jaxlayout.layout.policy import LayoutPolicy
from jaxlayout.layout.tensor import LayoutTensor

__all__ = [
    "ConvDimensionNumbers",
    "ConvLayout",
    "KernelLayout",
    "LayoutPolicy",
    "LayoutTensor",
    "Order",
    "conversion",
    "identity",
    "moves_data",
]
