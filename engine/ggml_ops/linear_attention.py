"""Attention with a state instead of a cache: RWKV 6 and 7, gated linear attention, the gated delta rule.

Each returns the outputs of all tokens and below them the state after the last one of each sequence, as ggml does. T tokens of all
B sequences, t = T / B of each, H heads of size d.
"""

import numpy as np

from ..backend import Array, module_of
from .activations import exponential
from .params import OpParams, Shape, in_float64


@in_float64
def rwkv_wkv6(
    k: Array, v: Array, r: Array, first: Array, decay: Array, state: Array, *, params: OpParams, shape: Shape
) -> Array:
    """RWKV 6: out = r · (first · k ⊗ v + state), state = decay · state + k ⊗ v.

    k, v, r, decay [1, T, H, d], first [1, 1, H, d], state [1, 1, B, H·d·d] (rows of k, columns of v).
    Mirrors ggml_compute_forward_rwkv_wkv6_f32.
    """
    held = _states(state, k)
    bonus = first.reshape(1, *k.shape[2:], 1)
    outputs = []
    for k_now, v_now, r_now, decay_now in _tokens(held, k, v, r, decay):
        added = k_now[..., None] * v_now[..., None, :]
        outputs.append(_over_rows(added * bonus + held, r_now))
        held = held * decay_now[..., None] + added
    return _joined(outputs, held, shape)


@in_float64
def gated_linear_attention(k: Array, v: Array, q: Array, gate: Array, state: Array, *, params: OpParams, shape: Shape) -> Array:
    """State = gate · state + k ⊗ v, out = (q · scale) · state; float 0 is the scale.

    k, v, q, gate [1, T, H, d], state [1, 1, B, H·d·d]. Mirrors ggml_compute_forward_gla_f32.
    """
    held = _states(state, k)
    outputs = []
    for k_now, v_now, q_now, gate_now in _tokens(held, k, v, q, gate):
        held = held * gate_now[..., None] + k_now[..., None] * v_now[..., None, :]
        outputs.append(_over_rows(held, q_now * params.float(0)))
    return _joined(outputs, held, shape)


@in_float64
def rwkv_wkv7(
    r: Array, w: Array, k: Array, v: Array, a: Array, b: Array, state: Array, *, params: OpParams, shape: Shape
) -> Array:
    """RWKV 7: state = state · w + v ⊗ k + (state · a) ⊗ b, out = state · r.

    All but the state [1, T, H, d], state [1, 1, B, H·d·d] (rows of v, columns of k). Mirrors ggml_compute_forward_rwkv_wkv7_f32,
    whose vector code assumes heads of whole vectors: it gets d < 32 wrong with AVX2, and d < 64 with AVX-512.
    """
    held = _states(state, k)
    outputs = []
    for r_now, w_now, k_now, v_now, a_now, b_now in _tokens(held, r, w, k, v, a, b):
        removed = (held * a_now[..., None, :]).sum(axis=-1, keepdims=True)
        held = held * w_now[..., None, :] + v_now[..., None] * k_now[..., None, :] + removed * b_now[..., None, :]
        outputs.append((held * r_now[..., None, :]).sum(axis=-1))
    return _joined(outputs, held, shape)


@in_float64
def gated_delta_net(
    q: Array, k: Array, v: Array, gate: Array, beta: Array, state: Array, *, params: OpParams, shape: Shape
) -> Array:
    """The gated delta rule: state ← exp(gate) · state, then state += k ⊗ β · (v − state · k), out = state · q / √d.

    q, k [B, t, H', d] (their heads repeat in turn where there are fewer), v [B, t, H, d], gate [B, t, H, 1 or d], beta [B, t, H, 1], state
    [B, H, d, d] (rows of v, columns of k). Int 0 is how many of the last states are kept, the latest first.
    Mirrors ggml_compute_forward_gated_delta_net_one_chunk.
    """
    xp = module_of(v)
    sequences, tokens, heads, size = v.shape
    held = state.reshape(sequences, heads, size, size)
    q, k = (_fewer_heads(vector, sequences, heads) for vector in (q, k))
    kept = max(1, params.int(0))
    snapshots = xp.zeros((kept, *held.shape), dtype=v.dtype)
    outputs = xp.empty(v.shape, dtype=v.dtype)
    root = v.dtype.type(1) / np.sqrt(v.dtype.type(size))
    for token in range(tokens):
        held = held * exponential(gate[:, token])[:, :, None, :]
        known = np.matmul(held, k[:, token, :, :, None])[..., 0]
        delta = (v[:, token] - known) * beta[:, token]
        held = held + delta[..., None] * k[:, token, :, None, :]
        outputs[:, token] = np.matmul(held, q[:, token, :, :, None])[..., 0] * root
        if tokens - 1 - token < kept:
            snapshots[tokens - 1 - token] = held
    return np.concatenate([outputs.reshape(-1), snapshots.reshape(-1)]).reshape(shape)


def _fewer_heads(vector: Array, sequences: int, heads: int) -> Array:
    """Head h takes head h % H', sequence s takes s // (B / B')."""
    vector = np.repeat(vector, sequences // vector.shape[0], axis=0)
    return np.tile(vector, (1, 1, heads // vector.shape[2], 1))


def _states(state: Array, like: Array) -> Array:
    """[1, 1, B, H·d·d] -> [B, H, d, d]."""
    heads, size = like.shape[2:]
    return state.reshape(-1, heads, size, size)


def _tokens(held: Array, *vectors: Array) -> list[tuple[Array, ...]]:
    """Each token's rows of the given vectors, [B, H, d] each."""
    split = [vector.reshape(held.shape[0], -1, *vector.shape[2:]) for vector in vectors]
    return [tuple(vector[:, token] for vector in split) for token in range(split[0].shape[1])]


def _over_rows(matrix: Array, vector: Array) -> Array:
    """Σ over rows of vector · matrix: [B, H, d, d], [B, H, d] -> [B, H, d]."""
    return (matrix * vector[..., None]).sum(axis=-2)


def _joined(outputs: list[Array], held: Array, shape: Shape) -> Array:
    return np.concatenate([np.stack(outputs, axis=1).reshape(-1), held.reshape(-1)]).reshape(shape)
