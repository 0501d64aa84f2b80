"""The lowerings that come with jaxlayout, one file each; importing this package registers them."""

from jaxlayout.convs.lowering import register_lowering
from jaxlayout.convs.lowerings.dot import Dot
from jaxlayout.convs.lowerings.im2col import Im2col
from jaxlayout.convs.lowerings.shifted import Shifted
from jaxlayout.convs.lowerings.xla import Xla

for _lowering in (Xla(), Dot(), Shifted(), Im2col()):
    register_lowering(_lowering)

__all__ = ["Dot", "Im2col", "Shifted", "Xla"]
