"""Weights as the device's kernels read them: planes of the same values."""

import gguf
import numpy as np
import pytest

from engine.weights.packing import Q4_0, Q5_0, Q8_0, pack, pack_as_bytes

SIZES = {Q4_0: 18, Q5_0: 22, Q8_0: 34}


def random_blocks(kind: int) -> np.ndarray:
    """Three rows of 128 values, all bits random but for the scales."""
    raw = np.random.default_rng(kind).integers(0, 256, (3, 4 * SIZES[kind]), dtype=np.uint8)
    raw.reshape(-1, SIZES[kind])[:, :2] = np.array([0.37], np.float16).view(np.uint8)
    return raw


@pytest.mark.parametrize("kind", sorted(SIZES))
def test_bytes_hold_the_values_of_smaller_types(kind: int) -> None:
    """Q4_0 and Q5_0 as bytes and scales of Q8_0 are what gguf-py makes of their blocks."""
    raw = random_blocks(kind)
    packed = pack_as_bytes(raw, kind, 128)
    scales = np.ascontiguousarray(packed.scales).view(np.float16).astype(np.float32)
    assert packed.kind == Q8_0
    values = np.ascontiguousarray(packed.low).view(np.int8) * scales
    np.testing.assert_array_equal(values.reshape(3, 128), gguf.dequantize(raw, gguf.GGMLQuantizationType(kind)))


def test_eight_bytes_have_sixteen_neighbours() -> None:
    """A lane's eight bytes of Q4_0 hold elements i and i + 8 of sixteen neighbours, those of Q5_0 too."""
    for kind, zero in ((Q4_0, 8), (Q5_0, 0)):
        raw = random_blocks(kind)
        low = np.ascontiguousarray(pack(raw, kind, 128).low).reshape(-1, 2, 8)
        q = np.concatenate([low & 15, low >> 4], axis=2).reshape(3, 128).astype(np.float32)
        values = gguf.dequantize(raw, gguf.GGMLQuantizationType(kind)) / np.float32(np.float16(0.37))
        expected = np.rint(values) + (zero if zero else 16)
        np.testing.assert_array_equal(q, expected if zero else expected % 16)
