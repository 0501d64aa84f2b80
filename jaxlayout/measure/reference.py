"""`reference`: a convolution in numpy, in the highest precision there is, to check all others against."""

from itertools import product

import numpy as np

from jaxlayout.convs.signature import ConvSignature


def reference(conv: ConvSignature, lhs: np.ndarray, rhs: np.ndarray) -> np.ndarray:
    """out (N, *spatial, C) of lhs (N, *spatial, C) and rhs (*kernel, I, O).

    In float64 or complex128 whatever the operands are; integers in int64, without rounding (cast to the dtype of out
    they wrap as XLA's do). One matrix product per tap, or per position of out where these are fewer, batched over
    groups, written from the definition (XLA operation semantics, ConvWithGeneralPadding) and sharing nothing with the
    lowerings.
    """
    lhs, rhs = _widened(lhs), _widened(rhs)
    rank, groups, batch_groups = conv.rank, conv.feature_groups, conv.batch_groups
    batch, space = conv.batch // batch_groups, conv.out_spatial
    if batch_groups > 1:  # a group of images for a group of out features
        lhs = lhs.reshape(batch_groups, batch, *lhs.shape[1:])
        groups = batch_groups
    else:
        lhs = np.moveaxis(lhs.reshape(*lhs.shape[:-1], groups, conv.kernel_features), -2, 0)
    rhs = rhs.reshape(*conv.kernel, conv.kernel_features, groups, conv.out_features // groups)
    rhs = np.moveaxis(rhs, -2, rank)  # taps, group, I, O of the group
    dtype = np.result_type(lhs, rhs)
    out = np.zeros((groups, batch, *space, rhs.shape[-1]), dtype)
    if not (out.size and rhs.size and lhs.size):
        return np.zeros((batch, *space, conv.out_features), dtype)
    base = _padded(conv, lhs)
    with np.errstate(all="ignore"):  # an Inf or NaN in the operands is an answer too
        if conv.is_kernel_gradient:  # the same sum, by positions of out, which are fewer than the taps
            weights = np.moveaxis(rhs, rank, 0).reshape(groups, -1, rhs.shape[-1])
            for at in product(*map(range, space)):
                steps = zip(at, conv.strides, conv.rhs_dilation, conv.kernel, strict=True)
                window = tuple(slice(o * s, o * s + (k - 1) * d + 1, d) for o, s, d, k in steps)
                out[:, :, *at] = base[:, :, *window].reshape(groups, batch, -1) @ weights
        else:
            for tap in product(*map(range, conv.kernel)):
                steps = zip(tap, conv.rhs_dilation, conv.strides, space, strict=True)
                window = tuple(slice(t * d, t * d + (o - 1) * s + 1, s) for t, d, s, o in steps)
                view = base[:, :, *window]  # group, batch, *spatial, I
                weights = rhs[tap].reshape(groups, *[1] * rank, conv.kernel_features, -1)
                out += view * weights.squeeze(-2)[:, None] if conv.kernel_features == 1 else view @ weights
    return np.moveaxis(out, 0, -2).reshape(batch, *space, conv.out_features)


def _padded(conv: ConvSignature, lhs: np.ndarray) -> np.ndarray:
    """lhs (group, batch, *spatial, features) with zeros between and around; negative padding cuts."""
    for axis, (lo, hi) in enumerate(conv.padding, start=2):
        dilation, size = conv.lhs_dilation[axis - 2], lhs.shape[axis]
        shape = list(lhs.shape)
        shape[axis] = (size - 1) * dilation + 1 + max(lo, 0) + max(hi, 0)
        wide, inner = np.zeros(shape, lhs.dtype), [slice(None)] * lhs.ndim
        inner[axis] = slice(max(lo, 0), shape[axis] - max(hi, 0), dilation)
        wide[tuple(inner)] = lhs
        inner[axis] = slice(max(-lo, 0), shape[axis] - max(-hi, 0))
        lhs = wide[tuple(inner)]
    return lhs


def _widened(array: np.ndarray) -> np.ndarray:
    array = np.asarray(array)
    if array.dtype.kind in "biu":
        return array.astype(np.int64)
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)
