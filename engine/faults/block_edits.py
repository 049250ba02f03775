"""Misreadings of quantised blocks as edits of their bytes, by the layouts of ggml-common.h.

Each function takes blocks [n, bytes per block], their ggml type and the fault's parameters; it returns the edited blocks, or None
for a type that it does not affect.
"""

from collections.abc import Mapping

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from .base import Parameters

Bytes = NDArray[np.uint8]
F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 = 1, 2, 3, 6, 7, 8  # ggml_type
Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, BF16, MXFP4 = 10, 11, 12, 13, 14, 30, 39


class _Parts(Struct, frozen=True):
    """The layout of a block: byte ranges of the nibbles, high bits, minimum, scale and packed scales."""

    nibbles: slice | None = None
    high: slice | None = None
    minimum: slice | None = None
    scale: slice | None = None
    packed: slice | None = None


_LAYOUT: Mapping[int, _Parts] = {
    Q4_0: _Parts(nibbles=slice(2, 18), scale=slice(0, 2)),
    Q4_1: _Parts(nibbles=slice(4, 20), minimum=slice(2, 4), scale=slice(0, 2)),
    Q5_0: _Parts(nibbles=slice(6, 22), high=slice(2, 6), scale=slice(0, 2)),
    Q5_1: _Parts(nibbles=slice(8, 24), high=slice(4, 8), minimum=slice(2, 4), scale=slice(0, 2)),
    Q8_0: _Parts(scale=slice(0, 2)),
    Q2_K: _Parts(minimum=slice(82, 84), scale=slice(80, 82), packed=slice(0, 16)),
    Q3_K: _Parts(high=slice(0, 32), scale=slice(108, 110), packed=slice(96, 108)),
    Q4_K: _Parts(nibbles=slice(16, 144), minimum=slice(2, 4), scale=slice(0, 2), packed=slice(4, 16)),
    Q5_K: _Parts(nibbles=slice(48, 176), high=slice(16, 48), minimum=slice(2, 4), scale=slice(0, 2), packed=slice(4, 16)),
    Q6_K: _Parts(nibbles=slice(0, 128), high=slice(128, 192), scale=slice(208, 210), packed=slice(192, 208)),
    MXFP4: _Parts(nibbles=slice(1, 17), scale=slice(0, 1)),
}


def nibble_order(blocks: Bytes, kind: int, parameters: Parameters) -> Bytes | None:
    """4-bit quants taken from the wrong nibbles."""
    where = _LAYOUT.get(kind, _Parts()).nibbles
    if where is None:
        return None
    blocks = blocks.copy()
    qs = blocks[:, where]
    if parameters["order"] == "high first":
        blocks[:, where] = (qs >> 4) | (qs << 4)
    else:  # the faulty reader takes byte i for elements 2i and 2i + 1: the true order is permuted to what it reads
        flat = np.stack([qs & 15, qs >> 4], axis=2).reshape(len(qs), -1)
        half = flat.shape[1] // 2
        blocks[:, where] = flat[:, :half] | (flat[:, half:] << 4)
    return blocks


def scales_and_mins(blocks: Bytes, kind: int, _parameters: Parameters) -> Bytes | None:
    """block_q4_K and block_q5_K with the roles of scales and mins exchanged; Q4_1's and Q5_1's d and m likewise."""
    parts = _LAYOUT.get(kind, _Parts())
    if parts.minimum is None or parts.scale is None or kind == Q2_K:
        return None
    blocks = blocks.copy()
    if parts.packed is None:
        blocks[:, parts.scale], blocks[:, parts.minimum] = blocks[:, parts.minimum].copy(), blocks[:, parts.scale].copy()
        return blocks
    start = parts.packed.start
    packed = blocks[:, parts.packed].copy()
    blocks[:, start : start + 4] = packed[:, 4:8]
    blocks[:, start + 4 : start + 8] = packed[:, 0:4]
    blocks[:, start + 8 : start + 12] = (packed[:, 8:12] >> 4) | (packed[:, 8:12] << 4)
    return blocks


def only_k_quants(blocks: Bytes, kind: int, parameters: Parameters) -> Bytes | None:
    """`scales_and_mins` of Q4_K and Q5_K."""
    return scales_and_mins(blocks, kind, parameters) if kind in (Q4_K, Q5_K) else None


def no_minimum(blocks: Bytes, kind: int, _parameters: Parameters) -> Bytes | None:
    """Blocks without their minimum."""
    where = _LAYOUT.get(kind, _Parts()).minimum
    if where is None:
        return None
    blocks = blocks.copy()
    blocks[:, where] = 0
    return blocks


def no_high_bits(blocks: Bytes, kind: int, _parameters: Parameters) -> Bytes | None:
    """Quants without their high bits."""
    where = _LAYOUT.get(kind, _Parts()).high
    if where is None:
        return None
    blocks = blocks.copy()
    blocks[:, where] = 0xFF if kind == Q3_K else 0  # Q3_K's mask is inverted
    return blocks


def neighbours_scale(blocks: Bytes, kind: int, parameters: Parameters) -> Bytes | None:
    """Quants with the scale of a neighbour."""
    parts = _LAYOUT.get(kind, _Parts())
    if parts.scale is None:
        return None
    blocks = blocks.copy()
    if parameters["of"] == "sub-block":
        if parts.packed is None or kind == Q3_K:
            return None
        if kind in (Q4_K, Q5_K):  # the 12 bytes hold 4 + 4 scales and 4 + 4 mins: each four is rotated by one
            packed = blocks[:, parts.packed].reshape(len(blocks), 3, 4)
            blocks[:, parts.packed] = np.roll(packed, -1, axis=2).reshape(len(blocks), 12)
        else:
            blocks[:, parts.packed] = np.roll(blocks[:, parts.packed], -1, axis=1)
    else:
        blocks[:, parts.scale] = np.roll(blocks[:, parts.scale], -1 if parameters["of"] == "next block" else 1, axis=0)
    return blocks


def block_offset(blocks: Bytes, _kind: int, parameters: Parameters) -> Bytes | None:
    """Blocks read some blocks further on."""
    return None if blocks.shape[1] < 16 else np.roll(blocks, -parameters["blocks"], axis=0)


def doubled_scale(blocks: Bytes, kind: int, parameters: Parameters) -> Bytes | None:
    """block_mxfp4 with an exponent one larger or smaller: ggml's table holds E2M1's values doubled, and its scale is halved to match."""
    if kind != MXFP4:
        return None
    blocks = blocks.copy()
    exponent = blocks[:, 0].astype(np.int16) + (1 if parameters["scale"] == "twice too large" else -1)
    blocks[:, 0] = np.clip(exponent, 0, 0xFE).astype(np.uint8)
    return blocks


def few_scale_bits(blocks: Bytes, kind: int, parameters: Parameters) -> Bytes | None:
    """block_q3_K with scales of 6 bits that lack their upper two, or take them from the wrong bytes."""
    where = _LAYOUT[Q3_K].packed
    if kind != Q3_K or where is None:
        return None
    blocks = blocks.copy()
    packed = blocks[:, where].copy()
    if parameters["scales"] == "without their upper two bits":
        blocks[:, where.start + 8 : where.stop] = 0
    elif parameters["scales"] == "with their lower halves exchanged":
        blocks[:, where.start : where.start + 8] = (packed[:, :8] >> 4) | (packed[:, :8] << 4)
    else:  # bits 2j and 2j + 1 of bytes 8 to 11 belong to scales 4j to 4j + 3: read the other way round
        pairs = [(packed[:, 8:] >> shift) & 3 for shift in (6, 4, 2, 0)]
        blocks[:, where.start + 8 : where.stop] = pairs[0] | (pairs[1] << 2) | (pairs[2] << 4) | (pairs[3] << 6)
    return blocks
