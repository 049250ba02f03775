"""Several residual streams, mixed before and after each block ("hyper-connections")."""

import numpy as np

from ..backend import Array
from .activations import sigmoid
from .params import OpParams, Shape, as_floats

_STREAMS = 4  # the only number that ggml_compute_forward_dsv4_hc_comb_f32 supports


def hc_combination(mixes: Array, scale: Array, base: Array, *, params: OpParams, shape: Shape) -> Array:
    """The streams' mixing matrix, made doubly stochastic by int 1 rounds of normalising: [1, 1, T, 24], [3], [24] -> [1, T, 4, 4].

    A soft max of each row plus ε (float 0), then columns and rows in turn divided by their sums. Mirrors
    ggml_compute_forward_dsv4_hc_comb_f32.
    """
    mixes, scale, base = as_floats(mixes, scale, base)
    eps = params.float(0)
    offset = 2 * _STREAMS
    logits = mixes[0, 0, :, offset:] * scale.reshape(-1)[2] + base.reshape(-1)[offset:]
    logits = logits.reshape(-1, _STREAMS, _STREAMS)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    mixing = weights * (1 / weights.sum(axis=-1, keepdims=True)) + eps
    for turn in range(2 * params.int(1) - 1):
        mixing = mixing * (1 / (mixing.sum(axis=-2 if turn % 2 == 0 else -1, keepdims=True) + eps))
    return mixing.reshape(shape)


def hc_before(x: Array, weights: Array, *, params: OpParams, shape: Shape) -> Array:
    """The streams' weighted sum, times float 0: [1, T, S, D], weights [1, 1, T, S] -> [1, 1, T, D].

    Where int 1 is set, the weights are a gate for each element, [1, T, S, D], before the sigmoid. Mirrors
    ggml_compute_forward_dsv4_hc_pre_f32.
    """
    x, weights = as_floats(x, weights)
    shares = sigmoid(weights[0]) if params.int(1) else weights[0, 0][..., None]
    return ((x[0] * shares).sum(axis=1) * params.float(0)).reshape(shape)


def hc_after(
    x: Array, residual: Array, weights: Array, mixing: Array | None = None, *, params: OpParams, shape: Shape
) -> Array:
    """Each stream's share of the block's output, plus the mixed streams: [1, 1, T, D], [1, T, S, D], [1, 1, T, S], [1, T, S, S].

    Without a mixing matrix each stream keeps its own residual. Mirrors ggml_compute_forward_dsv4_hc_post_f32.
    """
    x, residual, weights = as_floats(x, residual, weights)
    shared = x[0, 0][:, None, :] * weights[0, 0][..., None]
    if mixing is None:
        return (shared + residual[0]).reshape(shape)
    (mixing,) = as_floats(mixing)
    return (shared + np.matmul(mixing[0].swapaxes(-1, -2), residual[0])).reshape(shape)
