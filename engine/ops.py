"""The operations of a transformer: pure functions of float32 arrays, the definition that every kernel is tested against.

T tokens of this pass, S cached positions, D embedding, H heads, K key/value heads, d head size, F feed-forward.
They run on NumPy and CuPy arrays alike (NEP 18). Each names the C function of ggml whose order of operations it follows.
Each computes in the type of its operands: with float64 it gives the result that float32 only approximates (`replay.wide`).
"""

import sys
from functools import lru_cache
from typing import Any

import numpy as np

from checkpoints.rules import visible

from .backend import Array, module_of


def get_rows(ids: Array, take: Any) -> Array:
    """Rows of the embedding: ids [T] -> [T, D]. `take(ids)` dequantises only those rows. Mirrors ggml_get_rows."""
    return take(ids)


def rms_norm(x: Array, weight: Array, *, eps: float, heads: int = 1) -> Array:
    """x / sqrt(mean(x²) + eps) · weight: [T, n], [n] -> [T, n]; with `heads` each head by itself, [T, heads · d], [d].

    The squares are summed in float64 and the mean rounded to float32, as in ggml_compute_forward_rms_norm_f32.
    """
    if heads != 1:
        return rms_norm(x.reshape(x.shape[0] * heads, -1), weight, eps=eps).reshape(x.shape[0], -1)
    mean = (_sum_of_squares(x.astype(np.float64)) / x.shape[1]).astype(x.dtype)
    scale = np.float32(1) / np.sqrt(mean + np.float32(eps))
    return (x * scale[:, None]) * weight


def _sum_of_squares(wide: Array) -> Array:
    """The sum of squares of each row, [T, n] -> [T]. CuPy's einsum would be a matrix product, four times as slow to launch."""
    return np.einsum("ij,ij->i", wide, wide) if module_of(wide) is np else (wide * wide).sum(axis=1)


def layer_norm(x: Array, weight: Array, bias: Array | None = None, *, eps: float, heads: int = 1) -> Array:
    """(x − mean) / sqrt(variance + eps) · weight (+ bias): [T, n], [n], [n] -> [T, n]; with `heads` each head by itself.

    Mean and squares are summed in float64 and rounded to float32, as in ggml_compute_forward_norm_f32.
    """
    split = x.reshape(x.shape[0] * heads, -1)
    total = split.sum(axis=1, keepdims=True, dtype=np.float64).astype(x.dtype)  # rounded before the division, as in ggml
    centred = split - total / split.shape[1]
    wide = centred.astype(np.float64)
    variance = (_sum_of_squares(wide) / split.shape[1]).astype(x.dtype)
    scaled = centred * (np.float32(1) / np.sqrt(variance + np.float32(eps)))[:, None] * weight
    return (scaled if bias is None else scaled + bias).reshape(x.shape[0], -1)


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """x · weightᵀ (+ bias): [T, in], [out, in], [out] -> [T, out]; a weight [in] has one output. Mirrors ggml_mul_mat (and ggml_add)."""
    product = np.matmul(x, weight.reshape(-1, x.shape[1]).T)
    if bias is not None:
        product += bias
    return product


@np.errstate(over="ignore", invalid="ignore")  # an angle beyond float32 has no cosine: NaN, as in ggml
def rope_angles(
    positions: Array,
    dims: int,
    *,
    base: float,
    scale: float = 1.0,
    factors: Array | None = None,
    dtype: Any = np.float32,
) -> tuple[Array, Array]:
    """Cosine and sine of the rotation: positions [T] -> two arrays of that type, [T, dims / 2].

    The angle is multiplied step by step in float32, `theta *= theta_scale`, as ggml_rope_cache_init does: computing
    position · base^(-2i/dims) directly differs by ulps that grow with the position. `scale` is the linear scaling
    (1 / factor), `factors` (the first dims / 2) divide each frequency (the tensor rope_freqs.weight).

    Raises:
        ValueError: fewer than two dimensions, which are no pair.
    """
    if dims < 2:
        raise ValueError(f"RoPE rotates pairs: {dims} dimensions hold none")
    xp = module_of(positions)
    angles = (_angles if xp is np else _angles_there)(positions, dims, base)
    if factors is not None:
        angles = angles / factors[None, : dims // 2].astype(np.float32)  # a tensor may hold more, for other layers
    # cosf and sinf of the float32 angle: computed in float64, since float32 versions differ between libraries.
    wide = (angles * np.float32(scale)).astype(np.float64)
    return np.cos(wide).astype(dtype), np.sin(wide).astype(dtype)


def _step_of(dims: int, base: float) -> np.float32:
    """The factor of an angle from one pair to the next."""
    step: np.float32 = np.power(np.float32(base), np.float32(-2.0) / np.float32(dims), dtype=np.float32)
    return step


def _angles(positions: Any, dims: int, base: float) -> Any:
    """Angles [T, dims / 2]."""
    factors_of_theta = np.full((len(positions), dims // 2), _step_of(dims, base), dtype=np.float32)
    factors_of_theta[:, 0] = positions
    return np.multiply.accumulate(factors_of_theta, axis=1)


def _angles_there(positions: Array, dims: int, base: float) -> Array:
    """`_angles` on the device, multiplied in the same order: a parallel product would use another order."""
    angles = sys.modules["cupy"].empty((len(positions), dims // 2), dtype=np.float32)
    _angle_of()(positions, np.int32(dims // 2), np.float32(_step_of(dims, base)), angles)
    return angles


@lru_cache(maxsize=1)
def _angle_of() -> Any:
    """A kernel for one angle of one position."""
    return sys.modules["cupy"].ElementwiseKernel(
        "raw P positions, int32 pairs, float32 step",
        "float32 angle",
        "float product = positions[i / pairs]; for (int n = i % pairs; n > 0; n--) product = __fmul_rn(product, step); angle = product",
        "rope_angle",
    )


def rope(
    x: Array, positions: Array, factors: Array | None = None, *, heads: int, dims: int, base: float, scale: float, pairs: str
) -> Array:
    """Rotary position embedding of the first `dims` elements of each head: [T, heads · d] -> [T, heads · d].

    `pairs` is "neox" (element i with i + dims/2) or "norm" (2i with 2i + 1). Mirrors ggml_rope_ext.
    """
    cos, sin = rope_angles(positions, dims, base=base, scale=scale, factors=factors, dtype=x.dtype)
    return rotate(x, cos, sin, heads=heads, dims=dims, pairs=pairs)


def rotate(x: Array, cos: Array, sin: Array, *, heads: int, dims: int, pairs: str) -> Array:
    """Rotate pairs of elements by given angles: [T, heads · d], two [T, dims / 2] -> [T, heads · d]."""
    split = x.reshape(x.shape[0], heads, -1)
    first, second = (slice(0, dims // 2), slice(dims // 2, dims)) if pairs == "neox" else (slice(0, dims, 2), slice(1, dims, 2))
    a, b = split[:, :, first], split[:, :, second]
    cos, sin = cos[:, None, :], sin[:, None, :]
    rotated = split.copy()
    rotated[:, :, first] = a * cos - b * sin
    rotated[:, :, second] = a * sin + b * cos
    return rotated.reshape(x.shape)


def cached(history: Array) -> Array:
    """The cache's rows of positions 0…t, as attention reads them: [S, K · d] (or [S, K, d]) -> [S, K · d]."""
    return history if history.ndim == 2 and history.flags.c_contiguous else part(history).reshape(history.shape[0], -1)


def attention_scores(q: Array, k: Array, *, heads: int, kv_heads: int) -> Array:
    """q · kᵀ per head; `heads / kv_heads` query heads share a key head: [T, H · d], [S, K · d] -> [H, T, S].

    Query head h reads key head h // group. Mirrors ggml_mul_mat(k, q) of llm_graph_context::build_attn_mha.
    """
    group = heads // kv_heads
    t, s = q.shape[0], k.shape[0]
    queries = q.reshape(t, kv_heads, group, -1).transpose(1, 2, 0, 3).reshape(kv_heads, group * t, -1)
    keys = k.reshape(s, kv_heads, -1).transpose(1, 2, 0)
    return np.matmul(queries, keys).reshape(heads, t, s)


def causal_soft_max(
    scores: Array,
    positions: Array,
    key_positions: Array,
    sinks: Array | None = None,
    *,
    scale: float,
    window: str = "causal",
    size: int = 0,
    max_bias: float = 0.0,
) -> Array:
    """softmax(scores · scale) over the keys that each query sees: [H, T, S], [T], [S] -> [H, T, S].

    `window` and `size` say which keys (`checkpoints.rules.visible`): those at or before the query, or fewer, or all. With `max_bias`
    a score is lowered by its head's slope times the key's distance (ALiBi). `sinks` [H] add one score to each head, whose weight is
    dropped.
    Scale, mask, subtract the maximum, exponentiate in float32, sum in float64: ggml_compute_forward_soft_max_f32.
    """
    later = (
        key_positions[None, :] > positions[:, None]
        if window == "causal"
        else ~visible(positions, key_positions, window=window, size=size)
    )
    scaled = scores * np.float32(scale)
    if max_bias > 0:
        from .ggml_ops.soft_max import alibi_slopes

        xp = module_of(scores)
        slopes = xp.asarray(alibi_slopes(scores.shape[0], max_bias), dtype=scores.dtype)[:, None, None]
        scaled = scaled - slopes * abs(positions[:, None] - key_positions[None, :]).astype(scores.dtype)
    shifted = np.where(later, np.float32(-np.inf), scaled)
    largest = shifted.max(axis=-1, keepdims=True)
    if sinks is not None:
        largest = np.maximum(largest, sinks[:, None, None])
    shifted -= largest
    weights = np.exp(shifted)
    total = weights.sum(axis=-1, keepdims=True, dtype=np.float64)
    if sinks is not None:
        total = total + np.exp(sinks[:, None, None] - largest)
    weights *= (1.0 / total).astype(weights.dtype)
    return weights


def weighted_values(weights: Array, v: Array, *, kv_heads: int) -> Array:
    """The values of each head, weighted and put side by side: [H, T, S], [S, K · d] -> [T, H · d].

    Mirrors ggml_mul_mat(v, kq) and the permutation to [T, H · d] of llm_graph_context::build_attn_mha.
    """
    heads, t, s = weights.shape
    group = heads // kv_heads
    values = v.reshape(s, kv_heads, -1).transpose(1, 0, 2)
    mixed = np.matmul(weights.reshape(kv_heads, group * t, s), values)
    return mixed.reshape(heads, t, -1).transpose(1, 0, 2).reshape(t, -1)


def add(x: Array, y: Array) -> Array:
    """x + y, the residual connection: [T, D], [T, D] -> [T, D]. Mirrors ggml_add."""
    return x + y


def swiglu(gate: Array, up: Array) -> Array:
    """SiLU(gate) · up: [T, F], [T, F] -> [T, F]. Mirrors ggml_vec_swiglu_f32."""
    with np.errstate(over="ignore"):  # exp(-x) of a very negative x is infinite, and x / infinity the right zero
        return gate / (np.float32(1) + np.exp(-gate)) * up


def part(x: Array) -> Array:
    """A view as a value of its own, one row per position; for example the queries in a fused QKV."""
    return module_of(x).ascontiguousarray(x)


def positions_first(x: Array) -> Array:
    """One row per position, of a value whose positions are not ggml's slowest dimension: [T, …] -> [T, n]."""
    return part(x).reshape(x.shape[0], -1)


def flat(x: Array) -> Array:
    """A value as one row: [any shape of n elements] -> [1, n]."""
    return part(x).reshape(1, -1)


def left_in_state(before: Array, written: Array, *, start: int, size: int) -> Array:
    """A recurrent state, overwritten from element `start` on: [size], [any shape of n elements] -> [size]."""
    flat = written.reshape(-1)
    if flat.size == size:
        return part(flat)
    after = before.reshape(-1).copy()
    after[start : start + flat.size] = flat
    return after
