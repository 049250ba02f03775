"""Each measure against a plain computation in float64, record by record."""

import numpy as np
import pytest
from dumps import dump, random
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from checkpoints.record import Dump, Rows
from checkpoints.short_rows import reduced
from checkpoints.summary import summarise
from parity.diff.compare import compare
from parity.diff.measured.align import Pair
from parity.diff.measured.choices import kl, overlap
from parity.diff.measured.measure import Measures, measure
from parity.diff.measured.slices import SLICE_FLOOR


def rows(array: np.ndarray, point: str = "blk.0.l_out", slice_size: int | None = 16) -> Rows:
    """Records of an array [T, n]."""
    return summarise(point, array.astype(np.float32), np.arange(len(array)), slice_size=slice_size)


def both(a: np.ndarray, b: np.ndarray, slice_size: int | None = 16) -> Measures:
    """The measures of two arrays."""
    return measure([Pair("blk.0.l_out", rows(a, slice_size=slice_size), rows(b, slice_size=slice_size))])


def test_measures_are_what_their_names_say() -> None:
    """NMSE, cosine, largest absolute, relative and ulp error and their indices equal a loop over records."""
    rng = np.random.default_rng(0)
    b = rng.standard_normal((20, 200)).astype(np.float32)
    a = (b * (1 + 1e-3 * rng.standard_normal(b.shape))).astype(np.float32)
    measures = both(a, b)
    for t in range(20):
        x, y = a[t, :16].astype(np.float64), b[t, :16].astype(np.float64)
        energy = max(np.sum(y**2), SLICE_FLOOR * 16 / 200 * np.sum(b[t].astype(np.float64) ** 2))
        assert measures.nmse_slice[t] == pytest.approx(np.sum((x - y) ** 2) / energy, rel=1e-12)
        assert measures.cosine[t] == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-12)
        assert measures.max_abs[t] == np.abs(x - y).max()
        assert measures.index[t] == np.abs(x - y).argmax()
        assert measures.relative[t] == pytest.approx((np.abs(x - y) / np.abs(y)).max(), rel=1e-12)
        steps = [abs(int(p) - int(q)) for p, q in zip(a[t, :16].view(np.int32), b[t, :16].view(np.int32), strict=True)]
        assert measures.ulp[t] == max(steps)
        assert measures.ulp_index[t] == int(np.argmax(steps))


def test_the_sketch_estimates_the_error_of_the_whole_row() -> None:
    """Over many rows the estimated NMSE has the true one as its mean; each lies within its stated deviation."""
    rng = np.random.default_rng(1)
    b = rng.standard_normal((400, 300))
    a = b + 0.01 * rng.standard_normal(b.shape)
    estimated = both(a, b).nmse_row
    a, b = a.astype(np.float32).astype(np.float64), b.astype(np.float32).astype(np.float64)
    ratio = estimated / (np.sum((a - b) ** 2, axis=1) / np.sum(b**2, axis=1))
    assert np.mean(ratio) == pytest.approx(1, abs=0.05)
    assert np.std(ratio) == pytest.approx(0.25, abs=0.05)


@given(st.integers(1, 40), st.floats(0, 1), st.integers(0, 2**31))
def test_statistics_alone_give_a_lower_bound(n: int, size: float, seed: int) -> None:
    """Without sketches `l2` and `sum` never claim more than the true error of the row."""
    rng = np.random.default_rng(seed)
    b = rng.standard_normal((1, n)).astype(np.float32)
    a = (b + size * rng.standard_normal(b.shape)).astype(np.float32)
    pair = Pair("x", *(replace(rows(side, slice_size=1), sketch=None) for side in (a, b)))
    measured = measure([pair])
    wide = a.astype(np.float64), b.astype(np.float64)
    true = np.sum((wide[0] - wide[1]) ** 2) / np.sum(wide[1] ** 2)
    assert measured.nmse_row[0] <= true * (1 + 1e-9)
    assert measured.bound[0] or n == 1


def test_whole_rows_are_measured_exactly() -> None:
    """Where a record holds its whole row, the row's NMSE is computed from it and not estimated."""
    rng = np.random.default_rng(2)
    b = rng.standard_normal((3, 50)).astype(np.float32)
    a = b + np.float32(0.01)
    measures = both(a, b, slice_size=None)
    true = np.sum((a.astype(np.float64) - b) ** 2, axis=1) / np.sum(b.astype(np.float64) ** 2, axis=1)
    assert measures.nmse_row == pytest.approx(true, rel=1e-12)


def test_zero_asks_for_equality() -> None:
    """If the reference is all zero, zero agrees and anything else is an infinite error."""
    zero = np.zeros((2, 20))
    other = zero.copy()
    other[1, 3] = 1e-30
    assert both(other, zero).nmse.tolist() == [0, np.inf]


def test_an_almost_empty_slice_is_held_against_the_row() -> None:
    """Leading values that are all but zero do not turn the row's own noise into an error."""
    b = np.ones((1, 100))
    b[0, :16] = 1e-9
    a = b.copy()
    a[0, :16] += 1e-8
    assert both(a, b).nmse_slice[0] == pytest.approx(np.sum(1e-16 * np.ones(16)) / (SLICE_FLOOR * 16 / 100 * 84), rel=1e-4)


def test_different_slices_compare_what_both_have() -> None:
    """Of 16 and 4 leading values 4 are compared, and an index beyond them cannot be named."""
    b = np.arange(1.0, 41.0).reshape(2, 20)
    a = b.copy()
    a[:, 10] += 1
    pair = Pair("x", replace(rows(a), sketch=None, stats={}), replace(rows(b, slice_size=4), sketch=None, stats={}))
    assert measure([pair]).nmse.tolist() == [0, 0]


def test_scattered_values_are_matched_by_their_indices() -> None:
    """Values with indices meet the same elements of the other side, wherever they stand."""
    b = np.random.default_rng(3).standard_normal((2, 20)).astype(np.float32)
    indices = np.array([[19, 2, 7], [0, 5, 6]])
    scattered = replace(
        rows(b, slice_size=3), values=np.take_along_axis(b, indices, axis=1) + np.float32([[0, 0, 1]]), indices=indices
    )
    measured = measure([Pair("x", scattered, rows(b, slice_size=None))])
    assert measured.max_abs == pytest.approx([1, 1], rel=1e-6)
    assert measured.index.tolist() == [7, 6]


def test_printed_digits_hide_what_they_round_away() -> None:
    """A dump printed with %f agrees with the numbers that it was printed from, and with nothing a quantum away."""
    ref = random()
    printed = {name: np.round(x, 3).astype(np.float32) for name, x in ref.items()}
    side = dump(printed, header=None)
    coarse = {name: replace(r, quantum=np.full(r.values.shape, 1e-3), sketch=None, stats={}) for name, r in side.points.items()}
    verdict = compare(Dump("p", None, coarse), dump(ref))
    assert verdict
    assert verdict.worst is not None
    assert verdict.worst.nmse == 0
    assert any("1e-03" in note for note in verdict.notes)
    off = {name: replace(r, values=r.values + np.float32(2e-3)) for name, r in coarse.items()}
    worst = compare(Dump("p", None, off), dump(ref)).worst
    assert worst is not None
    assert worst.nmse is not None
    assert worst.nmse > 0


def test_many_points_measure_as_each_alone() -> None:
    """Stacking records of points with different widths changes no number, beyond the order of float64 sums, and no place."""
    rng = np.random.default_rng(4)
    pairs = []
    for number, width in enumerate((16, 3, 64, 16, 3, 1)):
        b = rng.standard_normal((4, width)).astype(np.float32)
        pairs.append(Pair(f"x{number}", rows(b + np.float32(0.1 * (number + 1))), rows(b)))
    together = measure(pairs)
    alone = [measure([pair]) for pair in pairs]
    for name in ("nmse", "nmse_slice", "nmse_row", "max_abs", "index", "ulp"):
        expected = np.concatenate([getattr(measures, name) for measures in alone])
        np.testing.assert_allclose(getattr(together, name), expected, rtol=1e-12, err_msg=name)


def test_kl_and_overlap() -> None:
    """KL divergence in nats and the share of common candidates equal their definitions; equal rows give 0 and 1."""
    rng = np.random.default_rng(5)
    x, y = rng.standard_normal((2, 50)).astype(np.float32)
    p, q = (np.exp(z.astype(np.float64)) / np.exp(z.astype(np.float64)).sum() for z in (x, y))
    assert kl(x, y) == pytest.approx(np.sum(p * np.log(p / q)), rel=1e-9)
    assert kl(x, x) == 0
    assert overlap(x, x, 5) == 1
    assert overlap(np.arange(10, dtype=np.float32), -np.arange(10, dtype=np.float32), 5) == 0


def test_logits_compare_as_choices_where_they_are_whole() -> None:
    """Whole rows of logits tell the first choice, its margin and the KL divergence."""
    ref = random()
    ours = {name: x.copy() for name, x in ref.items()}
    best = int(ref["logits"][4].argmax())
    ours["logits"][4, best] -= 10
    top = np.sort(ref["logits"], axis=1)
    closest = int((top[:, -1] - top[:, -2]).argmin())
    ours["logits"][closest, ref["logits"][closest].argmax()] += 2  # ours would have another margin there
    verdict = compare(dump(ours, slice_size=None), dump(ref, slice_size=None))
    choices = verdict.choices
    assert choices is not None
    assert (choices.known, choices.agree, choices.rows, choices.differs_at, choices.ref_id) == (12, 11, 12, 4, best)
    assert choices.margin == pytest.approx((top[:, -1] - top[:, -2]).min())
    of_ref, of_ours = (
        [kl(a, b) for a, b in zip(x, y, strict=True)]
        for x, y in ((ref["logits"], ours["logits"]), (ours["logits"], ref["logits"]))
    )
    assert max(of_ref) != pytest.approx(max(of_ours), rel=1e-3)
    assert choices.kl == pytest.approx(max(of_ref), rel=1e-9)


@pytest.mark.parametrize("shape", [(0, 0), (0, 4), (7, 3), (3, 7), (300, 16)])
def test_short_rows_are_reduced_as_long_ones(shape: tuple[int, int]) -> None:
    """Whichever way the array lies in memory, each row's result is that of the row."""
    rows = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    assert reduced(np.logical_or, rows > 1).tolist() == [any(value > 1 for value in row) for row in rows.tolist()]
    if shape[1]:
        assert reduced(np.minimum, rows).tolist() == [min(row) for row in rows.tolist()]
