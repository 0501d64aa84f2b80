"""`LayoutPolicy`: what is believed about a backend before anything has been measured on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxlayout.layout.names import ConvDimensionNumbers


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutPolicy:
    """The prior of one kind of device. Rates are crude: they only have to rank alternatives."""

    name: str
    channels_last: bool = True
    """Which activations order (and the kernel order that goes with it) convolutions prefer."""
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
    def for_platform(cls, platform: str) -> LayoutPolicy:
        """The prior for a platform name as JAX gives it: 'cpu', 'gpu' ('cuda', 'rocm'), 'tpu'."""
        return _POLICIES.get(platform, _POLICIES["gpu" if platform in ("cuda", "rocm") else "cpu"])

    def preferred(self, rank: int) -> ConvDimensionNumbers:
        """The order that convolutions of `rank` spatial axes prefer."""
        form = ConvDimensionNumbers.channels_last if self.channels_last else ConvDimensionNumbers.channels_first
        return form(rank)

    def conv_ns(self, kind: str, lowering: str, dims: ConvDimensionNumbers, macs: int, nbytes: int) -> float:
        """The believed time of a convolution, in nanoseconds."""
        share = self.efficiency.get(f"{lowering}:{kind}", 1.0 if lowering == "xla" else 0.01)
        native = lowering != "xla" or dims == self.preferred(len(dims.lhs.axes) - 2)
        return max(2 * macs / (self.flops_per_ns * share), nbytes / self.bytes_per_ns) * (
            1.0 if native else self.other_order
        )

    def conversion_ns(self, nbytes: int) -> float:
        """The least time that a transpose of `nbytes` bytes, read and written, can take, in nanoseconds: what
        fuses with its neighbours or stays in the cache is cheaper than a pass through memory."""
        return 0.5 * nbytes / self.bytes_per_ns


_POLICIES = {
    # Measured on two Zen 4 cores: XLA's grouped and depthwise convolutions reach a few percent of peak.
    "cpu": LayoutPolicy(
        name="cpu",
        efficiency={
            "xla:depthwise": 0.01,
            "xla:grouped": 0.1,
            "xla:dense": 0.6,
            "dot:dense": 0.8,
            "shifted:depthwise": 0.2,
        },
    ),
    "gpu": LayoutPolicy(name="gpu", flops_per_ns=30_000.0, bytes_per_ns=2_000.0, other_order=1.2),
    "tpu": LayoutPolicy(name="tpu", flops_per_ns=50_000.0, bytes_per_ns=1_000.0, other_order=1.0),
}
