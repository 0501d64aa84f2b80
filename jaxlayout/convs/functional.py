"""Convolutions and patches of `LayoutTensor`s, in the layouts that a policy prefers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import lax

from jaxlayout.convs.lowerings.im2col import patches
from jaxlayout.convs.signature import ConvSignature
from jaxlayout.layout import (
    ConvDimensionNumbers,
    KernelLayout,
    Layout,
    LayoutPolicy,
    LayoutTensor,
    LazyLayoutTensor,
)

Tensor = LayoutTensor | LazyLayoutTensor
Padding = str | int | Sequence[tuple[int, int]]


def conv1d_auto_layout(
    input: Tensor,
    kernel: Tensor,
    stride: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    *,
    policy: LayoutPolicy | None = None,
    **params: Any,
) -> LayoutTensor:
    """`conv2d_auto_layout` in one spatial axis: NCW, OIW and their like."""
    return _convolution(1, input, kernel, stride, padding, policy, params)


def conv2d_auto_layout(
    input: Tensor,
    kernel: Tensor,
    stride: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    *,
    policy: LayoutPolicy | None = None,
    **params: Any,
) -> LayoutTensor:
    """A convolution (cross-correlation, as in `jax.lax`) in the layouts that the policy prefers.

    The operands are converted to those where they are in others, the result stays in the one it has: nothing is
    converted back until somebody asks (`to_layout`), so a chain of convolutions converts at its ends. Operands that are
    lazy are converted once, however many convolutions read them. It goes by the policy alone; inside a function under
    `auto_layout` it is a convolution like any other, and measured.

    Args:
      input: (N, C, H, W), laid out as any `ConvLayout`.
      kernel: (O, I, H, W), laid out as any `KernelLayout`.
      stride: of the window, for each spatial axis or for all.
      padding: 'SAME', 'VALID', (low, high) for each spatial axis, or one number for all sides.
      policy: that of the default device where none is given.
      params: other keywords of `jax.lax.conv_general_dilated`: rhs_dilation, feature_group_count, precision, ...

    Returns:
      (N, O, H', W') in the policy's output layout.

    Raises:
      TypeError: for an operand that is no tensor with a layout.
      ValueError: for layouts of another kind or number of axes, and what `jax.lax` refuses.
    """
    return _convolution(2, input, kernel, stride, padding, policy, params)


def conv3d_auto_layout(
    input: Tensor,
    kernel: Tensor,
    stride: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    *,
    policy: LayoutPolicy | None = None,
    **params: Any,
) -> LayoutTensor:
    """`conv2d_auto_layout` in three spatial axes: NCDHW, OIDHW and their like."""
    return _convolution(3, input, kernel, stride, padding, policy, params)


def im2col_with_layout(
    input: Tensor,
    kernel: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    *,
    dilation: int | Sequence[int] = 1,
) -> tuple[LayoutTensor, KernelLayout]:
    """What each position of a convolution's output reads, side by side: the convolution is then one matrix product.

    Args:
      input: (N, C, *spatial), laid out as a `ConvLayout`. Channels first stays so; all else is taken channels last.
      kernel: the window's size, for each spatial axis or for all.
      stride: of the window, for each spatial axis or for all.
      padding: as in `conv2d_auto_layout`.
      dilation: of the window, for each spatial axis or for all.

    Returns:
      The patches, (N, C x taps, *output's spatial sizes), in the layout they come in, and the layout of kernels that
      they multiply: channels last a patch is taps then features, as a column of an HWIO kernel; channels first it is
      features then taps, as a row of an OIHW one.

    Raises:
      TypeError: for an input that is no tensor with a layout.
      ValueError: for a layout of another kind or number of axes.
    """
    spatial = input.ndim - 2 if isinstance(input, Tensor) else 0
    first, last = ConvDimensionNumbers.channels_first(spatial), ConvDimensionNumbers.channels_last(spatial)
    dims = first if getattr(input, "layout", None) == first.lhs else last
    lhs = _in_layout("input", input, dims.lhs)
    batch, features, *sizes = lhs.shape
    window, strides, steps = (_each(spatial, x) for x in (kernel, stride, dilation))
    reach = [(size - 1) * step + 1 for size, step in zip(window, steps, strict=True)]
    pads = _pads(spatial, padding)
    conv = ConvSignature(
        batch=batch,
        in_features=features,
        out_features=1,
        spatial=tuple(sizes),
        kernel=window,
        strides=strides,
        padding=tuple(lax.padtype_to_pads(sizes, reach, strides, pads) if isinstance(pads, str) else pads),
        lhs_dilation=(1,) * spatial,
        rhs_dilation=steps,
        lhs_dtype=np.dtype(lhs.dtype),
        rhs_dtype=np.dtype(lhs.dtype),
    )
    return LayoutTensor(patches(conv, dims, lhs.data), dims.lhs), dims.rhs


def _convolution(
    spatial: int,
    input: Tensor,
    kernel: Tensor,
    stride: int | Sequence[int],
    padding: Padding,
    policy: LayoutPolicy | None,
    params: dict[str, Any],
) -> LayoutTensor:
    policy = LayoutPolicy.for_device() if policy is None else policy
    dims = policy.preferred(spatial, getattr(input, "dtype", np.float32))
    lhs, rhs = _in_layout("input", input, dims.lhs), _in_layout("kernel", kernel, dims.rhs)
    numbers = {"dimension_numbers": dims.to_lax(), "padding": _pads(spatial, padding)}
    out = lax.conv_general_dilated(lhs.data, rhs.data, _each(spatial, stride), **numbers, **params)
    return LayoutTensor(out, dims.out)


def _in_layout(what: str, tensor: Tensor, layout: Layout) -> LayoutTensor:
    """An operand in a layout, from there if it has been there before."""
    if isinstance(tensor, LazyLayoutTensor):
        return tensor.request_layout(layout).materialize()
    if isinstance(tensor, LayoutTensor):
        return tensor.to_layout(layout)
    raise TypeError(f"{what}: expected a LayoutTensor or LazyLayoutTensor, not {type(tensor).__name__}")


def _each(spatial: int, value: int | Sequence[int]) -> tuple[int, ...]:
    """A number for each spatial axis."""
    values = (value,) * spatial if isinstance(value, int) else tuple(value)
    if len(values) != spatial:
        raise ValueError(f"{value}: expected one number, or {spatial}")
    return values


def _pads(spatial: int, padding: Padding) -> str | list[tuple[int, int]]:
    """As `jax.lax` wants it."""
    if isinstance(padding, str):
        return padding
    return [(padding, padding)] * spatial if isinstance(padding, int) else list(padding)
