"""The lowerings that come with jaxlayout, one file each; importing this package registers them."""

from jaxlayout.convs.lowering import register_lowering
from jaxlayout.convs.lowerings.dot import Dot
from jaxlayout.convs.lowerings.fft import Fft
from jaxlayout.convs.lowerings.groups import Groups
from jaxlayout.convs.lowerings.im2col import Im2col
from jaxlayout.convs.lowerings.materialised import Materialised
from jaxlayout.convs.lowerings.merged import Merged
from jaxlayout.convs.lowerings.phases import Phases
from jaxlayout.convs.lowerings.planes import Planes
from jaxlayout.convs.lowerings.rows import Rows
from jaxlayout.convs.lowerings.shifted import Shifted
from jaxlayout.convs.lowerings.space_to_depth import SpaceToDepth
from jaxlayout.convs.lowerings.tap_dots import TapDots
from jaxlayout.convs.lowerings.wide_planes import WidePlanes
from jaxlayout.convs.lowerings.winograd import Winograd2, Winograd4
from jaxlayout.convs.lowerings.xla import Cropped, Xla

_PLAIN = (Xla(), Cropped(), Dot(), Shifted(), Im2col(), TapDots(), Rows())
_COMPOSITE = (Groups(), Phases(), Planes(), WidePlanes(), Materialised())
_RELAXED = (Winograd2(), Winograd4(), Fft(), SpaceToDepth(), Merged())

for _lowering in (*_PLAIN, *_COMPOSITE, *_RELAXED):
    register_lowering(_lowering)

__all__ = [
    "Cropped",
    "Dot",
    "Fft",
    "Groups",
    "Im2col",
    "Materialised",
    "Merged",
    "Phases",
    "Planes",
    "Rows",
    "Shifted",
    "SpaceToDepth",
    "TapDots",
    "WidePlanes",
    "Winograd2",
    "Winograd4",
    "Xla",
]
