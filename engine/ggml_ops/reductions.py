"""Sums, means, running sums, the index of the largest element, and pooling."""

import numpy as np

from ..backend import Array, module_of
from .params import OpParams, Shape, as_floats

_POOL_MAX, _POOL_AVG = 0, 1  # ggml_op_pool


def sum_all(x: Array, *, params: OpParams, shape: Shape) -> Array:
    """The sum of all elements, in float64. Mirrors ggml_compute_forward_sum_f32."""
    (x,) = as_floats(x)
    return x.sum(dtype=np.float64).astype(x.dtype).reshape(shape)


def sum_rows(x: Array, *, params: OpParams, shape: Shape) -> Array:
    """The sum of each row, in float64. Mirrors ggml_compute_forward_sum_rows_f32."""
    (x,) = as_floats(x)
    return x.sum(axis=-1, keepdims=True, dtype=np.float64).astype(x.dtype)


def mean(x: Array, *, params: OpParams, shape: Shape) -> Array:
    """The mean of each row; its sum in float64, then rounded and divided. Mirrors ggml_compute_forward_mean_f32."""
    (x,) = as_floats(x)
    return x.sum(axis=-1, keepdims=True, dtype=np.float64).astype(x.dtype) / x.shape[-1]


def running_sum(x: Array, *, params: OpParams, shape: Shape) -> Array:
    """The running sum of each row, in the operand's dtype. Mirrors ggml_vec_cumsum_f32."""
    (x,) = as_floats(x)
    return np.cumsum(x, axis=-1)


def argmax(x: Array, *, params: OpParams, shape: Shape) -> Array:
    """The index of each row's largest element, the last of equal ones. Mirrors ggml_vec_argmax_f32."""
    places = x.shape[-1] - 1 - np.argmax(x[..., ::-1], axis=-1)
    return places.astype(np.int32).reshape(shape)


def count_equal(x: Array, y: Array, *, params: OpParams, shape: Shape) -> Array:
    """How many elements are equal. Mirrors ggml_compute_forward_count_equal_i32."""
    return (x == y).sum().astype(np.int64).reshape(shape)


def pool_1d(x: Array, *, params: OpParams, shape: Shape) -> Array:
    """The largest or mean of `int 1` neighbours of a row, every `int 2`-th, padded by `int 3`.

    Mirrors ggml_compute_forward_pool_1d_ksp: padding is left out, and not counted in the mean.
    """
    (x,) = as_floats(x)
    kind, size, stride, padding = (params.int(index) for index in range(4))
    return _pooled(x, kind, (-1,), (size,), (stride,), (padding,), shape, counts_padding=False)


def pool_2d(x: Array, *, params: OpParams, shape: Shape) -> Array:
    """The largest or mean of a window: sizes in ints 1 and 2 (columns, rows), strides in 3 and 4, padding in 5 and 6.

    Mirrors ggml_compute_forward_pool_2d: even at the edges a mean is divided by the whole window's size.
    """
    (x,) = as_floats(x)
    kind, k0, k1, s0, s1, p0, p1 = (params.int(index) for index in range(7))
    return _pooled(x, kind, (-1, -2), (k0, k1), (s0, s1), (p0, p1), shape, counts_padding=True)


def _pooled(
    x: Array,
    kind: int,
    axes: tuple[int, ...],
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    paddings: tuple[int, ...],
    shape: Shape,
    *,
    counts_padding: bool,
) -> Array:
    xp = module_of(x)
    missing = x.dtype.type(0 if kind == _POOL_AVG else -np.finfo(np.float32).max)
    widths = [(0, 0)] * x.ndim
    for axis, size, padding in zip(axes, sizes, paddings, strict=True):
        widths[axis] = (padding, padding + size)
    padded = xp.pad(x, widths, constant_values=missing)
    inside = xp.pad(xp.ones_like(x), widths)
    pooled = xp.full(shape, missing, dtype=x.dtype)
    count = xp.zeros(shape, dtype=x.dtype)
    for offsets in np.ndindex(*sizes):
        window = [slice(None)] * x.ndim
        for axis, offset, stride in zip(axes, offsets, strides, strict=True):
            window[axis] = slice(offset, offset + stride * (shape[axis] - 1) + 1, stride)
        here, there = padded[tuple(window)], inside[tuple(window)]
        pooled = pooled + here if kind == _POOL_AVG else np.maximum(pooled, here)
        count = count + there
    if kind != _POOL_AVG:
        return pooled
    return pooled / (int(np.prod(sizes)) if counts_padding else np.maximum(count, 1))
