"""The layouts of a plain chain of convolutions: the solver's problem where the graph is a line, and costs are a
policy's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from jaxlayout.convs.lowering import lowering_named
from jaxlayout.convs.signature import ConvSignature
from jaxlayout.graph.minsum import Factor, minimise
from jaxlayout.layout import ConvDimensionNumbers, ConvLayout, KernelLayout, LayoutPolicy, moves_data


def select_layout_for_sequence(
    ops: Sequence[ConvSignature], policy: LayoutPolicy, *, written: ConvDimensionNumbers | None = None
) -> tuple[ConvDimensionNumbers, ...]:
    """The layouts of convolutions one after the other, each reading what the one before it gives, that together with
    the conversions between them cost the least by a policy's beliefs.

    Args:
      ops: the convolutions, all of as many spatial axes.
      policy: what a convolution and a conversion are believed to cost.
      written: the layouts in which the first input and every kernel come and the last output is wanted; None: they come
        as they are wanted.

    Returns:
      The layouts of each, out of the policy's own, the common ones and `written`. ValueError for convolutions of
      different numbers of spatial axes.
    """
    ranks = {op.rank for op in ops} | ({len(written.lhs.axes) - 2} if written else set())
    if len(ranks) > 1:
        raise ValueError(f"convolutions of {sorted(ranks)} spatial axes in one sequence: expected as many in each")
    offered = [_offered(op, policy, written) for op in ops]
    factors = [
        Factor((i,), np.array([_alone(op, dims, policy, written) for dims in offered[i]])) for i, op in enumerate(ops)
    ]
    for (i, op), (j, _) in pairwise(enumerate(ops)):
        between = [[_moved(op.out_shape, op.out_dtype, a.out, b.lhs, policy) for b in offered[j]] for a in offered[i]]
        factors.append(Factor((i, j), np.array(between)))
    if written and ops:
        entering = [_moved(ops[0].lhs_shape, ops[0].lhs_dtype, written.lhs, dims.lhs, policy) for dims in offered[0]]
        leaving = [_moved(ops[-1].out_shape, ops[-1].out_dtype, dims.out, written.out, policy) for dims in offered[-1]]
        factors += [Factor((0,), np.array(entering)), Factor((len(ops) - 1,), np.array(leaving))]
    solution = minimise([len(found) for found in offered], factors)
    return tuple(found[i] for found, i in zip(offered, solution.assignment, strict=True))


def _offered(
    op: ConvSignature, policy: LayoutPolicy, written: ConvDimensionNumbers | None
) -> tuple[ConvDimensionNumbers, ...]:
    common = lowering_named("xla").dimension_numbers(op.cropped)
    return tuple(dict.fromkeys((*([written] if written else ()), policy.preferred(op.rank, op.lhs_dtype), *common)))


def _alone(
    op: ConvSignature, dims: ConvDimensionNumbers, policy: LayoutPolicy, written: ConvDimensionNumbers | None
) -> float:
    """The believed cost of a convolution in some layouts, its kernel converted to them."""
    kernel = _moved(op.rhs_shape, op.rhs_dtype, written.rhs, dims.rhs, policy) if written else 0.0
    return kernel + policy.conv_ns(op.kind, "xla", dims, op.macs, op.nbytes, op.lhs_dtype)


def _moved(
    shape_in: Any,
    dtype: np.dtype,
    held: ConvLayout | KernelLayout,
    wanted: ConvLayout | KernelLayout,
    policy: LayoutPolicy,
) -> float:
    """The believed cost of a conversion; `shape_in` gives the array's shape in a layout."""
    logical = shape_in(type(held).from_order(tuple(range(len(held.axes)))))
    if not moves_data(logical, held.order, wanted.order):
        return 0.0
    return policy.conversion_ns(math.prod(logical) * dtype.itemsize)
