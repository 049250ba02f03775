"""Slice, statistics and sketch against plain loops in Python."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoints.summary import fmix32, sketch, summarise

MASK = 0xFFFFFFFF


def mixed(h: int) -> int:
    """MurmurHash3's fmix32 on Python integers."""
    h ^= h >> 16
    h = h * 0x85EBCA6B & MASK
    h ^= h >> 13
    h = h * 0xC2B2AE35 & MASK
    return h ^ h >> 16


def plain_sketch(row: np.ndarray) -> list[float]:
    """The sketch by its definition, element by element."""
    total = [0.0] * 32
    for i, x in enumerate(row.tolist()):
        bits = mixed(i + 1)
        for j in range(32):
            total[j] += x if bits >> j & 1 else -x
    return total


@given(st.lists(st.integers(0, MASK), min_size=1))
def test_hash(numbers: list[int]) -> None:
    """The vectorised hash is MurmurHash3's finaliser."""
    assert fmix32(np.array(numbers, dtype=np.uint32)).tolist() == [mixed(number) for number in numbers]


def test_sketch() -> None:
    """The sketch is its definition, across the borders of its blocks too."""
    rows = np.random.default_rng(0).standard_normal((2, 8192 + 50)).astype(np.float32)
    assert sketch(rows) == pytest.approx(np.array([plain_sketch(row) for row in rows]), rel=1e-9, abs=1e-9)


def test_statistics() -> None:
    """Count, sum, root of the sum of squares, extremes and their place, over finite elements only."""
    x = np.array([[1, -3, np.nan, 2, np.inf], [np.nan] * 5], dtype=np.float32)
    rows = summarise("embd", x, np.arange(2), slice_size=2)
    statistics = {name: column.tolist() for name, column in rows.stats.items()}
    assert statistics == {
        "n": [5, 5],
        "sum": [0, 0],
        "l2": [pytest.approx(14**0.5), 0],
        "min": [-3, 0],
        "max": [2, 0],
        "nonfinite": [2, 5],
        "absmax_at": [1, 0],
    }
    assert np.array_equal(rows.values, x[:, :2], equal_nan=True)
    assert rows.shapes == ((5,), (5,))


def test_any_bits_are_summarised_without_a_warning() -> None:
    """Signalling NaN, as other types' bytes read as float32 hold them, are counted as non-finite like any other."""
    bits = np.array([[0x7FA00000, 0x7F800000, 0xFF800000, 0x3F800000]], dtype=np.uint32)
    rows = summarise("embd", bits.view(np.float32), np.arange(1), step=0, decode=False)
    assert (rows.stats["nonfinite"][0], rows.stats["sum"][0]) == (3, 1)


def test_attention_rows_end_at_their_position() -> None:
    """A row of attention weights is [heads, t + 1]; what lies behind is the weight given to later positions."""
    heads, count = 3, 5
    x = np.random.default_rng(1).random((heads, count, 8)).astype(np.float32)  # padded to 8 cached positions
    rows = summarise("blk.0.kq_soft_max", x, np.arange(count), slice_size=4)
    for t in range(count):
        row = x[:, t, : t + 1].reshape(-1)
        assert rows.shapes[t] == (heads, t + 1)
        assert rows.counts[t] == min(4, len(row))
        assert np.array_equal(rows.values[t, : rows.counts[t]], row[:4])
        assert rows.stats["sum"][t] == pytest.approx(row.sum(dtype=np.float64))
        assert rows.stats["future_mass"][t] == pytest.approx(x[:, t, t + 1 :].sum(dtype=np.float64) / heads)
        assert rows.sketch is not None
        assert rows.sketch[t] == pytest.approx(plain_sketch(row), rel=1e-5, abs=1e-5)


def test_cached_rows_add_up() -> None:
    """What attention read from the cache at t is rows 0 to t, summarised as one activation of [t + 1, width]."""
    x = np.random.default_rng(2).standard_normal((6, 4)).astype(np.float32)
    rows = summarise("blk.0.k_read", x, np.array([2, 5]), slice_size=10)
    for r, t in enumerate((2, 5)):
        row = x[: t + 1].reshape(-1)
        assert rows.shapes[r] == (t + 1, 4)
        assert np.array_equal(rows.values[r], row[:10])
        assert rows.stats["n"][r] == len(row)
        assert rows.stats["l2"][r] == pytest.approx(np.linalg.norm(row.astype(np.float64)))
        assert rows.stats["absmax_at"][r] == np.abs(row).argmax()
        assert rows.sketch is not None
        assert rows.sketch[r] == pytest.approx(plain_sketch(row), rel=1e-5, abs=1e-5)


def test_some_positions_of_a_window() -> None:
    """`keep` chooses rows; `first` says where a sequence that does not begin at 0 begins."""
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    rows = summarise("embd", x, np.arange(100, 104), keep=np.array([1, 3]))
    assert rows.token_idx.tolist() == [101, 103]
    assert np.array_equal(rows.values, x[[1, 3]])
    weights = np.ones((1, 2, 2), dtype=np.float32)
    assert summarise("blk.0.kq", weights, np.array([100, 101]), first=100).shapes == ((1, 1), (1, 2))


def test_wrong_arrays_are_refused() -> None:
    """Device memory, another type and a wrong number of rows are errors that say so."""
    with pytest.raises(TypeError, match="host memory"):
        summarise("embd", [[1.0]], np.arange(1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="float64"):
        summarise("embd", np.zeros((1, 2)), np.arange(1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one row"):
        summarise("embd", np.zeros((2, 2), np.float32), np.arange(3))
