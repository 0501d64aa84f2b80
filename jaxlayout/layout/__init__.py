"""The vocabulary.

- `order`: the axes of the array that is really there, as a permutation of those that the user sees.
- `names`: orders with names: the layouts of images and kernels, the dimension numbers of a convolution.
- `tensor`: arrays that know their layout, and convert when they are read.
- `policy`: what is believed about a backend where nothing has been measured.
"""

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
