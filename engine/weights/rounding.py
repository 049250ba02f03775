"""ggml's rounding of activations before a product with weights that are not float32.

llama.cpp's CPU backend does not multiply dequantised weights by float activations: it first rounds the activations to
the weight type's partner, `vec_dot_type`. This module gives the rounded values: `dequantised weight · round_activations(x)`
is what ggml computes, except for the order of summation. The functions mirror the x86 code (AVX); the scalar code rounds
halves away from zero in Q8_0 and Q8_1, so that on other processors single elements of a block may differ by one step.

Only finite activations are the same to the bit; one that is not finite spoils its whole block, as in ggml.
"""

from collections.abc import Callable

import numpy as np

from checkpoints.errors import ModelError

from ..backend import Array, module_of

F32, F16, Q4_1, Q5_1, Q8_0, Q8_1, Q8_K, BF16 = 0, 1, 3, 7, 8, 9, 15, 30  # ggml_type

# type_traits_cpu of ggml-cpu.c: the type that activations are rounded to, by type of the weight.
VEC_DOT_TYPES: dict[int, int] = {
    **{kind: kind for kind in (F32, F16, BF16)},
    **dict.fromkeys((2, 6, 8, 20, 39, 40, 41), Q8_0),  # Q4_0, Q5_0, Q8_0, IQ4_NL, MXFP4, NVFP4, Q1_0
    **dict.fromkeys((Q4_1, Q5_1), Q8_1),
    **dict.fromkeys((10, 11, 12, 13, 14), Q8_K),  # Q2_K … Q6_K
    **dict.fromkeys((16, 17, 18, 19, 21, 22, 23, 29), Q8_K),  # IQ2_XXS, IQ2_XS, IQ3_XXS, IQ1_S, IQ3_S, IQ2_S, IQ4_XS, IQ1_M
    **dict.fromkeys((34, 35), Q8_K),  # TQ1_0, TQ2_0
}
_BLOCK = 32  # QK8_0, QK8_1
_SUPER_BLOCK = 256  # QK_K


def vec_dot_type(weight_type: int) -> int:
    """The ggml type that activations are rounded to before a product with weights of `weight_type`.

    Raises:
        ModelError: ggml's CPU backend has no product for the type, as far as we know.
    """
    try:
        return VEC_DOT_TYPES[int(weight_type)]
    except KeyError:
        raise ModelError(
            f"how ggml multiplies weights of type {weight_type} is unknown.", "Compare in exact mode.", code="type"
        ) from None


def round_activations(x: Array, weight_type: int) -> Array:
    """Activations as a product with weights of that type sees them: float32 [..., n] -> float32 [..., n].

    For Q4_1 and Q5_1 add `q8_1_correction` to the product.

    Raises:
        ModelError: an unknown type, or rows that are no multiple of the partner type's blocks.
    """
    return _ROUNDINGS[vec_dot_type(weight_type)](x)


def q8_1_correction(x: Array, raw: Array, weight_type: int) -> Array:
    """What a product of Q4_1 or Q5_1 weights adds to `round_activations(x) · weightᵀ`: [T, n] -> float32 [T, out].

    block_q8_1 stores s = d · Σq beside d and q, each rounded to float16 by itself, and the weights' minimum m is
    multiplied by s (ggml_vec_dot_q4_1_q8_1): in each block the product is larger by m · (s − float16(d) · Σq).

    Args:
        raw: the weight's bytes, uint8 [out, bytes per row].
    """
    size = {Q4_1: 20, Q5_1: 24}[int(weight_type)]
    xp = module_of(x, raw)
    minima = xp.ascontiguousarray(raw.reshape(raw.shape[0], -1, size)[:, :, 2:4]).view(np.float16)[:, :, 0]
    blocks = _blocks(x, _BLOCK)
    q, d = _steps_of_32(blocks)
    total = q.sum(axis=-1, keepdims=True)
    missing = _half(d * total) - _half(d) * total
    return np.matmul(missing[..., 0], minima.astype(np.float32).T)


def _blocks(x: Array, size: int) -> Array:
    if x.shape[-1] % size:
        raise ModelError(f"{x.shape[-1]} activations are not a multiple of {size}, the block in which ggml rounds them.")
    return x.reshape(*x.shape[:-1], -1, size)


def _half(x: Array) -> Array:
    """Rounded to float16, nearest even: GGML_CPU_FP32_TO_FP16 and back."""
    with np.errstate(over="ignore"):  # more than 65,504 becomes infinite, as in ggml
        return x.astype(np.float16).astype(np.float32)


def _steps_of_32(blocks: Array) -> tuple[Array, Array]:
    """Integer multiples and step size of blocks of 32: float32 [..., 32] -> float32 [..., 32] and [..., 1] (not yet float16)."""
    largest = np.abs(blocks).max(axis=-1, keepdims=True)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        per_step = np.where(largest != 0, np.float32(127) / largest, np.float32(0))
        q = np.rint(blocks * per_step)
    # Under 4e-37 the quotient is infinite; cvtps_epi32 and the packs then give −128 (and the step is 0 as float16).
    return np.where(np.isfinite(q), q, np.float32(-128)), largest / np.float32(127)


def _to_itself(x: Array) -> Array:
    """F32: unchanged."""
    return x


def _to_bf16(x: Array) -> Array:
    """ggml_cpu_fp32_to_bf16: the upper half, rounded to nearest even; NaN stays NaN."""
    xp = module_of(x)
    x = x.astype(np.float32, copy=False)
    bits = xp.ascontiguousarray(x).view(np.uint32)
    rounded = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    rounded = np.where(np.isnan(x), bits | np.uint32(1 << 22), rounded)
    return (rounded & np.uint32(0xFFFF0000)).view(np.float32)


def _to_q8_0(x: Array) -> Array:
    """quantize_row_q8_0 of ggml-cpu/arch/x86/quants.c: q = rint(x · (127 / amax)), d = float16(amax / 127)."""
    q, d = _steps_of_32(_blocks(x, _BLOCK))
    with np.errstate(invalid="ignore"):  # 0 · infinity of a step beyond float16
        return (q * _half(d)).reshape(x.shape)


def _to_q8_k(x: Array) -> Array:
    """quantize_row_q8_K_ref: q = min(127, rint(x · iscale)), iscale = −127 / (the element largest in size, signed)."""
    xp = module_of(x)
    blocks = _blocks(x, _SUPER_BLOCK)
    place = np.abs(blocks).argmax(axis=-1)[..., None]  # the first of equal ones, as in ggml
    largest = xp.take_along_axis(blocks, place, axis=-1)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        per_step = np.where(largest != 0, np.float32(-127) / largest, np.float32(0))
        q = np.minimum(np.float32(127), np.rint(blocks * per_step))
        d = np.where(largest != 0, np.float32(1) / per_step, np.float32(0))
        return (q * d).reshape(x.shape)


_ROUNDINGS: dict[int, Callable[[Array], Array]] = {
    F32: _to_itself,
    F16: _half,
    BF16: _to_bf16,
    Q8_0: _to_q8_0,
    Q8_1: _to_q8_0,  # quantize_row_q8_1 rounds the same way; `q8_1_correction` covers its sums
    Q8_K: _to_q8_k,
}
