"""Mamba's convolution over time and its scan of states."""

import numpy as np

from ..backend import Array, module_of
from .activations import exponential, softplus
from .params import OpParams, Shape, as_floats, in_float64


def ssm_conv(x: Array, kernel: Array, *, params: OpParams, shape: Shape) -> Array:
    """A causal convolution of each channel: [1, B, C, K − 1 + T], kernel [1, 1, C, K] -> [1, B, T, C].

    The products are summed one after the other, as in ggml_compute_forward_ssm_conv_f32.
    """
    x, kernel = as_floats(x, kernel)
    width = kernel.shape[-1]
    count = x.shape[-1] - width + 1
    total = x[0, :, :, :count] * kernel[0, 0, :, :1]
    for place in range(1, width):
        total = total + x[0, :, :, place : place + count] * kernel[0, 0, :, place, None]
    return total.transpose(0, 2, 1)[None]


def ssm_scan(
    states: Array, x: Array, dt: Array, a: Array, b: Array, c: Array, ids: Array, *, params: OpParams, shape: Shape
) -> Array:
    """The selective scan of Mamba 1 and 2: the outputs of all tokens, then the states after the last, flat [1, 1, 1, n].

    State[h, d] = state · exp(dt · A) + B · x · dt, output = C · state, with dt after softplus; a group of heads shares B and C.
    Mirrors ggml_compute_forward_ssm_scan_f32. Its softplus rounds 1 + exp(dt) to float32, which leaves few digits of a small dt, here too.

    Args:
        states: [slots, H, dim, N]; `ids` [1, 1, 1, B] says which slot each sequence starts from.
        x: [B, T, H, dim]; dt: [1, B, T, H]; a: [1, 1, H, N] (Mamba 1) or [1, 1, H, 1]; b, c: [B, T, G, N].
        params: int 0 is how many of the last states are kept, the latest first.
    """
    return _scan(states, x, softplus(dt), a, b, c, ids, params=params, shape=shape)


@in_float64
def _scan(
    states: Array, x: Array, dt: Array, a: Array, b: Array, c: Array, ids: Array, *, params: OpParams, shape: Shape
) -> Array:
    """`ssm_scan` with dt after softplus."""
    xp = module_of(x)
    tokens, heads = x.shape[1:3]
    state = states[ids.reshape(-1).astype(np.int64)]  # [B, H, dim, N]
    group = heads // b.shape[2]
    outputs = xp.empty_like(x, order="C")
    kept = max(1, params.int(0))
    snapshots = xp.zeros((kept, *state.shape), dtype=x.dtype)
    for token in range(tokens):
        step = dt[0, :, token, :, None, None]  # [B, H, 1, 1]
        decay = exponential(step * a[0, 0][None, :, None, :])
        driven = x[:, token, :, :, None] * step
        b_now, c_now = (np.repeat(matrix[:, token], group, axis=1)[:, :, None, :] for matrix in (b, c))
        state = state * decay + b_now * driven
        outputs[:, token] = (state * c_now).sum(axis=-1)
        if tokens - 1 - token < kept:
            snapshots[tokens - 1 - token] = state
    return np.concatenate([outputs.reshape(-1), snapshots.reshape(-1)]).reshape(shape)
