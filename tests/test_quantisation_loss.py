"""What libggml's quantisation leaves of a weight, measured: the limits of `weights --hf` rest on it."""

import ctypes
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest

from parity.weights.quantisation_loss import LOSS, largest_loss

ROWS, COLUMNS = 32, 512  # of the table's 256: IQ1_S takes half a minute for those


@pytest.fixture(scope="module")
def quantise() -> ctypes.CDLL:
    """libggml, with its tables made."""
    library = ctypes.CDLL(str(next(Path(llama_cpp.__file__).parent.rglob("libggml-base.so"))))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    return library


def distributions() -> list[np.ndarray]:
    """Weights as they may be distributed."""
    rng = np.random.default_rng(0)
    shape = (ROWS, COLUMNS)
    outliers = rng.standard_normal(shape)
    outliers[:, ::64] *= 10
    drawn = (
        rng.standard_normal(shape),
        rng.laplace(size=shape),
        rng.standard_t(3, size=shape),
        rng.uniform(-1, 1, shape),
        outliers,
    )
    return [np.ascontiguousarray(weights * 0.02, dtype=np.float32) for weights in drawn]


_LONG = (17, 19, 22, 29)  # their grids are searched


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind in _LONG else kind for kind in sorted(LOSS)]
)
def test_the_table_is_what_libggml_leaves(kind: int, quantise: ctypes.CDLL) -> None:
    """The worst distribution is the table's figure to two fifths (fewer rows here), and a wrong order of rows is told in every type."""
    name = gguf.GGMLQuantizationType(kind)
    elements, size = gguf.GGML_QUANT_SIZES[name]
    quantise.ggml_quantize_init(kind)
    importance = np.ones(COLUMNS, np.float32)
    worst = 0.0
    for weights in distributions():
        blocks = np.zeros(ROWS * COLUMNS // elements * size, np.uint8)
        quantise.ggml_quantize_chunk(kind, weights.ctypes.data, blocks.ctypes.data, 0, ROWS, COLUMNS, importance.ctypes.data)
        held = gguf.quants.dequantize(blocks.reshape(ROWS, -1), name).astype(np.float64)
        energy = float((weights.astype(np.float64) ** 2).sum())
        worst = max(worst, float(((held - weights) ** 2).sum()) / energy)
        rolled = float(((np.roll(held, 1, axis=0) - weights) ** 2).sum()) / energy
        assert rolled > largest_loss(kind)
    assert LOSS[kind] == pytest.approx(worst, rel=0.4)
