"""Faults of dequantisation: each changes the bytes of a block format, or what is made of them.

A weight of a type that a fault does not touch is read as it is. Layouts are those of ggml-common.h.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backend import Array
from ..dequantize import FORMATS, dequantize
from ..graph import Altered, RowsOf, Step, WeightSource
from .base import AT, Fault, Parameters, Steps
from .weights import MATRICES

Bytes = NDArray[np.uint8]
F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, BF16 = 1, 2, 3, 6, 7, 8, 10, 11, 12, 13, 14, 30  # ggml_type


@dataclass(frozen=True)
class _Parts:
    """Where things lie in a block: byte ranges of the nibbles, high bits, minimum, scale and packed scales."""

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
}

Edit = Callable[
    [Bytes, int], "Bytes | None"
]  # blocks [n, bytes], ggml_type -> the blocks as they are misread; None: not touched


def _reread(step: Step, edit: Edit) -> Step:
    """The step with its matrix dequantised from edited blocks."""

    def make(source: WeightSource, name: str) -> Any:
        raw, kind, shape = source.raw(name)
        size = FORMATS[kind][1] if kind in FORMATS else 0
        edited = edit(raw.reshape(-1, size), kind) if size else None
        if edited is None:
            return source.get(name)
        return source.array(dequantize(edited.reshape(raw.shape), kind, shape[-1]).reshape(shape))

    return _remade(step, make)


def _remade(step: Step, make: Callable[[WeightSource, str], Array]) -> Step:
    first = step.weights[0]
    if isinstance(first, RowsOf):

        def rows(source: WeightSource, name: str) -> Any:
            matrix = make(source, name)
            return lambda ids: matrix[ids]

        return replace(step, weights=(Altered(first.weight, rows), *step.weights[1:]))
    if not isinstance(first, str):
        raise ValueError(f"{step.makes} has no plain matrix to read in another way")  # noqa: TRY004 - no place for this fault
    return replace(step, weights=(Altered(first, make), *step.weights[1:]))


def _by(edit: Callable[[Bytes, int, Parameters], "Bytes | None"]) -> Callable[[Step, Steps, Parameters], Step]:
    def change(step: Step, _right: Steps, parameters: Parameters) -> Step:
        return _reread(step, lambda blocks, kind: edit(blocks, kind, parameters))

    return change


def _nibble_order(blocks: Bytes, kind: int, parameters: Parameters) -> Bytes | None:
    where = _LAYOUT.get(kind, _Parts()).nibbles
    if where is None:
        return None
    blocks = blocks.copy()
    qs = blocks[:, where]
    if parameters["order"] == "high first":
        blocks[:, where] = (qs >> 4) | (qs << 4)
    else:  # byte i holds elements 2i and 2i + 1 in the reader's mind: lay the true order out so that it reads them
        flat = np.stack([qs & 15, qs >> 4], axis=2).reshape(len(qs), -1)
        half = flat.shape[1] // 2
        blocks[:, where] = flat[:, :half] | (flat[:, half:] << 4)
    return blocks


def _scales_and_mins(blocks: Bytes, kind: int, _parameters: Parameters) -> Bytes | None:
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


def _only_k_quants(blocks: Bytes, kind: int, parameters: Parameters) -> Bytes | None:
    return _scales_and_mins(blocks, kind, parameters) if kind in (Q4_K, Q5_K) else None


def _no_minimum(blocks: Bytes, kind: int, _parameters: Parameters) -> Bytes | None:
    where = _LAYOUT.get(kind, _Parts()).minimum
    if where is None:
        return None
    blocks = blocks.copy()
    blocks[:, where] = 0
    return blocks


def _no_high_bits(blocks: Bytes, kind: int, _parameters: Parameters) -> Bytes | None:
    where = _LAYOUT.get(kind, _Parts()).high
    if where is None:
        return None
    blocks = blocks.copy()
    blocks[:, where] = 0xFF if kind == Q3_K else 0  # Q3_K's mask is inverted
    return blocks


def _neighbours_scale(blocks: Bytes, kind: int, parameters: Parameters) -> Bytes | None:
    parts = _LAYOUT.get(kind, _Parts())
    if parts.scale is None:
        return None
    blocks = blocks.copy()
    if parameters["of"] == "sub-block":
        if parts.packed is None or kind == Q3_K:
            return None
        if kind in (Q4_K, Q5_K):  # the 12 bytes hold 4 + 4 scales and 4 + 4 mins: within each four, one on
            packed = blocks[:, parts.packed].reshape(len(blocks), 3, 4)
            blocks[:, parts.packed] = np.roll(packed, -1, axis=2).reshape(len(blocks), 12)
        else:
            blocks[:, parts.packed] = np.roll(blocks[:, parts.packed], -1, axis=1)
    else:
        blocks[:, parts.scale] = np.roll(blocks[:, parts.scale], -1 if parameters["of"] == "next block" else 1, axis=0)
    return blocks


def _block_offset(blocks: Bytes, _kind: int, parameters: Parameters) -> Bytes | None:
    return None if blocks.shape[1] < 16 else np.roll(blocks, -parameters["blocks"], axis=0)


def _signedness(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    """Q8_0's int8 read as uint8; Q4_0's and Q5_0's offset of 8 or 16 not subtracted."""

    def make(source: WeightSource, name: str) -> Any:
        raw, kind, shape = source.raw(name)
        offset = {Q4_0: 8, Q5_0: 16}.get(kind)
        if kind != Q8_0 and offset is None:
            return source.get(name)
        blocks = raw.reshape(-1, FORMATS[kind][1])
        scale = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
        unsigned = blocks[:, 2:].astype(np.float32) * scale if kind == Q8_0 else None
        values = FORMATS[kind][2](blocks) + np.float32(offset or 0) * scale if unsigned is None else unsigned
        return source.array(values.reshape(shape))

    return _remade(step, make)


def _other_half(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    def make(source: WeightSource, name: str) -> Any:
        raw, kind, shape = source.raw(name)
        if kind not in (F16, BF16):
            return source.get(name)
        blocks = np.ascontiguousarray(raw).reshape(-1, 2)
        with np.errstate(invalid="ignore"):
            values = FORMATS[BF16 if kind == F16 else F16][2](blocks)
        return source.array(values.reshape(shape))

    return _remade(step, make)


def _rounded_scale(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    """block_q6_K with the product d · scale of each sub-block rounded to float16 before it meets the quants."""

    def make(source: WeightSource, name: str) -> Any:
        raw, kind, shape = source.raw(name)
        if kind != Q6_K:
            return source.get(name)
        blocks = raw.reshape(-1, FORMATS[kind][1])
        d = np.ascontiguousarray(blocks[:, 208:210]).view(np.float16).astype(np.float32)
        scale = d * blocks[:, 192:208].view(np.int8).astype(np.float32)
        rounded = scale.astype(np.float16).astype(np.float32)
        exact = FORMATS[kind][2](blocks).reshape(-1, 16, 16)
        quants = np.rint(np.where(scale[:, :, None] != 0, exact / np.where(scale == 0, 1, scale)[:, :, None], 0))
        return source.array((rounded[:, :, None] * quants.astype(np.float32)).reshape(shape))

    return _remade(step, make)


_ALL = (*MATRICES, "embd", "logits")
_WHERE = {AT: (MATRICES, _ALL, ("embd",), ("logits",))}

FAULTS = (
    Fault(
        "nibble-order",
        _ALL,
        _by(_nibble_order),
        "4-bit quants are taken {order} from their bytes, in {at}",
        "only 4- and 5-bit files are wrong",
        "byte i of a block holds element i in the low and i + 16 in the high nibble",
        "hand-written Q4_0 kernels",
        {"order": ("high first", "pairwise"), **_WHERE},
    ),
    Fault(
        "q4k-scale-min",
        _ALL,
        _by(_only_k_quants),
        "scales and mins of Q4_K and Q5_K are exchanged, in {at}",
        "only Q4_K files are wrong",
        "get_scale_min_k4: bytes 0-3 are scales, 4-7 mins, 8-11 the high bits' nibbles of both",
        "hand-written K-quant kernels",
        _WHERE,
    ),
    Fault(
        "scale-min-swapped",
        _ALL,
        _by(lambda blocks, kind, parameters: None if kind in (Q4_K, Q5_K) else _scales_and_mins(blocks, kind, parameters)),
        "d and m of Q4_1 and Q5_1 are exchanged, in {at}",
        "only Q4_1 and Q5_1 files are wrong",
        "a block starts with d, then m",
        "Q4_0 kernels extended by a minimum",
        _WHERE,
    ),
    Fault(
        "min-ignored",
        _ALL,
        _by(_no_minimum),
        "the blocks' minimum is ignored, in {at}",
        "only files of types with a minimum are wrong",
        "value = d · q + m (Q4_1, Q5_1), d · scale · q − dmin · min (K-quants)",
        "Q4_0 kernels used for Q4_1",
        _WHERE,
    ),
    Fault(
        "high-bits-dropped",
        _ALL,
        _by(_no_high_bits),
        "the high bits of 3-, 5- and 6-bit quants are dropped, in {at}",
        "only Q3_K, Q5 and Q6_K files are wrong",
        "or the high bits from qh (hmask for Q3_K) onto the low ones",
        "Q4 kernels used for Q5 and Q6",
        _WHERE,
    ),
    Fault(
        "scale-of-neighbour",
        _ALL,
        _by(_neighbours_scale),
        "quants are scaled by the {of}'s scale, in {at}",
        "values of the wrong size here and there",
        "each block (and sub-block) has a scale of its own",
        "an index that is off by one",
        {"of": ("next block", "previous block", "sub-block"), **_WHERE},
    ),
    Fault(
        "block-offset",
        _ALL,
        _by(_block_offset),
        "the tensor is read {blocks} block too far on, in {at}",
        "wrong from position 0 on, of plausible size",
        "tensor data start at the aligned offset of its info, from the data section's start",
        "loaders that forget general.alignment",
        {"blocks": (1, -1), **_WHERE},
    ),
    Fault(
        "quants-signedness",
        _ALL,
        _signedness,
        "quants are read unsigned, in {at}",
        "all weights are positive: values grow without bounds",
        "Q8_0 holds int8; Q4_0 subtracts 8, Q5_0 16",
        "char that is unsigned on ARM",
        _WHERE,
    ),
    Fault(
        "f16-as-bf16",
        _ALL,
        _other_half,
        "F16 weights are read as BF16, or BF16 as F16, in {at}",
        "values absurdly small or large",
        "ggml_type 1 is F16, 30 is BF16",
        "loaders that know one 16-bit type",
        _WHERE,
    ),
    Fault(
        "scale-rounded",
        _ALL,
        _rounded_scale,
        "Q6_K's d · scale is rounded to F16 before the product, in {at}",
        "a difference of 1e-7 that looks like rounding",
        "multiply in F32",
        "half-precision dequantisation kernels",
        _WHERE,
    ),
)
