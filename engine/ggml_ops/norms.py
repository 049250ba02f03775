"""Norms over the last dimension, without weight and bias, which are nodes of their own."""

import numpy as np

from ..backend import Array
from .params import OpParams, Shape, as_floats


def rms_norm(x: Array, *, params: OpParams, shape: Shape) -> Array:
    """x / √(mean(x²) + ε), ε in float 0. Mirrors ggml_compute_forward_rms_norm_f32: squares in float32, their sum in float64."""
    (x,) = as_floats(x)
    mean = ((x * x).sum(axis=-1, keepdims=True, dtype=np.float64) / x.shape[-1]).astype(x.dtype)
    return x * (1 / np.sqrt(mean + x.dtype.type(params.float(0))))


def norm(x: Array, *, params: OpParams, shape: Shape) -> Array:
    """(x − mean) / √(variance + ε), ε in float 0. Mirrors ggml_compute_forward_norm_f32; both sums in float64."""
    (x,) = as_floats(x)
    centred = x - x.sum(axis=-1, keepdims=True, dtype=np.float64).astype(x.dtype) / x.shape[-1]  # rounded before the division
    return centred * (1 / np.sqrt(_mean(centred * centred, (-1,)) + x.dtype.type(params.float(0))))


def group_norm(x: Array, *, params: OpParams, shape: Shape) -> Array:
    """A layer norm over groups of channels: [n, C, h, w], int 0 the number of groups, float 1 ε.

    Mirrors ggml_compute_forward_group_norm_f32: the last group takes the channels that are left.
    """
    (x,) = as_floats(x)
    channels, groups = x.shape[1], params.int(0)
    size = -(-channels // groups)
    parts = []
    for start in range(0, channels, size):
        group = x[:, start : start + size]
        centred = group - _mean(group, (1, 2, 3))
        parts.append(centred * (1 / np.sqrt(_mean(centred * centred, (1, 2, 3)) + x.dtype.type(params.float(1)))))
    return np.concatenate(parts, axis=1)


def l2_norm(x: Array, *, params: OpParams, shape: Shape) -> Array:
    """x / max(√Σx², ε), ε in float 0. Mirrors ggml_compute_forward_l2_norm_f32."""
    (x,) = as_floats(x)
    length = np.sqrt((x * x).sum(axis=-1, keepdims=True, dtype=np.float64)).astype(x.dtype)
    with np.errstate(divide="ignore", invalid="ignore"):
        return x * (1 / np.maximum(length, x.dtype.type(params.float(0))))


def _mean(x: Array, axes: tuple[int, ...]) -> Array:
    count = int(np.prod([x.shape[axis] for axis in axes]))
    total = x.sum(axis=axes, keepdims=True, dtype=np.float64)
    mean: Array = (total / count).astype(x.dtype)
    return mean
