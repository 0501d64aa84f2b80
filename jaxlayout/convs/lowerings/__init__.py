"""The lowerings that come with jaxlayout, one file each; importing this package registers them."""

from jaxlayout.convs.lowering import register_lowering
from jaxlayout.convs.lowerings.dot import Dot
from jaxlayout.convs.lowerings.groups import Groups
from jaxlayout.convs.lowerings.im2col import Im2col
from jaxlayout.convs.lowerings.phases import Phases
from jaxlayout.convs.lowerings.planes import Planes
from jaxlayout.convs.lowerings.rows import Rows
from jaxlayout.convs.lowerings.shifted import Shifted
from jaxlayout.convs.lowerings.tap_dots import TapDots
from jaxlayout.convs.lowerings.xla import Xla

for _lowering in (Xla(), Dot(), Shifted(), Im2col(), TapDots(), Rows(), Groups(), Phases(), Planes()):
    register_lowering(_lowering)

__all__ = ["Dot", "Groups", "Im2col", "Phases", "Planes", "Rows", "Shifted", "TapDots", "Xla"]
