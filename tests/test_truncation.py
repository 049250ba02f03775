"""A sampler that keeps the likeliest tokens is found by how far the server's log-probabilities are above llama.cpp's."""

import numpy as np
import pytest
from numpy.typing import NDArray

from parity.server.truncation import Truncated, truncations

Rows = list[NDArray[np.float32]]


def drawn(count: int = 8, width: int = 3000, spread: float = 1.0) -> Rows:
    random = np.random.default_rng(5)
    return [random.normal(0, spread, width).astype(np.float32) for _ in range(count)]


def likeliest(row: NDArray[np.float32]) -> NDArray[np.float64]:
    p = np.exp(row.astype(np.float64) - float(row.max()))
    return np.sort(p / p.sum())[::-1]


def fitted(rows: Rows, counts: list[int], kind: str) -> Truncated:
    """The fit of this kind where the server kept so many of each row's likeliest tokens."""
    offsets = [float(-np.log(likeliest(row)[:count].sum())) for row, count in zip(rows, counts, strict=True)]
    return next(fit for fit in truncations(rows, offsets) if kind in fit.what)


@pytest.mark.parametrize("count", [1, 40, 700, 1000])
def test_a_top_k_is_found_up_to_a_thousand(count: int) -> None:
    """The number itself, and a row cut by it has as many tokens left; those cut off have no probability in float32."""
    rows = drawn()
    fit = fitted(rows, [count] * len(rows), "top-k")
    assert fit.what == f"a top-k of {count}"
    for row in rows:
        left = fit.left(row)
        assert int((left == row).sum()) == count
        assert np.exp(left - left.max(), dtype=np.float32)[left != row].sum() < 1e-30


def test_a_top_k_beyond_a_thousand_is_not_looked_for() -> None:
    """Where a thousand tokens are kept of which most have next to no probability, more make no difference."""
    rows = drawn()
    assert fitted(rows, [1500] * len(rows), "top-k").what == "a top-k of 1000"


@pytest.mark.parametrize("mass", [0.05, 0.1, 0.5, 0.95, 0.999])
def test_a_top_p_is_found(mass: float) -> None:
    """From 0.05 to 0.999, where rows are so different that no other mass gives the same numbers."""
    rows = [row * (1 + i) for i, row in enumerate(drawn(width=300))]
    counts = [int(np.searchsorted(np.cumsum(likeliest(row)), mass)) + 1 for row in rows]
    fit = fitted(rows, counts, "top-p")
    assert [int((fit.left(row) == row).sum()) for row in rows] == counts
    assert fit.what == f"a top-p of {mass:.3g}" or mass < 0.2  # of the least masses several keep the same tokens


@pytest.mark.parametrize("share", [0.001, 0.05, 0.85])
def test_a_min_p_is_found(share: float) -> None:
    """A share of the likeliest token's probability, from 0.001 to 0.9."""
    rows = [row * (1 + i / 4) for i, row in enumerate(drawn(24, 600))]
    counts = [int((likeliest(row) >= share * likeliest(row)[0]).sum()) for row in rows]
    fit = fitted(rows, counts, "min-p")
    assert [int((fit.left(row) == row).sum()) for row in rows] == counts


def test_a_row_with_fewer_tokens_than_are_kept_is_left_as_it_is() -> None:
    """A top-k of the whole vocabulary changes nothing."""
    rows = drawn(width=20)
    fit = fitted(rows, [20] * len(rows), "top-k")
    assert all(np.array_equal(fit.left(row), row) for row in rows)


def test_tokens_that_cannot_be_chosen_are_no_warning() -> None:
    """A logit of −∞, as models with unused ids have it, counts in no mean: NumPy warned of it, which is an error here."""
    rows = list(np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32))
    for row in rows:
        row[7] = -np.inf
    assert len(list(truncations(rows, [0.3, 0.2, 0.4]))) == 7
