"""Block formats -> float32, on NumPy and CuPy arrays alike.

A format is one function, blocks -> values, registered with its ggml type; each names the C function of ggml-quants.c
that it mirrors. Results equal libggml's and gguf-py's to the bit: products have at most 23 significant bits, so that
every order of operations gives the same float32. Formats with codebooks (IQ1 to IQ3, and what is not listed here) go
through gguf-py, on the host.
"""

from collections.abc import Callable
from math import prod

import numpy as np
from numpy.typing import NDArray

from ..backend import Array, module_of

# Elements dequantised at a time: the intermediates of a chunk stay in cache. Measured from 2^14 to 2^20 on a core with
# 2 MiB of L2; 2^17 is best or nearly so for every format, and 10 to 60 % faster than 2^20.
_CHUNK = 1 << 17

Unpack = Callable[[Array], Array]  # uint8 [blocks, bytes per block] -> float32 (or exact in it) [blocks, elements per block]
Write = Callable[[Array, Array], None]  # the same blocks, and where their values go
IN_PLACE: dict[int, Write] = {}
FORMATS: dict[int, tuple[int, int, Unpack]] = {}  # ggml_type -> elements and bytes of a block, function


def _format(kind: int, elements: int, size: int) -> Callable[[Unpack], Unpack]:
    def register(function: Unpack) -> Unpack:
        FORMATS[kind] = (elements, size, function)
        return function

    return register


def _written(kind: int, elements: int, size: int) -> Callable[[Write], Unpack]:
    """Register a format whose function writes its values in place, into float32 [blocks, elements per block] of the result, which saves
    a copy."""

    def register(function: Write) -> Unpack:
        def unpack(blocks: Array) -> Array:
            out = module_of(blocks).empty((len(blocks), elements), dtype=np.float32)
            function(blocks, out)
            return out

        IN_PLACE[kind] = function
        FORMATS[kind] = (elements, size, unpack)
        unpack.__doc__ = function.__doc__
        return unpack

    return register


def dequantize(raw: Array, kind: int, n_cols: int) -> Array:
    """Rows of blocks -> float32: uint8 [rows, bytes per row] -> [rows, n_cols], on the side where `raw` is.

    Raises:
        ModelError: gguf-py does not know the type either.
    """
    rows = prod(raw.shape[:-1])
    out = module_of(raw).empty((rows, n_cols), dtype=np.float32)
    dequantize_into(out, raw.reshape(rows, -1), kind)
    return out.reshape(*raw.shape[:-1], n_cols)


def dequantize_into(out: Array, raw: Array, kind: int) -> None:
    """The same into a given float32 array [rows, columns], chunk by chunk: peak memory is the result and one chunk."""
    rows, n_cols = out.shape
    if not out.flags.c_contiguous:
        raise ValueError("the result of dequantising must be contiguous")
    per_chunk = max(1, _CHUNK // n_cols)
    for start in range(0, rows, per_chunk):
        part = raw[start : start + per_chunk]
        if kind in IN_PLACE:
            elements, size, _ = FORMATS[kind]
            with np.errstate(over="ignore", invalid="ignore"):
                IN_PLACE[kind](part.reshape(-1, size), out[start : start + per_chunk].reshape(-1, elements))
        elif kind in FORMATS:
            _, size, function = FORMATS[kind]
            # A damaged scale may be infinite or NaN: the weight is then what ggml makes of it, without a warning from NumPy.
            with np.errstate(over="ignore", invalid="ignore"):
                out[start : start + per_chunk] = function(part.reshape(-1, size)).reshape(-1, n_cols)
        else:
            out[start : start + per_chunk] = _by_gguf(part, kind)


def _by_gguf(raw: Array, kind: int) -> Array:
    """gguf-py's own dequantisation, on the host."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize as by_gguf

    from checkpoints.errors import ModelError

    xp = module_of(raw)
    host: NDArray[np.uint8] = raw if xp is np else xp.asnumpy(raw)
    try:
        return xp.asarray(by_gguf(host, GGMLQuantizationType(kind)))
    except (NotImplementedError, ValueError, KeyError) as error:
        advice = "A newer gguf package may know it: pip install -U gguf."
        raise ModelError(f"weights of type {kind} cannot be dequantised ({error}).", advice, code="type") from error


def _half(two_bytes: Array) -> Array:
    """float16 stored in the last two bytes of the axis, as float32 [blocks, 1]."""
    return module_of(two_bytes).ascontiguousarray(two_bytes).view(np.float16).astype(np.float32)


def _nibbles(qs: Array) -> Array:
    """Low nibbles of all bytes, then the high ones: uint8 [blocks, n] -> [blocks, 2n]."""
    return module_of(qs).concatenate([qs & np.uint8(15), qs >> np.uint8(4)], axis=1)


def _bits(four_bytes: Array) -> Array:
    """32 bits, the lowest first, as 0 and 1: uint8 [blocks, 4] -> uint8 [blocks, 32]."""
    xp = module_of(four_bytes)
    return xp.unpackbits(xp.ascontiguousarray(four_bytes).ravel(), bitorder="little").reshape(-1, 32)


def _shifted(qs: Array, shifts: tuple[int, ...], mask: int) -> Array:
    """Each byte shifted by each of the shifts: uint8 [..., n] -> uint8 [..., len(shifts), n]."""
    by = module_of(qs).asarray(shifts, dtype=np.uint8)
    shifted = qs[..., None, :] >> by[:, None]
    shifted &= np.uint8(mask)
    return shifted


def _scaled(q: Array, scale: Array, low: Array | None = None) -> Array:
    """scale · q − low as float32, computed in a single array: with a new array for each result it takes two to three times as long."""
    values = q.astype(np.float32)
    values *= scale
    if low is not None:
        values -= low
    return values


def _halves_of_bytes(qs: Array, q: Array) -> None:
    """Low nibbles, then high ones: uint8 [..., n] -> q [..., 2, n]."""
    module_of(qs).bitwise_and(qs, np.uint8(15), out=q[..., 0, :])
    module_of(qs).right_shift(qs, np.uint8(4), out=q[..., 1, :])


def _scale_in_place(out: Array, q: Array, scale: Array, low: Array | None = None) -> None:
    """out = scale · q − low, float32."""
    out[...] = q
    out *= scale
    if low is not None:
        out -= low


@_format(0, 1, 4)
def f32(blocks: Array) -> Array:
    """float32 as stored."""
    return module_of(blocks).ascontiguousarray(blocks).view(np.float32)


@_format(1, 1, 2)
def f16(blocks: Array) -> Array:
    """ggml_fp16_to_fp32_row: still float16 here, and widened only when it is written to the result, which saves a copy."""
    return module_of(blocks).ascontiguousarray(blocks).view(np.float16)


@_format(30, 1, 2)
def bf16(blocks: Array) -> Array:
    """ggml_bf16_to_fp32_row: the upper half of a float32."""
    bits = module_of(blocks).ascontiguousarray(blocks).view(np.uint16).astype(np.uint32)
    return (bits << np.uint32(16)).view(np.float32)


@_format(2, 32, 18)
def q4_0(blocks: Array) -> Array:
    """dequantize_row_q4_0."""
    return _scaled(_nibbles(blocks[:, 2:]).astype(np.int8) - np.int8(8), _half(blocks[:, :2]))


@_format(3, 32, 20)
def q4_1(blocks: Array) -> Array:
    """dequantize_row_q4_1."""
    return _scaled(_nibbles(blocks[:, 4:]), _half(blocks[:, :2]), -_half(blocks[:, 2:4]))


@_format(6, 32, 22)
def q5_0(blocks: Array) -> Array:
    """dequantize_row_q5_0."""
    q = _nibbles(blocks[:, 6:]) | (_bits(blocks[:, 2:6]) << np.uint8(4))
    return _scaled(q.astype(np.int8) - np.int8(16), _half(blocks[:, :2]))


@_format(7, 32, 24)
def q5_1(blocks: Array) -> Array:
    """dequantize_row_q5_1."""
    q = _nibbles(blocks[:, 8:]) | (_bits(blocks[:, 4:8]) << np.uint8(4))
    return _scaled(q, _half(blocks[:, :2]), -_half(blocks[:, 2:4]))


@_format(8, 32, 34)
def q8_0(blocks: Array) -> Array:
    """dequantize_row_q8_0."""
    return _scaled(blocks[:, 2:].view(np.int8), _half(blocks[:, :2]))


@_format(10, 256, 84)
def q2_k(blocks: Array) -> Array:
    """dequantize_row_q2_K: 16 sub-blocks of 16, scale in the low and min in the high nibble."""
    scales, d, dmin = blocks[:, :16], _half(blocks[:, 80:82]), _half(blocks[:, 82:84])
    q = _shifted(blocks[:, 16:80].reshape(-1, 2, 32), (0, 2, 4, 6), 3).reshape(-1, 16, 16)
    scale = d * (scales & np.uint8(15)).astype(np.float32)
    low = dmin * (scales >> np.uint8(4)).astype(np.float32)
    return _scaled(q, scale[:, :, None], low[:, :, None]).reshape(-1, 256)


def q3_k_scales(packed: Array) -> Array:
    """The 16 six-bit scales of block_q3_K: uint8 [blocks, 12] -> int8 [blocks, 16], from −32 to 31."""
    xp = module_of(packed)
    low = _nibbles(packed[:, :8])
    high = _shifted(packed[:, 8:12], (0, 2, 4, 6), 3).reshape(-1, 16)
    return (low | (high << np.uint8(4))).astype(xp.int8) - np.int8(32)


@_format(11, 256, 110)
def q3_k(blocks: Array) -> Array:
    """dequantize_row_q3_K: 2 low bits, a mask that holds the inverted third, 16 six-bit scales."""
    low = _shifted(blocks[:, 32:96].reshape(-1, 2, 32), (0, 2, 4, 6), 3).reshape(-1, 8, 32)
    third = _shifted(blocks[:, :32], tuple(range(8)), 1)
    q = (low.astype(np.int8) - (np.int8(4) - (third << np.uint8(2)).astype(np.int8))).reshape(-1, 16, 16)
    scale = _half(blocks[:, 108:110]) * q3_k_scales(blocks[:, 96:108]).astype(np.float32)
    return _scaled(q, scale[:, :, None]).reshape(-1, 256)


def k4_scales_and_mins(packed: Array) -> tuple[Array, Array]:
    """get_scale_min_k4 for all 8 sub-blocks: uint8 [blocks, 12] -> two uint8 [blocks, 8], six bits each."""
    xp = module_of(packed)
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    top = np.uint8(6)
    scales = xp.concatenate([first & np.uint8(63), (third & np.uint8(15)) | ((first >> top) << np.uint8(4))], axis=1)
    mins = xp.concatenate([second & np.uint8(63), (third >> np.uint8(4)) | ((second >> top) << np.uint8(4))], axis=1)
    return scales, mins


def _scale_and_min(blocks: Array) -> tuple[Array, Array]:
    """d · scale and dmin · min of Q4_K and Q5_K, both with the head d, dmin, scales[12]: two float32 [blocks, 8, 1]."""
    scales, mins = k4_scales_and_mins(blocks[:, 4:16])
    scale = _half(blocks[:, 0:2]) * scales.astype(np.float32)
    low = _half(blocks[:, 2:4]) * mins.astype(np.float32)
    return scale[:, :, None], low[:, :, None]


@_written(12, 256, 144)
def q4_k(blocks: Array, out: Array) -> None:
    """dequantize_row_q4_K: 8 sub-blocks of 32 with a six-bit scale and min each."""
    scale, low = _scale_and_min(blocks)
    q = module_of(blocks).empty((len(blocks), 4, 2, 32), dtype=np.uint8)
    _halves_of_bytes(blocks[:, 16:144].reshape(-1, 4, 32), q)
    _scale_in_place(out.reshape(-1, 8, 32), q.reshape(-1, 8, 32), scale, low)


@_written(13, 256, 176)
def q5_k(blocks: Array, out: Array) -> None:
    """dequantize_row_q5_K: Q4_K with a fifth bit, bit i of qh for sub-block i."""
    scale, low = _scale_and_min(blocks)
    q = module_of(blocks).empty((len(blocks), 4, 2, 32), dtype=np.uint8)
    _halves_of_bytes(blocks[:, 48:176].reshape(-1, 4, 32), q)
    q = q.reshape(-1, 8, 32)
    q |= _shifted(blocks[:, 16:48], tuple(range(8)), 1) << np.uint8(4)
    _scale_in_place(out.reshape(-1, 8, 32), q, scale, low)


@_written(14, 256, 210)
def q6_k(blocks: Array, out: Array) -> None:
    """dequantize_row_q6_K: 4 low and 2 high bits, 16 signed scales."""
    q = module_of(blocks).empty((len(blocks), 2, 2, 64), dtype=np.uint8)
    _halves_of_bytes(blocks[:, :128].reshape(-1, 2, 64), q)
    high = _shifted(blocks[:, 128:192].reshape(-1, 2, 32), (0, 2, 4, 6), 3)
    high <<= np.uint8(4)
    q |= high.reshape(-1, 2, 2, 64)
    signed = q.reshape(-1, 16, 16).view(np.int8)
    signed -= np.int8(32)
    scale = _half(blocks[:, 208:210]) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    _scale_in_place(out.reshape(-1, 16, 16), signed, scale[:, :, None])


# kvalues_iq4nl of ggml-common.h: the 16 levels of the non-linear 4-bit types.
IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _levels(q: Array) -> Array:
    return module_of(q).asarray(IQ4_LEVELS, dtype=np.float32)[q]


@_format(20, 32, 18)
def iq4_nl(blocks: Array) -> Array:
    """dequantize_row_iq4_nl."""
    return _levels(_nibbles(blocks[:, 2:])) * _half(blocks[:, :2])


@_format(23, 256, 136)
def iq4_xs(blocks: Array) -> Array:
    """dequantize_row_iq4_xs: 8 sub-blocks of 32 with a six-bit scale, 4 bits of it in scales_l and 2 in scales_h."""
    xp = module_of(blocks)
    # Sub-block i takes nibble i of scales_l: the two of a byte follow each other.
    low = _shifted(blocks[:, 4:8].reshape(-1, 4, 1), (0, 4), 15).reshape(-1, 8)
    high = xp.ascontiguousarray(blocks[:, 2:4]).view(np.uint16) >> xp.arange(0, 16, 2, dtype=np.uint16)
    scale = (low | ((high & np.uint16(3)).astype(np.uint8) << np.uint8(4))).astype(np.int8) - np.int8(32)
    q = _shifted(blocks[:, 8:136].reshape(-1, 8, 16), (0, 4), 15).reshape(-1, 8, 32)
    return ((_half(blocks[:, :2]) * scale.astype(np.float32))[:, :, None] * _levels(q)).reshape(-1, 256)
