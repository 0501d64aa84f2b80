"""`ConvSignature`: what a convolution computes, whatever the orders of its axes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from numbers import Integral
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxlayout.layout import ConvDimensionNumbers, ConvLayout, KernelLayout

Context = Literal["entry", "nested"]
"""Where a convolution is compiled: "entry", in the entry computation, or "nested", in a loop body or a branch, which
XLA's CPU backend lays out differently. A call is part of what calls it, as XLA inlines it. Of a decorated function that
is called inside another jit all is nested: where that stands is not known."""

_WIDE = frozenset(map(np.dtype, (np.float64, np.int64, np.uint64, np.complex128)))


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvSignature:
    """What a convolution computes. Equal signatures compute the same thing at the same cost and are measured once.

    Sizes are in elements. What is given for each spatial axis has them in their order: depth, height, width.
    """

    batch: int
    in_features: int
    out_features: int
    spatial: tuple[int, ...]
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    feature_groups: int = 1
    batch_groups: int = 1
    lhs_dtype: np.dtype
    rhs_dtype: np.dtype
    preferred_element_type: np.dtype | None = None
    precision: Any = None
    context: Context = "entry"
    """Where it is compiled."""

    @classmethod
    def of(cls, lhs: Any, rhs: Any, params: Mapping[str, Any], context: Context = "entry") -> ConvSignature:
        """Of a `conv_general_dilated` (or `tuned_conv`) equation: `lhs` and `rhs` have shape and dtype."""
        numbers = params["dimension_numbers"]
        batch, in_features, *spatial = (lhs.shape[i] for i in numbers.lhs_spec)
        out_features, _, *kernel = (rhs.shape[i] for i in numbers.rhs_spec)
        preferred = params["preferred_element_type"]
        return cls(
            batch=batch,
            in_features=in_features,
            out_features=out_features,
            spatial=tuple(spatial),
            kernel=tuple(kernel),
            strides=tuple(params["window_strides"]),
            padding=tuple((lo, hi) for lo, hi in params["padding"]),
            lhs_dilation=tuple(params["lhs_dilation"]),
            rhs_dilation=tuple(params["rhs_dilation"]),
            feature_groups=params["feature_group_count"],
            batch_groups=params["batch_group_count"],
            lhs_dtype=np.dtype(lhs.dtype),
            rhs_dtype=np.dtype(rhs.dtype),
            preferred_element_type=None if preferred is None else np.dtype(preferred),
            precision=params["precision"],
            context=context,
        )

    @property
    def params(self) -> dict[str, Any]:
        """The keywords of `jax.lax.conv_general_dilated` that do not depend on the order."""
        return {
            "window_strides": self.strides,
            "padding": self.padding,
            "lhs_dilation": self.lhs_dilation,
            "rhs_dilation": self.rhs_dilation,
            "feature_group_count": self.feature_groups,
            "batch_group_count": self.batch_groups,
            "precision": self.precision,
            "preferred_element_type": self.preferred_element_type,
        }

    @property
    def key(self) -> str:
        """Canonical text, the key in the cost table."""
        return (
            f"lhs={self.batch}x{self.in_features}{list(self.spatial)}{self.lhs_dtype} "
            f"rhs={self.out_features}{list(self.kernel)}{self.rhs_dtype} stride={list(self.strides)} "
            f"pad={[list(p) for p in self.padding]} dilate={list(self.lhs_dilation)}{list(self.rhs_dilation)} "
            f"groups={self.feature_groups},{self.batch_groups} precision={self.precision} "
            f"to={self.preferred_element_type} in={self.context}"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data. ValueError for a precision that has no name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        found |= {name: None if found[name] is None else str(found[name]) for name in _DTYPES}
        return found | {"precision": _precision_names(self.precision)}

    @classmethod
    def from_json(cls, data: Any) -> ConvSignature:
        """The inverse of `to_json`, for data that it made."""
        given = {name: _tuples(value) for name, value in data.items()}
        given |= {name: None if data[name] is None else jnp.dtype(data[name]) for name in _DTYPES}
        return cls(**given | {"precision": _precision_named(data["precision"])})

    @property
    def rank(self) -> int:
        """How many spatial axes."""
        return len(self.spatial)

    @property
    def out_dtype(self) -> np.dtype:
        """The dtype of out."""
        return self.preferred_element_type or self.lhs_dtype

    @property
    def out_spatial(self) -> tuple[int, ...]:
        """The spatial sizes of out."""

        def dilated(size: int, dilation: int) -> int:
            return 0 if size == 0 else (size - 1) * dilation + 1

        window = [dilated(k, d) for k, d in zip(self.kernel, self.rhs_dilation, strict=True)]
        base = [
            dilated(s, d) + lo + hi
            for s, d, (lo, hi) in zip(self.spatial, self.lhs_dilation, self.padding, strict=True)
        ]
        return tuple(max(0, (b - w) // s + 1) for b, w, s in zip(base, window, self.strides, strict=True))

    @property
    def kernel_features(self) -> int:
        """Input features of one group: the kernel's I."""
        return self.in_features // self.feature_groups

    @property
    def is_depthwise(self) -> bool:
        """One input feature for each group (any channel multiplier)."""
        return self.feature_groups == self.in_features > 1 and self.batch_groups == 1

    @property
    def kind(self) -> str:
        """'depthwise', 'grouped' or 'dense', as a `LayoutPolicy` tells them apart."""
        return "depthwise" if self.is_depthwise else "grouped" if self.feature_groups > 1 else "dense"

    @property
    def is_pointwise(self) -> bool:
        """Every output element reads one input position: a 1x1 kernel without padding or lhs dilation."""
        return (
            math.prod(self.kernel) == 1
            and not any(lo or hi for lo, hi in self.padding)
            and all(d == 1 for d in self.lhs_dilation)
        )

    @property
    def is_empty(self) -> bool:
        """Whether lhs, rhs or out has no element: out is zeros."""
        sizes = (*self.spatial, *self.kernel, *self.out_spatial)
        return 0 in (self.batch, self.in_features, self.out_features, *sizes)

    @property
    def is_wide(self) -> bool:
        """Whether an array of it has a dtype of 64 bits, which JAX has where it is told to."""
        return not {self.lhs_dtype, self.rhs_dtype, self.out_dtype}.isdisjoint(_WIDE)

    @property
    def crosses(self) -> bool:
        """Whether along some axis padding cuts on one side and adds on the other. Where it cuts before and adds after,
        without lhs dilation, XLA:CPU reads past lhs in some versions (`_compat.KNOWN_BAD`)."""
        known = (edges for edges in self.padding if all(isinstance(edge, Integral) for edge in edges))
        return any(min(edges) < 0 < max(edges) for edges in known)

    @property
    def misread(self) -> tuple[bool, ...]:
        """Of each spatial axis, whether XLA may take it for one of groups, which it is not: no padding, lhs dilated by
        the size of the kernel, the stride one less. While it swaps lhs and rhs it then takes lhs to be as large as the
        kernel, and ends the process (CPU, jaxlib 0.10 to 0.12)."""
        windows = zip(self.kernel, self.padding, self.lhs_dilation, self.rhs_dilation, self.strides, strict=True)
        looks = [window == (window[0], (0, 0), window[0], 1, window[0] - 1) for window in windows]
        sizes = zip(self.spatial, self.kernel, looks, strict=True)
        return tuple(not self.is_grouped and like and size != taps for size, taps, like in sizes)

    @property
    def masks(self) -> bool:
        """Whether XLA computes each group of images with the kernels of all and masks what is not wanted: what is no
        number comes to other groups then, how far depends on how XLA simplified it."""
        return 1 < self.batch_groups < self.batch

    @property
    def is_grouped(self) -> bool:
        """Whether it has several groups, of features or of images."""
        return self.feature_groups > 1 or self.batch_groups > 1

    @property
    def is_product(self) -> bool:
        """Whether each group is a product of matrices, but for strides, padding and dilation: along each axis there is
        one position of lhs, one tap of the kernel, or one position of out."""
        return all(1 in sizes for sizes in zip(self.spatial, self.kernel, self.out_spatial, strict=True))

    @property
    def kept(self) -> tuple[tuple[int, int], ...]:
        """Along each spatial axis, from where to where lhs is left by negative padding."""
        cuts = [[max(0, -(edge // d)) for edge in edges] for edges, d in self._edges]
        return tuple((lo, max(lo, size - hi)) for size, (lo, hi) in zip(self.spatial, cuts, strict=True))

    @property
    def cropped(self) -> ConvSignature:
        """The same convolution of what is `kept` of lhs, without negative padding; itself where nothing crosses. Where
        nothing is kept, it is empty, and out is zeros."""
        if not self.crosses:
            return self
        # An element that is cut takes the zeros after it along: of those, the ones that were left come back.
        padding = tuple((max(lo, lo % d), max(hi, hi % d)) for (lo, hi), d in self._edges)
        return replace(self, spatial=tuple(b - a for a, b in self.kept), padding=padding)

    @property
    def _edges(self) -> list[tuple[tuple[int, int], int]]:
        return list(zip(self.padding, self.lhs_dilation, strict=True))

    @property
    def is_kernel_gradient(self) -> bool:
        """Fewer positions of out than taps, as where autodiff computes a kernel's gradient with the cotangent in the
        kernel's place."""
        known = all(isinstance(size, int) for size in (*self.out_spatial, *self.kernel))  # and not symbolic
        return known and math.prod(self.out_spatial) < math.prod(self.kernel)

    @property
    def accumulator(self) -> np.dtype:
        """The dtype that products are summed in: that of out, float32 for half precision."""
        half = jnp.issubdtype(self.out_dtype, np.floating) and self.out_dtype.itemsize < 4
        return np.dtype(np.float32) if half else self.out_dtype

    @property
    def partial_type(self) -> np.dtype | None:
        """The `preferred_element_type` of a part of the sum, which is to be rounded once, with the rest."""
        return self.preferred_element_type if self.accumulator == self.out_dtype else self.accumulator

    @property
    def contraction(self) -> int:
        """How many products are summed into one output element, K."""
        return self.kernel_features * math.prod(self.kernel)

    @property
    def macs(self) -> int:
        """Multiply-adds of the convolution as written."""
        return math.prod(self.out_shape(ConvLayout.channels_last(self.rank))) * self.contraction

    @property
    def products(self) -> int:
        """Multiply-adds that have an element on either side: none with a zero of a padding or dilation."""

        def along(axis: int) -> int:
            met = np.arange(self.out_spatial[axis]) * self.strides[axis] - self.padding[axis][0]
            taps, base, size = self.kernel[axis], self.lhs_dilation[axis], self.spatial[axis]
            reads = (met + tap * self.rhs_dilation[axis] for tap in range(taps))
            return sum(int(np.sum((at % base == 0) & (at >= 0) & (at < size * base))) for at in reads)

        positions = math.prod(map(along, range(self.rank)))
        return self.batch // self.batch_groups * self.out_features * self.kernel_features * positions

    @property
    def nbytes(self) -> int:
        """Bytes of lhs, rhs and out."""
        last, kernel = ConvLayout.channels_last(self.rank), KernelLayout.io_last(self.rank)
        sizes = self.lhs_shape(last), self.rhs_shape(kernel), self.out_shape(last)
        dtypes = self.lhs_dtype, self.rhs_dtype, self.out_dtype
        return sum(math.prod(size) * dtype.itemsize for size, dtype in zip(sizes, dtypes, strict=True))

    def lhs_shape(self, layout: ConvLayout) -> tuple[int, ...]:
        """The shape of lhs in a layout."""
        return self._shape(layout.axes, N=self.batch, C=self.in_features, spatial=self.spatial)

    def rhs_shape(self, layout: KernelLayout) -> tuple[int, ...]:
        """The shape of rhs in a layout."""
        return self._shape(layout.axes, O=self.out_features, I=self.kernel_features, spatial=self.kernel)

    def out_shape(self, layout: ConvLayout) -> tuple[int, ...]:
        """The shape of out in a layout."""
        batch = self.batch // self.batch_groups
        return self._shape(layout.axes, N=batch, C=self.out_features, spatial=self.out_spatial)

    def _shape(self, axes: str, *, spatial: tuple[int, ...], **sizes: int) -> tuple[int, ...]:
        names = ConvLayout.channels_last(self.rank).spatial
        sizes |= dict(zip(names, spatial, strict=True))
        return tuple(sizes[a] for a in axes)


_DTYPES = ("lhs_dtype", "rhs_dtype", "preferred_element_type")


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _precision_names(precision: Any) -> Any:
    if isinstance(precision, tuple):
        return list(map(_precision_names, precision))
    if precision is not None and not isinstance(precision, lax.Precision):
        raise ValueError(f"a precision without a name: {precision!r}")
    return None if precision is None else precision.name


def _precision_named(names: Any) -> Any:
    return tuple(map(_precision_named, names)) if isinstance(names, list) else names and lax.Precision[names]


def written_dims(params: Mapping[str, Any]) -> ConvDimensionNumbers:
    """The layouts in which an equation has its operands and result."""
    return ConvDimensionNumbers.from_lax(params["dimension_numbers"])
