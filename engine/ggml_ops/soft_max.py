"""Soft max with all that attention needs: scale, mask, ALiBi, sinks."""

import math

import numpy as np

from ..backend import Array, module_of
from .params import OpParams, Shape, as_floats


def soft_max(scores: Array, mask: Array | None = None, sinks: Array | None = None, *, params: OpParams, shape: Shape) -> Array:
    """softmax(scores · scale + slope · mask) over the last dimension: [b, H, T, S], mask [b', h', ≥ T, S], sinks [H].

    Float 0 is the scale, float 1 the largest ALiBi bias (0: slopes of 1). A sink counts as one more score of its head, whose
    weight is dropped. Scale, mask, subtract the maximum and exponentiate in the operands' dtype, sum in float64:
    ggml_compute_forward_soft_max_f32.
    """
    (scores,) = as_floats(scores)
    heads, rows = scores.shape[1], scores.shape[2]
    shifted = scores * params.float(0)
    if mask is not None:
        added = mask[:, :, :rows].astype(scores.dtype, copy=False)
        if added.shape[0] not in (1, scores.shape[0]) or added.shape[1] not in (1, heads):
            added = np.tile(added, (scores.shape[0] // added.shape[0], heads // added.shape[1], 1, 1))
        if params.float(1) > 0:
            slopes = module_of(scores).asarray(alibi_slopes(heads, params.float(1)), dtype=scores.dtype)
            added = slopes[None, :, None, None] * added
        shifted = shifted + added
    largest = shifted.max(axis=-1, keepdims=True)
    if sinks is not None:
        sink = sinks.reshape(1, heads, 1, 1).astype(scores.dtype, copy=False)
        largest = np.maximum(largest, sink)
    with np.errstate(invalid="ignore"):  # a row that is completely masked
        weights = np.exp(shifted - largest)
        total = weights.sum(axis=-1, keepdims=True, dtype=np.float64)
        if sinks is not None:
            total = total + np.exp(sink - largest)
        return weights * (1.0 / total).astype(scores.dtype)


def alibi_slopes(heads: int, max_bias: float) -> list[float]:
    """The slope of each head: m0^(h + 1), and between them m1^(2(h − n) + 1) beyond the power of two n of heads."""
    power = 1 << int(math.log2(heads))
    m0 = np.float32(2.0 ** (-max_bias / power))
    m1 = np.float32(2.0 ** (-(max_bias / 2.0) / power))
    return [float(np.float32(float(m0) ** (h + 1) if h < power else float(m1) ** (2 * (h - power) + 1))) for h in range(heads)]
