"""How large an error other experts can make, of rows of which few values are known."""

import numpy as np
import pytest
from msgspec.structs import replace
from numpy.typing import NDArray

from checkpoints.record import Dump, Rows
from checkpoints.summary import summarise
from parity.diff.measured.align import align
from parity.diff.measured.measure import Measured, energies, measured
from parity.diff.measured.tokens import compare_tokens
from parity.diff.readings.wrong_values import error_energies

POINT, ROWS, WIDTH = "blk.0.ffn_moe_act", 8, 1408


def sparse(draw: np.random.Generator) -> NDArray[np.float32]:
    """Squares of rectified values, a tenth of them active, as some experts have them."""
    values: NDArray[np.float32] = np.square(np.maximum(draw.standard_normal((ROWS, WIDTH)) - 1.28, 0)).astype(np.float32)
    return values


def of_rows(ours: NDArray[np.float32], ref: NDArray[np.float32], size: int | None = 10) -> Measured:
    """The measures of bare rows of leading values beside whole ones."""

    def rows(values: NDArray[np.float32]) -> Rows:
        return summarise(POINT, values, np.arange(ROWS), slice_size=size)

    bare = replace(rows(ours), stats={}, sketch=None)
    left, right = Dump("ours", None, {POINT: bare}), Dump("ref", None, {POINT: rows(ref)})
    return measured(align(left, right, None, compare_tokens(left, right), None), left, right)


def test_leading_values_next_to_nothing_do_not_enlarge_an_error() -> None:
    """Of 400 rows of other sparse experts, ten values known, the errors are not taken for a hundred times the energy of the largest row."""
    draw = np.random.default_rng(5)
    for _ in range(50):
        seen = of_rows(sparse(draw), sparse(draw))
        assert (error_energies(seen) < 100 * energies(seen).max()).all()


@pytest.mark.parametrize("size", [10, None])
def test_an_error_is_as_large_as_its_values(size: int | None) -> None:
    """Of dense rows the energy of an error is estimated within a factor of five by ten values, and exact by all."""
    draw = np.random.default_rng(6)
    ours, ref = draw.standard_normal((2, ROWS, WIDTH)).astype(np.float32) * 3
    ratio = error_energies(of_rows(ours, ref, size)) / np.sum((ours.astype(np.float64) - ref) ** 2, axis=1)
    assert (np.abs(np.log(ratio)) < np.log(5) if size else np.isclose(ratio, 1)).all()


def test_an_error_beside_a_row_of_zeros_has_its_own_size() -> None:
    """Where the reference's row is zero, NMSE is infinite and the error is not."""
    ours, ref = np.ones((ROWS, WIDTH), np.float32), np.ones((ROWS, WIDTH), np.float32)
    ref[2] = 0
    assert error_energies(of_rows(ours, ref, None)).tolist() == [0, 0, WIDTH, 0, 0, 0, 0, 0]
