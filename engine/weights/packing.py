"""A weight in the file's own type, laid out for the device's kernels.

The same bits as in the file, rearranged: each field of the blocks goes into a plane of its own, so that a lane reads 8 or 16
aligned bytes of 16 neighbouring elements. K-quants' packed six-bit scales are unpacked to bytes (4.5 -> 4.6 bits per element).
`weights.cuh` reads the planes; the values are exactly those of `dequantize.py`.
"""

import numpy as np
from msgspec import Struct

from ..backend import Array, module_of
from .dequantize import k4_scales_and_mins

F32, F16, Q4_0, Q5_0, Q8_0, Q4_K, Q6_K, BF16 = 0, 1, 2, 6, 8, 12, 14, 30
PACKED = (F32, F16, BF16, Q8_0, Q4_0, Q5_0, Q4_K, Q6_K)


class Packed(Struct, frozen=True):
    """Planes of a matrix [rows, columns] of one ggml type; a plane that the type lacks is None."""

    kind: int
    rows: int
    cols: int
    low: Array
    high: Array = None
    scales: Array = None
    super: Array = None
    bias: Array = None

    def words(self, row: int = 0) -> list[int]:
        """The `Matrix` of weights.cuh from any row on (planes are cut by rows): six 64-bit words."""
        planes = (self.low, self.high, self.scales, self.super)
        places = [0 if plane is None else plane.data.ptr + row * (plane.nbytes // self.rows) for plane in planes]
        return [*places, 0 if self.bias is None else self.bias.data.ptr, self.kind]

    def bytes_of(self, rows: int) -> int:
        """Bytes of shared memory for so many neighbouring rows: each plane begins and ends at a multiple of 128 bytes."""
        planes = [plane for plane in (self.low, self.high, self.scales, self.super) if plane is not None]
        return sum((127 + rows * (plane.nbytes // self.rows) + 127) // 128 * 128 for plane in planes)


def pack(raw: Array, kind: int, cols: int) -> Packed:
    """Blocks of the file -> planes: uint8 [rows, bytes per row] in device memory."""
    xp = module_of(raw)
    rows = raw.shape[0]
    if kind in (F32, F16, BF16):
        return Packed(kind, rows, cols, xp.ascontiguousarray(raw))
    size = {Q4_0: 18, Q5_0: 22, Q8_0: 34, Q4_K: 144, Q6_K: 210}[kind]
    blocks = raw.reshape(-1, size)

    def cut(start: int, stop: int) -> Array:
        return xp.ascontiguousarray(blocks[:, start:stop])

    if kind == Q4_0:
        return Packed(kind, rows, cols, _nibbles(_halves(blocks[:, 2:18])), scales=cut(0, 2))
    if kind == Q8_0:
        return Packed(kind, rows, cols, cut(2, 34), scales=cut(0, 2))
    if kind == Q5_0:
        bits = _fifth_bits(blocks)
        # Byte k of the word holds elements 4w + k of the lower half in bit w, of the upper half in bit 4 + w.
        high = _fold(bits.reshape(-1, 2, 4, 4).transpose(0, 3, 1, 2).reshape(-1, 4, 8), 1)
        return Packed(kind, rows, cols, _nibbles(_halves(blocks[:, 6:22])), high=high, scales=cut(0, 2))
    if kind == Q4_K:
        q = ((blocks[:, 16:144].reshape(-1, 4, 1, 32) >> xp.asarray([[0], [4]], dtype=np.uint8)) & np.uint8(15)).reshape(-1, 32)
        scales, mins = k4_scales_and_mins(blocks[:, 4:16])
        return Packed(kind, rows, cols, _nibbles(q), scales=xp.stack([scales, mins], axis=-1), super=cut(0, 4))
    low = ((blocks[:, :128].reshape(-1, 2, 1, 64) >> xp.asarray([[0], [4]], dtype=np.uint8)) & np.uint8(15)).reshape(-1, 32)
    two = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> xp.asarray([[0], [2], [4], [6]], dtype=np.uint8)) & np.uint8(3)
    # Byte k of the two words holds elements 4w + k, bits 2w and 2w + 1, of the lower and of the upper half.
    high = _fold(two.reshape(-1, 2, 4, 4).transpose(0, 1, 3, 2), 2)
    return Packed(kind, rows, cols, _nibbles(low), high=high, scales=cut(192, 208), super=cut(208, 210))


def pack_as_bytes(raw: Array, kind: int, cols: int) -> Packed:
    """Blocks of Q4_0, Q5_0 or Q8_0 as planes of Q8_0, in which all of them have the same values: a byte and a scale."""
    if kind == Q8_0:
        return pack(raw, kind, cols)
    size, zero = {Q4_0: (18, 8), Q5_0: (22, 16)}[kind]
    blocks = raw.reshape(-1, size)
    q = _halves(blocks[:, -16:])
    if kind == Q5_0:
        q |= _fifth_bits(blocks).reshape(-1, 32) << np.uint8(4)
    return Packed(Q8_0, raw.shape[0], cols, q - np.uint8(zero), scales=module_of(raw).ascontiguousarray(blocks[:, :2]))


def _fifth_bits(blocks: Array) -> Array:
    """The highest bits of Q5_0's values, of element 8 i + j at [i, j] of a block."""
    return (blocks[:, 2:6, None] >> module_of(blocks).arange(8, dtype=np.uint8)) & np.uint8(1)


def _nibbles(q: Array) -> Array:
    """Values 0…15 of blocks of 32 -> 16 bytes, 8 for each half: its element i in the low, i + 8 in the high nibble of byte i."""
    halves = q.reshape(-1, 2, 2, 8)
    return (halves[:, :, 0] | (halves[:, :, 1] << np.uint8(4))).reshape(-1, 16)


def _halves(low: Array) -> Array:
    """16 bytes whose low nibbles are the first half of a block, and the high ones the second -> values 0…15 of blocks of 32."""
    return module_of(low).concatenate([low & np.uint8(15), low >> np.uint8(4)], axis=1)


def _fold(parts: Array, bits: int) -> Array:
    """Put values of `bits` bits along the last axis into one byte, the first lowest."""
    xp = module_of(parts)
    byte = xp.zeros(parts.shape[:-1], dtype=np.uint8)
    for i in range(parts.shape[-1]):
        byte |= parts[..., i] << np.uint8(bits * i)
    return xp.ascontiguousarray(byte)
