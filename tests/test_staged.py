"""What the host adds to records of a device: sums of a row's parts."""

import numpy as np

from checkpoints.summary import summarise
from engine.capture.staged import PART_DOUBLES, added_up


def test_sums_of_parts_are_the_statistics_of_the_row() -> None:
    """Parts of a row with non-finite values, each summed up by itself, add up to what the plain definition gives for the row."""
    row = np.random.default_rng(1).standard_normal(1000).astype(np.float32)
    row[[3, 700]] = np.nan, np.inf
    whole = summarise("logits", row[None], np.arange(1))
    sums = np.zeros((3, PART_DOUBLES))
    for part, (first, last) in zip(sums, ((0, 300), (300, 650), (650, 1000)), strict=True):
        kept = np.zeros_like(row)
        kept[first:last] = row[first:last]
        alone = summarise("logits", kept[None], np.arange(1))
        finite = row[first:last][np.isfinite(row[first:last])]
        assert alone.sketch is not None
        part[:32] = alone.sketch[0]
        size = np.abs(np.where(np.isfinite(kept), kept, 0))
        part[32:] = finite.sum(dtype=np.float64), (finite.astype(np.float64) ** 2).sum(), finite.min(), finite.max(), 0, 0, 0, 0
        part[36:39] = last - first - finite.size, size.max(), size.argmax()
    stats, sketch = added_up(sums, row.size)
    for place, name in enumerate(("n", "sum", "l2", "min", "max", "nonfinite", "absmax_at")):
        np.testing.assert_allclose(stats[place], whole.stats[name][0], rtol=1e-12, atol=1e-12, err_msg=name)
    assert whole.sketch is not None
    np.testing.assert_allclose(sketch, whole.sketch[0], rtol=1e-5, atol=1e-5)  # of float32 sketches of the parts


def test_a_row_without_a_finite_value_has_no_extremes() -> None:
    """Where every part has only NaN, minimum and maximum are 0 and all elements are counted."""
    sums = np.zeros((2, PART_DOUBLES))
    sums[:, 34], sums[:, 35], sums[:, 36] = np.inf, -np.inf, 5
    stats, _ = added_up(sums, 10)
    np.testing.assert_array_equal(stats[[0, 3, 4, 5]], [10, 0, 0, 10])
