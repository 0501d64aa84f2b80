"""Named layouts of convolutions: `ConvLayout` (NCHW ...), `KernelLayout` (OIHW ...), and the three of one
convolution together, `ConvDimensionNumbers`.

A layout names the role of each axis of an array: for images N (batch) and C (features), for kernels O
(output features) and I (input features of one group), and the spatial axes, which are written W, HW or
DHW for one to three of them and by digits beyond.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from jax import lax

from jaxlayout.layout.order import Order


def spatial_names(rank: int) -> str:
    """The letters of `rank` spatial axes: '', 'W', 'HW', 'DHW', then '0123'."""
    return "DHW"[3 - rank :] if rank <= 3 else "".join(map(str, range(rank)))


@dataclass(frozen=True, slots=True)
class _Layout:
    axes: str
    """The role of each axis, first axis first."""

    features: ClassVar[str]
    example: ClassVar[str]

    def __post_init__(self) -> None:
        if not isinstance(self.axes, str):
            raise TypeError(f"{type(self).__name__}({self.axes!r}): expected text such as {self.example!r}")
        axes = self.axes.upper()
        spatial = [a for a in axes if a not in self.features]
        names = spatial_names(len(spatial))
        if all(a.isdigit() for a in spatial):
            axes = axes.translate(str.maketrans("".join(sorted(spatial)), names))
        if sorted(axes) != sorted(self.features + names):
            one, two = self.features
            raise ValueError(
                f"{type(self).__name__}({self.axes!r}): expected {one}, {two} and the spatial axes "
                f"{names or '(none)'}, each once, in any order"
            )
        object.__setattr__(self, "axes", axes)

    def __str__(self) -> str:
        return self.axes

    @property
    def spatial(self) -> str:
        """The spatial axes in their logical order (D before H before W), wherever they stand."""
        return spatial_names(len(self.axes) - 2)

    @property
    def spec(self) -> tuple[int, ...]:
        """As `jax.lax` counts it: where the two feature axes and then the spatial axes stand."""
        return tuple(map(self.axes.index, self._names(len(self.axes))))

    @classmethod
    def from_spec(cls, spec: Sequence[int]) -> Self:
        """The inverse of `spec`. ValueError for what is no permutation of two axes or more."""
        if len(spec) < 2 or sorted(spec) != list(range(len(spec))):
            raise ValueError(f"{cls.__name__}.from_spec({tuple(spec)}): expected where each axis stands, from 0, once")
        names = cls._names(len(spec))
        return cls("".join(name for _, name in sorted(zip(spec, names, strict=True))))

    @classmethod
    def _read(cls, given: str | Sequence[int]) -> Self:
        return cls(given) if isinstance(given, str) else cls.from_spec(given)

    @property
    def order(self) -> Order:
        """The order of an array laid out so, whose logical axes are counted as `jax.lax` does: the two feature axes,
        then the spatial ones."""
        return tuple(map(self._names(len(self.axes)).index, self.axes))

    @classmethod
    def from_order(cls, order: Order) -> Self:
        """The inverse of `order`."""
        names = cls._names(len(order))
        return cls("".join(names[axis] for axis in order))

    @classmethod
    def _names(cls, rank: int) -> str:
        return cls.features + spatial_names(rank - 2)

    def permutation_from(self, other: Self) -> Order:
        """The permutation that takes an array laid out as `other` to this layout."""
        if sorted(self.axes) != sorted(other.axes):
            raise ValueError(f"{other} has not the axes of {self}")
        return tuple(other.axes.index(a) for a in self.axes)


class ConvLayout(_Layout):
    """The axes of an image batch, lhs or out: N, C and the spatial ones, in any order."""

    __slots__ = ()
    features = "NC"
    example = "NHWC"

    @classmethod
    def channels_last(cls, spatial: int) -> ConvLayout:
        """NWC, NHWC, NDHWC."""
        return cls(f"N{spatial_names(spatial)}C")

    @classmethod
    def channels_first(cls, spatial: int) -> ConvLayout:
        """NCW, NCHW, NCDHW."""
        return cls(f"NC{spatial_names(spatial)}")

    @property
    def is_channels_first(self) -> bool:
        """Whether the features come before every spatial axis."""
        return all(self.axes.index("C") < self.axes.index(a) for a in self.spatial)

    @property
    def is_channels_last(self) -> bool:
        """Whether the features are the last axis."""
        return self.axes[-1] == "C"


class KernelLayout(_Layout):
    """The axes of a kernel, rhs: O, I and the spatial ones, in any order."""

    __slots__ = ()
    features = "OI"
    example = "HWIO"

    @classmethod
    def io_last(cls, spatial: int) -> KernelLayout:
        """WIO, HWIO, DHWIO: what goes with channels last in most libraries."""
        return cls(f"{spatial_names(spatial)}IO")

    @classmethod
    def oi_first(cls, spatial: int) -> KernelLayout:
        """OIW, OIHW, OIDHW: what goes with channels first in most libraries."""
        return cls(f"OI{spatial_names(spatial)}")

    @classmethod
    def i_last(cls, spatial: int) -> KernelLayout:
        """OWI, OHWI, ODHWI: what cuDNN takes with channels last."""
        return cls(f"O{spatial_names(spatial)}I")


def layout_named(text: str) -> ConvLayout | KernelLayout:
    """The layout of images or of a kernel that a text names: only a kernel has an O and an I."""
    return (KernelLayout if {"O", "I"} & set(text.upper()) else ConvLayout)(text)


@dataclass(frozen=True, slots=True)
class ConvDimensionNumbers:
    """The layouts of one convolution's lhs, rhs and out, each free of the others."""

    lhs: ConvLayout
    rhs: KernelLayout
    out: ConvLayout

    def __post_init__(self) -> None:
        if not len(self.lhs.axes) == len(self.rhs.axes) == len(self.out.axes):
            raise ValueError(f"{self}: the three layouts must have the same number of spatial axes")

    def __str__(self) -> str:
        return f"{self.lhs},{self.rhs}->{self.out}"

    @classmethod
    def channels_last(cls, spatial: int) -> ConvDimensionNumbers:
        """NHWC,HWIO->NHWC: XLA's canonical form on CPU."""
        images = ConvLayout.channels_last(spatial)
        return cls(images, KernelLayout.io_last(spatial), images)

    @classmethod
    def channels_first(cls, spatial: int) -> ConvDimensionNumbers:
        """NCHW,OIHW->NCHW."""
        images = ConvLayout.channels_first(spatial)
        return cls(images, KernelLayout.oi_first(spatial), images)

    @classmethod
    def kernel_gradient(cls, spatial: int) -> ConvDimensionNumbers:
        """CHWN,IHWO->HWNC: what `jax.grad` writes for the kernel of a channels-last convolution. The input is lhs, its
        features the batch; the cotangent is rhs, the images are what is summed over; out is the kernel."""
        names = spatial_names(spatial)
        return cls(ConvLayout(f"C{names}N"), KernelLayout(f"I{names}O"), ConvLayout(f"{names}NC"))

    @classmethod
    def parse(cls, text: str) -> ConvDimensionNumbers:
        """From text such as 'NHWC,HWIO->NHWC'; ValueError for other text."""
        try:
            operands, out = text.split("->")
            lhs, rhs = operands.split(",")
        except ValueError:
            raise ValueError(f"{text!r}: expected dimension numbers such as 'NHWC,HWIO->NHWC'") from None
        return cls(ConvLayout(lhs.strip()), KernelLayout(rhs.strip()), ConvLayout(out.strip()))

    @classmethod
    def from_lax(cls, numbers: lax.ConvDimensionNumbers | Sequence[str | Sequence[int]]) -> ConvDimensionNumbers:
        """From what a `conv_general_dilated` equation carries, or what the function takes: lhs, rhs and out, each as
        text ('NHWC', 'HWIO', 'NHWC') or as numbers."""
        if isinstance(numbers, str) or len(numbers) != 3:
            raise ValueError(f"{numbers!r}: expected the layouts of lhs, rhs and out, such as ('NHWC', 'HWIO', 'NHWC')")
        lhs, rhs, out = numbers
        return cls(ConvLayout._read(lhs), KernelLayout._read(rhs), ConvLayout._read(out))

    def to_lax(self) -> lax.ConvDimensionNumbers:
        """As `jax.lax` wants it."""
        return lax.ConvDimensionNumbers(self.lhs.spec, self.rhs.spec, self.out.spec)
