"""What can happen to a weight while an engine loads it: each mishap with the leading values that it gives."""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray

from engine.weights.dequantize import dequantize
from engine.weights.gguf_model import GgufModel, TensorInfo, block_of

from .weights import Floats, first_values

TRANSPOSED = "equal when transposed"
# Where the 4 bits of an element lie: ggml type -> (first byte of the nibbles, number of their bytes) in a block.
_NIBBLES = {
    2: (2, 16), 3: (4, 16), 6: (6, 16), 7: (8, 16), 12: (16, 128), 13: (48, 128), 20: (2, 16), 23: (8, 128),
    39: (1, 16), 40: (4, 32),
}  # fmt: skip
# Where float16 fields lie in a block, for byte order.
_HALVES = {
    1: (0,), 2: (0,), 3: (0, 2), 6: (0,), 7: (0, 2), 8: (0,), 10: (80, 82), 11: (108,), 12: (0, 2), 13: (0, 2), 14: (208,),
    20: (0,), 23: (0,), 30: (0,),
}  # fmt: skip
# The offset of a type's quants: ggml type -> the number that a reader subtracts.
_ZERO = {2: 8, 6: 16}

MishapValues = Callable[[], Floats | None]


def mishaps(model: GgufModel, info: TensorInfo, count: int, heads: tuple[int, int]) -> Iterator[tuple[str, MishapValues]]:
    """What may have been done to a tensor, the most likely first, each with its leading values."""
    matrix = len(info.shape) == 2
    if matrix:
        yield TRANSPOSED, lambda: _transposed(model, info, count)
    if matrix and info.name.endswith(("attn_q.weight", "attn_k.weight")):
        n = heads[0] if "attn_q" in info.name else heads[1]
        yield "equal when permuted as Hugging Face's Q/K", lambda: _permuted(model, info, n, back=False)
        yield "equal when the permutation of Q/K is undone", lambda: _permuted(model, info, n, back=True)
    elements, size = block_of(info.type, info.name)
    if int(np.prod(info.shape)) > count + elements:
        shift = elements if elements > 1 else 1
        yield "off by one block", lambda: first_values(model, info, count, skip=shift)
    if info.offset >= size:
        yield "off by one block, backwards", lambda: _at(model, info, count, -size)

    def altered(change: Callable[[NDArray[np.uint8]], NDArray[np.uint8]]) -> MishapValues:
        return lambda: _values(change(_blocks(model, info, count).copy()), info.type)

    if info.type in _NIBBLES:
        start, length = _NIBBLES[info.type]
        yield "nibbles swapped", altered(lambda blocks: _swap_nibbles(blocks, start, length))
        yield "nibbles in the order of bytes (low, high, low, high)", lambda: _interleaved(model, info, count)
    yield from _elsewhere(model, info, count)
    for name, change in _BLOCK_CHANGES.get(info.type, ()):
        yield name, altered(change)
    if info.type in _READINGS:
        yield from _READINGS[info.type](model, info, count)
    if info.type in _HALVES:
        yield "byte order of the 16-bit fields", altered(lambda blocks: _turn_halves(blocks, _HALVES[info.type]))
    if info.type == 0:
        yield "byte order", altered(lambda blocks: np.ascontiguousarray(blocks[:, ::-1]))
    if info.type in _OTHER_HALF:
        name, kind = _OTHER_HALF[info.type]
        yield name, lambda: _as(model, info, count, kind)


def _transposed(model: GgufModel, info: TensorInfo, count: int) -> Floats:
    """The leading values of Wᵀ, [in, out], from only as many rows of W as they need."""
    rows, columns = info.shape
    part = first_values(model, info, min(count, rows) * columns).reshape(-1, columns)
    if count <= rows:
        return np.ascontiguousarray(part[:, 0])[:count]
    return np.ascontiguousarray(part.T).reshape(-1)[:count]


def _permuted(model: GgufModel, info: TensorInfo, heads: int, *, back: bool) -> Floats | None:
    """LlamaModel.permute of convert_hf_to_gguf.py, or its inverse."""
    rows, columns = info.shape
    if rows % (2 * heads):
        return None
    half = rows // heads // 2
    shape = (heads, 2, half, columns) if not back else (heads, half, 2, columns)
    weight = model.load(info.name).reshape(shape)
    return np.ascontiguousarray(weight.swapaxes(1, 2)).reshape(-1)


def _blocks(model: GgufModel, info: TensorInfo, count: int) -> NDArray[np.uint8]:
    elements, size = block_of(info.type, info.name)
    return model.raw(info.name).reshape(-1, size)[: -(-count // elements)]


def _values(blocks: NDArray[np.uint8], kind: int) -> Floats:
    elements, _ = block_of(kind)
    values: Floats = dequantize(blocks, kind, elements).reshape(-1)
    return values


def _elsewhere(model: GgufModel, info: TensorInfo, count: int) -> Iterator[tuple[str, MishapValues]]:
    """The tensor read from another place in the file: its offset counted from the wrong byte."""
    contents = model.contents.parts[info.part]
    start, end, alignment = contents.data, contents.header_end, contents.alignment
    if start != end:
        yield "read too early: the padding after the header is not skipped", lambda: _at(model, info, count, end - start)
    yield (
        "read too early: its offset is counted from the start of the file, the header is not skipped",
        (lambda: _at(model, info, count, -start)),
    )
    for by in (alignment, -alignment):
        where = "late" if by > 0 else "early"
        yield f"read {alignment} bytes too {where}: one alignment", lambda by=by: _at(model, info, count, by)  # type: ignore[misc]
    for by in (4, 8, -4, -8, 12, -12, 16, -16, 24, -24):
        where = "late" if by > 0 else "early"
        yield f"read {abs(by)} bytes too {where}", lambda by=by: _at(model, info, count, by)  # type: ignore[misc]


def _at(model: GgufModel, info: TensorInfo, count: int, by: int) -> Floats | None:
    """The values of the bytes `by` after the tensor's own; None if the file has none there."""
    elements, size = block_of(info.type, info.name)
    need, begin = size * (-(-count // elements)), info.offset + by
    with model.contents.parts[info.part].path.open("rb") as file:
        if begin < 0 or begin + need > file.seek(0, 2):
            return None
        file.seek(begin)
        data = np.frombuffer(file.read(need), np.uint8)
    with np.errstate(all="ignore"):
        return _values(data.reshape(-1, size), info.type)


def _half(blocks: NDArray[np.uint8], at: int) -> Floats:
    """The float16 at byte `at` of each block: [blocks, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def _without_zero(model: GgufModel, info: TensorInfo, count: int) -> Floats:
    """Unsigned quants as they are stored, times the scale."""
    blocks = _blocks(model, info, count)
    right = _values(blocks.copy(), info.type).reshape(len(blocks), -1)
    return (right + np.float32(_ZERO[info.type]) * _half(blocks, 0)).reshape(-1)


def _unsigned(model: GgufModel, info: TensorInfo, count: int) -> Floats:
    """Q8_0 with its signed bytes read as 0 to 255."""
    blocks = _blocks(model, info, count)
    return (blocks[:, 2:].astype(np.float32) * _half(blocks, 0)).reshape(-1)


def _of_q3_k(model: GgufModel, info: TensorInfo, count: int) -> Iterator[tuple[str, MishapValues]]:
    """Mishaps of block_q3_K: hmask [32], quants [64], sixteen six-bit scales packed into [12], d."""

    def with_scales(change: Callable[[NDArray[np.int32]], NDArray[np.int32]]) -> MishapValues:
        def dequantised() -> Floats:
            blocks = _blocks(model, info, count)
            scales = _scales_of_q3_k(blocks)
            unit = blocks.copy()  # every scale is 1: 33 − 32
            unit[:, 96:104], unit[:, 104:108] = 0x11, 0xAA
            quants = _values(unit, info.type).reshape(len(blocks), 16, 16)
            return (quants * change(scales)[:, :, None].astype(np.float32)).reshape(-1)

        return dequantised

    def high_bit(change: Callable[[NDArray[np.uint8]], NDArray[np.uint8]]) -> MishapValues:
        def dequantised() -> Floats:
            blocks = _blocks(model, info, count).copy()
            blocks[:, :32] = change(blocks[:, :32])
            return _values(blocks, info.type)

        return dequantised

    yield "32 not subtracted from the scales", with_scales(lambda scales: scales)
    yield "scales without their upper two bits", with_scales(lambda scales: (scales & 15) - 32)
    yield "scales with their upper two bits as signed numbers", with_scales(lambda scales: (scales ^ 32) - 32)
    yield (
        "scales in the order of their bytes (low, high, low, high)",
        with_scales(lambda scales: scales.reshape(-1, 2, 8).swapaxes(1, 2).reshape(-1, 16) - 32),
    )
    yield "scales in another order: both halves exchanged", with_scales(lambda scales: np.roll(scales, 8, axis=1) - 32)
    yield "the quants' third bit inverted", high_bit(lambda mask: ~mask)
    yield "the quants' third bit ignored, 4 not subtracted", high_bit(lambda mask: mask | np.uint8(255))
    yield "the quants' third bit ignored, 4 subtracted everywhere", high_bit(lambda mask: mask & np.uint8(0))


def _scales_of_q3_k(blocks: NDArray[np.uint8]) -> NDArray[np.int32]:
    """The sixteen six-bit scales of block_q3_K, 0 to 63, as dequantize_row_q3_K unpacks them: [blocks, 16]."""
    packed = blocks[:, 96:108].astype(np.int32)
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    high = np.concatenate([(packed[:, 8:] >> shift) & 3 for shift in (0, 2, 4, 6)], axis=1)
    return np.asarray(low | (high << 4))


def _swap_nibbles(blocks: NDArray[np.uint8], start: int, length: int) -> NDArray[np.uint8]:
    part = blocks[:, start : start + length]
    blocks[:, start : start + length] = (part >> np.uint8(4)) | (part << np.uint8(4))
    return blocks


def _swap(blocks: NDArray[np.uint8], a: int, b: int) -> NDArray[np.uint8]:
    blocks[:, [a, a + 1, b, b + 1]] = blocks[:, [b, b + 1, a, a + 1]]
    return blocks


def _swap_k4(blocks: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The packed six-bit scales and mins of block_q4_K and block_q5_K exchanged."""
    packed = blocks[:, 4:16].copy()
    blocks[:, 4:8], blocks[:, 8:12] = packed[:, 4:8], packed[:, 0:4]
    blocks[:, 12:16] = (packed[:, 8:12] >> np.uint8(4)) | (packed[:, 8:12] << np.uint8(4))
    return blocks


def _turn_halves(blocks: NDArray[np.uint8], places: tuple[int, ...]) -> NDArray[np.uint8]:
    for place in places:
        blocks[:, [place, place + 1]] = blocks[:, [place + 1, place]]
    return blocks


def _interleaved(model: GgufModel, info: TensorInfo, count: int) -> Floats | None:
    """Both nibbles of a byte read as neighbours, though ggml stores them half a block apart."""
    if info.type not in (2, 3, 6, 7, 20, 39):
        return None
    values = _values(_blocks(model, info, count).copy(), info.type).reshape(-1, 2, 16)
    return np.ascontiguousarray(values.swapaxes(1, 2)).reshape(-1)


def _as(model: GgufModel, info: TensorInfo, count: int, kind: int) -> Floats:
    return _values(_blocks(model, info, count), kind)


def _offset_kept(model: GgufModel, info: TensorInfo, count: int) -> Iterator[tuple[str, MishapValues]]:
    yield f"{_ZERO[info.type]} not subtracted from the quants", lambda: _without_zero(model, info, count)


def _of_q8_0(model: GgufModel, info: TensorInfo, count: int) -> Iterator[tuple[str, MishapValues]]:
    yield "quants read as unsigned bytes", lambda: _unsigned(model, info, count)


def _of_mxfp4(model: GgufModel, info: TensorInfo, count: int) -> Iterator[tuple[str, MishapValues]]:
    sentence = "scales twice as large: the exponent's bias is 127 where values are doubled"
    yield sentence, lambda: 2 * first_values(model, info, count)


_SWAPPED, _HALF_SWAPPED = "scales and mins swapped", "d and dmin swapped"
_Q4_K = (_SWAPPED, _swap_k4), (_HALF_SWAPPED, partial(_swap, a=0, b=2))
# What can happen to the fields of a type's blocks, and to the reading of its values.
_BLOCK_CHANGES: dict[int, tuple[tuple[str, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]], ...]] = {
    3: ((_SWAPPED, partial(_swap, a=0, b=2)),),
    7: ((_SWAPPED, partial(_swap, a=0, b=2)),),
    10: ((_SWAPPED, partial(_swap_nibbles, start=0, length=16)), (_HALF_SWAPPED, partial(_swap, a=80, b=82))),
    12: _Q4_K,
    13: _Q4_K,
}
_READINGS = {2: _offset_kept, 6: _offset_kept, 8: _of_q8_0, 11: _of_q3_k, 39: _of_mxfp4}
_OTHER_HALF = {1: ("F16 read as BF16", 30), 30: ("BF16 read as F16", 1)}
