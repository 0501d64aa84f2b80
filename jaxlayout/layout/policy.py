"""`LayoutPolicy`: what is believed about a backend where nothing has been measured, or nothing may be."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlayout.layout.names import ConvDimensionNumbers, ConvLayout, KernelLayout
from jaxlayout.runtime.threads import default_device


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutPolicy:
    """The prior of one kind of device. Rates are crude: they only have to rank alternatives."""

    name: str
    channels_last: bool | Callable[[int, np.dtype], bool] = True
    """Whether convolutions prefer images channels last; a function where that depends on the number of spatial axes and
    on the dtype."""
    kernel: Callable[[int], KernelLayout] = KernelLayout.io_last
    """The kernel's layout beside images channels last, by number of spatial axes; beside channels first it is OIHW."""
    flops_per_ns: float = 100.0
    """Floating-point operations per nanosecond that a good dense kernel reaches."""
    bytes_per_ns: float = 10.0
    """Memory traffic that a pass over an array reaches, bytes per nanosecond."""
    other_order: float = 2.0
    """How many times slower a convolution is in an order that is not the preferred one."""
    efficiency: Mapping[str, float] = field(default_factory=dict)
    """The share of `flops_per_ns` reached, by 'lowering:kind', kind one of dense, depthwise, grouped;
    absent: 1 for xla, and so low for any other lowering that only a measurement can choose it."""

    @classmethod
    def for_device(cls, device: Any = None) -> LayoutPolicy:
        """The prior for a device of JAX, by its platform, its compute capability and its kind; None: the default
        device. An unknown platform is taken for a CPU."""
        if device is None:
            device = default_device()
        if device.platform in ("gpu", "cuda", "rocm"):
            generation = _generation(device)
            return HOPPER if generation >= 9 else VOLTA if generation >= 7 else GPU
        if device.platform == "tpu":
            return TPU
        return ARM if platform.machine().lower().startswith(("arm", "aarch")) else X86

    def preferred(self, spatial: int, dtype: Any = np.float32) -> ConvDimensionNumbers:
        """The layouts of input, kernel and output that convolutions of so many spatial axes and a dtype prefer."""
        last = self.channels_last
        if not isinstance(last, bool):
            last = last(spatial, np.dtype(dtype))
        return self.last(spatial) if last else ConvDimensionNumbers.channels_first(spatial)

    def last(self, spatial: int) -> ConvDimensionNumbers:
        """The layouts that are channels last, whether preferred or not."""
        images = ConvLayout.channels_last(spatial)
        return ConvDimensionNumbers(images, self.kernel(spatial), images)

    def conv_ns(
        self, kind: str, lowering: str, dims: ConvDimensionNumbers, macs: int, nbytes: int, dtype: Any = np.float32
    ) -> float:
        """The believed time of a convolution of so many multiply-adds and bytes of operands, in nanoseconds."""
        share = self.efficiency.get(f"{lowering}:{kind}", 1.0 if lowering == "xla" else 0.01)
        native = lowering != "xla" or dims == self.preferred(len(dims.lhs.axes) - 2, dtype)
        return max(2 * macs / (self.flops_per_ns * share), nbytes / self.bytes_per_ns) * (
            1.0 if native else self.other_order
        )

    def conversion_ns(self, nbytes: int) -> float:
        """The least time that a transpose of `nbytes` bytes, read and written, can take, in nanoseconds: what
        fuses with its neighbours or stays in the cache is cheaper than a pass through memory."""
        return 0.5 * nbytes / self.bytes_per_ns


def _generation(device: Any) -> int:
    """The major compute capability of an NVIDIA chip: 7 Volta, 9 Hopper; 0 for any other. By name where JAX does not
    tell it: what is no H100, H200, B200, GH200 or the like is taken for a Volta."""
    capability = getattr(device, "compute_capability", None)
    if capability is not None:
        major, _, _ = str(capability).partition(".")
        return int(major) if major.isdigit() else 0  # gfx942 is AMD's
    if "NVIDIA" not in device.device_kind:
        return 0
    return 9 if re.search(r"\bG?[HB]\d{2,3}\b|Blackwell", device.device_kind) else 7


def _floats_but_doubles(spatial: int, dtype: np.dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and dtype != np.float64


def _half_in_two_axes(spatial: int, dtype: np.dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize == 2 and spatial == 2


X86 = LayoutPolicy(
    name="x86",
    # Measured on two Zen 4 cores: XLA's grouped and depthwise convolutions reach a few percent of peak.
    efficiency={
        "xla:depthwise": 0.01,
        "xla:grouped": 0.1,
        "xla:dense": 0.6,
        "dot:dense": 0.8,
        "shifted:depthwise": 0.2,
    },
)
"""XLA:CPU turns convolutions to NHWC, HWIO where it can."""
ARM = replace(X86, name="arm")
"""The same compiler; not measured."""
GPU = LayoutPolicy(name="gpu", channels_last=False, flops_per_ns=10_000.0, bytes_per_ns=500.0, other_order=1.2)
"""XLA lays out a GPU's convolutions as its HeuristicLayoutAssignment says (read, not measured): NCHW, ..."""
VOLTA = LayoutPolicy(
    name="gpu from Volta",
    channels_last=_half_in_two_axes,
    kernel=KernelLayout.i_last,
    flops_per_ns=20_000.0,
    bytes_per_ns=1_000.0,
    other_order=1.2,
)
"""... from Volta on NHWC for two axes in half precision, ..."""
HOPPER = replace(
    VOLTA, name="gpu from Hopper", channels_last=_floats_but_doubles, flops_per_ns=50_000.0, bytes_per_ns=3_000.0
)
"""... and from Hopper on NHWC for every float but float64."""
TPU = LayoutPolicy(name="tpu", flops_per_ns=50_000.0, bytes_per_ns=1_000.0, other_order=1.0)
"""A TPU's compiler chooses layouts by itself, whatever the program says."""
