"""Our dequantisers against two independent ones: gguf-py's and libggml's, to the bit."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from checkpoints.errors import ModelError
from engine.weights.dequantize import FORMATS, dequantize
from engine.weights.gguf_model import GgufModel
from reference.to_float import ToFloat

KINDS = sorted(FORMATS)
BLOCKS = 512


def random_blocks(kind: int, seed: int = 3) -> np.ndarray:
    """Blocks of random bytes whose float16 fields are finite: NaN payloads cannot be compared."""
    size = FORMATS[kind][1]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (BLOCKS, size), dtype=np.uint8)
    places = {
        1: [0],
        2: [0],
        3: [0, 2],
        6: [0],
        7: [0, 2],
        8: [0],
        10: [80, 82],
        11: [108],
        12: [0, 2],
        13: [0, 2],
        14: [208],
        20: [0],
        23: [0],
    }
    for place in places.get(kind, []):
        blocks[:, place : place + 2] = rng.standard_normal(BLOCKS).astype(np.float16)[:, None].view(np.uint8)
    if kind in (0, 30):
        values = rng.standard_normal(BLOCKS).astype(np.float32)[:, None]
        blocks[:] = values.view(np.uint8) if kind == 0 else values.view(np.uint8)[:, 2:]
    return blocks


def by_libggml(blocks: np.ndarray, kind: int, count: int) -> np.ndarray:
    """The blocks dequantised by libggml's own `to_float`."""
    values = ToFloat()(blocks, kind, count)
    assert values is not None
    return values


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: gguf.GGMLQuantizationType(kind).name)
def test_random_blocks_equal_gguf_py(kind: int) -> None:
    """Random bytes in every field give the same float32 bits as gguf-py's dequantisation."""
    blocks = random_blocks(kind)
    ours = dequantize(blocks, kind, FORMATS[kind][0])
    theirs = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(kind))
    np.testing.assert_array_equal(ours.view(np.uint32).ravel(), np.ascontiguousarray(theirs).view(np.uint32).ravel())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != 0], ids=lambda kind: gguf.GGMLQuantizationType(kind).name)
def test_random_blocks_equal_libggml(kind: int) -> None:
    """Random bytes in every field give the same float32 bits as libggml's own to_float."""
    blocks = random_blocks(kind, seed=5)
    ours = dequantize(blocks, kind, FORMATS[kind][0]).ravel()
    np.testing.assert_array_equal(ours.view(np.uint32), by_libggml(blocks, kind, ours.size).view(np.uint32))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K_M", "Q5_0", "IQ4_XS"])
def test_tensors_of_a_real_file_equal_gguf_py(quantized: Callable[[str], Path], kind: str) -> None:
    """Every tensor of a file that llama.cpp quantised is gguf-py's dequantisation of it, to the bit, shape included."""
    path = quantized(kind)
    model = GgufModel(path)
    for tensor in gguf.GGUFReader(path).tensors:
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(model.load(tensor.name), expected)
        if expected.ndim == 2:
            rows = np.array([0, expected.shape[0] - 1, 1])
            np.testing.assert_array_equal(model.load_rows(tensor.name, rows), expected[rows])


def test_other_formats_go_through_gguf_py() -> None:
    """A codebook format that has no function here gives gguf-py's values."""
    kind = gguf.GGMLQuantizationType.IQ2_XS
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(1).integers(0, 256, (8, size), dtype=np.uint8)
    blocks[:, :2] = np.array([1.5], dtype=np.float16).view(np.uint8)
    np.testing.assert_array_equal(dequantize(blocks, int(kind), elements), gguf.quants.dequantize(blocks, kind))


def test_an_unknown_type_is_one_clear_error() -> None:
    """A type that neither we nor gguf-py can dequantise is refused by number."""
    with pytest.raises(ModelError, match="type 999"):
        dequantize(np.zeros((1, 34), dtype=np.uint8), 999, 32)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: gguf.GGMLQuantizationType(kind).name)
def test_damaged_blocks_are_values_and_no_warnings(kind: int) -> None:
    """Bytes of any value, infinite and NaN scales among them, give what libggml or gguf-py gives, without a warning."""
    elements, size, _ = FORMATS[kind]
    blocks = np.random.default_rng(9).integers(0, 256, (4 * BLOCKS, size), dtype=np.uint8)
    ours = dequantize(blocks, kind, elements)
    with np.errstate(all="ignore"):
        theirs = (
            gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(kind))
            if kind == 0
            else by_libggml(blocks, kind, ours.size)
        )
    np.testing.assert_array_equal(ours.ravel(), np.asarray(theirs).ravel())


def test_chunks_do_not_show() -> None:
    """A matrix of several chunks, the last one partial, equals the same rows dequantised one by one."""
    blocks = np.random.default_rng(2).integers(0, 256, (1100, 16 * 34), dtype=np.uint8)
    blocks.reshape(1100, 16, 34)[:, :, 1] = 0x3C  # scales between 1 and 2
    whole = dequantize(blocks, 8, 512)
    np.testing.assert_array_equal(whole, np.concatenate([dequantize(row[None], 8, 512) for row in blocks]))
