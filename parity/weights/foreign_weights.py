"""Weights that a foreign engine dumped after loading, against the file: what was done to each of them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from checkpoints.answers.weights import DIFFERENT, EQUAL, NOT_CHECKED, FirstDifference, TensorCheck, WeightsCheck
from checkpoints.errors import DumpError
from engine.weights.dequantize import dequantize
from engine.weights.gguf_model import GgufModel, TensorInfo, block_of

from .dumped_weights import load
from .weights import Floats, first_values, type_name

# Read from printed decimals with 6 digits or more; a wrong layout is off by the size of the weights.
_CLOSE = 2e-6
_FEWEST = 4  # values under which nothing can be told apart
TRANSPOSED = "equal when transposed"
_OTHERS = 64  # leading values by which another tensor is recognised
# Where the 4 bits of an element lie: ggml type -> (first byte of the nibbles, bytes of them) in a block.
_NIBBLES = {2: (2, 16), 3: (4, 16), 6: (6, 16), 7: (8, 16), 12: (16, 128), 13: (48, 128), 20: (2, 16), 23: (8, 128)}
# Where float16 fields lie in a block, for byte order.
_HALVES = {
    1: (0,), 2: (0,), 3: (0, 2), 6: (0,), 7: (0, 2), 8: (0,), 10: (80, 82), 11: (108,), 12: (0, 2), 13: (0, 2), 14: (208,),
    20: (0,), 23: (0,), 30: (0,),
}  # fmt: skip


def check_foreign(path: Path, theirs: Path) -> WeightsCheck:
    """Say for each tensor that a foreign engine dumped what it is.

    Raises:
        DumpError: the file cannot be read, or none of its names is a tensor of the model; ModelError: the model cannot be read.
    """
    model = GgufModel(path)
    heads = model.hyperparameters.n_heads, model.hyperparameters.n_kv_heads
    given = load(theirs)
    known = {name: values for name, values in given.items() if name in model.tensors}
    if not known:
        names = ", ".join(list(given)[:3])
        raise DumpError(
            f"{theirs} names no tensor of the model ({names or 'nothing at all'}).",
            "Name them as the GGUF does: blk.0.attn_q.weight.",
            code="names",
        )
    leading: dict[str, Floats] = {}
    checks = [_tensor(model, model.tensors[name], values, heads, leading) for name, values in known.items()]
    notes = []
    matrices = [check for check in checks if len(check.shape) == 2]
    if len(matrices) > 1 and all(check.status == TRANSPOSED for check in matrices):
        checks = [replace(check, reason="", first=None) if check.status == TRANSPOSED else check for check in checks]
        notes.append("every matrix is held transposed: right if the products expect it so")
    if stray := [name for name in given if name not in model.tensors]:
        notes.append(f"not in the model: {', '.join(stray[:5])}{' …' if len(stray) > 5 else ''}")
    if missing := len(model.tensors) - len(known):
        notes.append(f"{missing} tensors of the model are not in {theirs.name}: they were not checked")
    size = sum(values.nbytes for values in known.values())
    return WeightsCheck(
        f"{model.hyperparameters.name or path.stem} ({path})", theirs.name, tuple(checks), size, tuple(notes), "2e-6"
    )


def _tensor(
    model: GgufModel, info: TensorInfo, values: Floats, heads: tuple[int, int], leading: dict[str, Floats]
) -> TensorCheck:
    kind, total = type_name(info.type), int(np.prod(info.shape))
    values = values[:total]
    if len(values) < min(_FEWEST, total):
        reason = f"{len(values)} values are too few to tell"
        return TensorCheck(info.name, kind, info.shape, NOT_CHECKED, len(values), (), reason)
    right = first_values(model, info, len(values))
    if same(values, right):
        return TensorCheck(info.name, kind, info.shape, EQUAL, len(values))
    if narrow := _narrowed(values, right):
        return TensorCheck(info.name, kind, info.shape, f"equal as {narrow}", len(values))
    first = _first(values, right, info)
    for status, made in _changed(model, info, len(values), heads):
        candidate = made()
        if candidate is not None and len(candidate) >= len(values) and same(values, candidate[: len(values)]):
            return TensorCheck(info.name, kind, info.shape, status, len(values), (), status, first)
    if other := _another(model, info, values, leading):
        status = f"equal to another tensor: {other}"
        return TensorCheck(info.name, kind, info.shape, status, len(values), (), status, first)
    return TensorCheck(info.name, kind, info.shape, DIFFERENT, len(values), (), "nothing known gives these values", first)


def same(theirs: Floats, right: Floats) -> bool:
    """Whether two slices are one but for the last printed digits."""
    scale = float(np.abs(right[np.isfinite(right)]).max(initial=0.0))
    equal = (theirs == right) | (np.isnan(theirs) & np.isnan(right))
    with np.errstate(invalid="ignore", over="ignore"):
        return bool((equal | (np.abs(theirs.astype(np.float64) - right) <= _CLOSE * scale)).all())


def _narrowed(theirs: Floats, right: Floats) -> str:
    """F16 or BF16, where the values are those of the file rounded to it."""
    with np.errstate(over="ignore"):
        if same(theirs, right.astype(np.float16).astype(np.float32)):
            return "F16"
    bits = right.view(np.uint32)
    nearest = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)).view(np.float32)
    cut = (bits & np.uint32(0xFFFF0000)).view(np.float32)
    return "BF16" if same(theirs, nearest) or same(theirs, cut) else ""


def _first(values: Floats, right: Floats, info: TensorInfo) -> FirstDifference:
    at = int((~((values == right) | (np.isnan(values) & np.isnan(right)))).argmax())
    elements, _ = block_of(info.type, info.name)
    return FirstDifference(at, at // elements, "", {"theirs": float(values[at]), "file": float(right[at])})


Made = Callable[[], Floats | None]


def _changed(model: GgufModel, info: TensorInfo, count: int, heads: tuple[int, int]) -> Iterator[tuple[str, Made]]:
    """What can have been done to a tensor, the likely first, each as its leading values."""
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
        yield "off by one block, backwards", lambda: _from_before(model, info, count)

    def altered(change: Callable[[NDArray[np.uint8]], NDArray[np.uint8]]) -> Made:
        return lambda: _altered(model, info, count, size, change)

    if info.type in _NIBBLES:
        start, length = _NIBBLES[info.type]
        yield "nibbles swapped", altered(lambda blocks: _swap_nibbles(blocks, start, length))
        yield "nibbles in the order of bytes (low, high, low, high)", lambda: _interleaved(model, info, count)
    if info.type in (12, 13):
        yield "scales and mins swapped", altered(_swap_k4)
        yield "d and dmin swapped", altered(lambda blocks: _swap(blocks, 0, 2))
    if info.type == 10:
        yield "scales and mins swapped", altered(lambda blocks: _swap_nibbles(blocks, 0, 16))
        yield "d and dmin swapped", altered(lambda blocks: _swap(blocks, 80, 82))
    if info.type in (3, 7):
        yield "scales and mins swapped", altered(lambda blocks: _swap(blocks, 0, 2))
    if info.type in _HALVES:
        yield "byte order of the 16-bit fields", altered(lambda blocks: _turn_halves(blocks, _HALVES[info.type]))
    if info.type == 0:
        yield "byte order", altered(lambda blocks: np.ascontiguousarray(blocks[:, ::-1]))
    if info.type == 1:
        yield "F16 read as BF16", lambda: _as(model, info, count, 30)
    if info.type == 30:
        yield "BF16 read as F16", lambda: _as(model, info, count, 1)


def _transposed(model: GgufModel, info: TensorInfo, count: int) -> Floats:
    """The leading values of Wᵀ, [in, out]: only as many rows of W as a slice of it needs."""
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


def _altered(
    model: GgufModel, info: TensorInfo, count: int, size: int, change: Callable[[NDArray[np.uint8]], NDArray[np.uint8]]
) -> Floats:
    del size
    return _values(change(_blocks(model, info, count).copy()), info.type)


def _from_before(model: GgufModel, info: TensorInfo, count: int) -> Floats:
    """The values that a pointer one block too low gives: the block before the tensor's first byte, then the tensor's own."""
    elements, size = block_of(info.type, info.name)
    with model.path.open("rb") as file:
        file.seek(info.offset - size)
        data = np.frombuffer(file.read(size * (-(-count // elements))), np.uint8)
    return _values(data[: len(data) // size * size].reshape(-1, size), info.type)


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
    """Both nibbles of a byte taken as neighbours, where ggml has them half a block apart."""
    if info.type not in (2, 3, 6, 7, 20):
        return None
    values = _values(_blocks(model, info, count).copy(), info.type).reshape(-1, 2, 16)
    return np.ascontiguousarray(values.swapaxes(1, 2)).reshape(-1)


def _as(model: GgufModel, info: TensorInfo, count: int, kind: int) -> Floats:
    return _values(_blocks(model, info, count), kind)


def _another(model: GgufModel, info: TensorInfo, values: Floats, leading: dict[str, Floats]) -> str:
    """The name of another tensor that begins with these values."""
    if not leading:
        for name, other in model.tensors.items():
            leading[name] = first_values(model, other, min(_OTHERS, int(np.prod(other.shape))))
    count = min(len(values), _OTHERS)
    found: Mapping[str, Floats] = {name: other for name, other in leading.items() if name != info.name and len(other) >= count}
    return next((name for name, other in found.items() if same(values[:count], other[:count])), "")
