"""Rows that are all but zero beside the others of their point have limits of their own; what errors as large as values tell."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from dumps import dump, random, spoiled

from checkpoints.answers.diff import Limits, RowLimit
from parity.diff.compare import Options, comparison
from parity.diff.tolerances.few_numbers import share_of_usual
from parity.explain.rounding.precision import PrecisionFloor

ROWS = np.array([1.0, 2.0, 1e-8, 1.5])  # energies


def limits_for(cost: list[float], energy: np.ndarray[Any, Any] = ROWS) -> list[float]:
    """The limits of one point's records, whose arithmetic costs them that much."""
    costs = (np.array(cost),)
    ref = SimpleNamespace(stats={"l2": np.sqrt(energy)})
    entry = cast(Any, SimpleNamespace(pair=SimpleNamespace(ref=ref), rows=np.arange(len(cost))))
    return PrecisionFloor("bf16", costs, costs).limits([entry], 30.0)[0].tolist()


def test_a_row_that_is_all_but_zero_gives_the_others_no_limit() -> None:
    """Rounding that moves one such row a thousand times as far as it is large leaves the others' limit where it was."""
    usual, other = limits_for([1e-4, 1e-4, 1e-4, 1e-4])[0], limits_for([1e-4, 1e-4, 1e3, 1e-4])
    assert other[:2] + other[3:] == [pytest.approx(30 * (3e-4 + 1e3 * 30 * 1e-8 / 1.25) / 4)] * 3
    assert usual == pytest.approx(30 * 3e-4 / 4, rel=1e-3)
    assert other[0] < 1 < other[2] <= 30 * 1.001e3 / 4


def test_a_small_row_keeps_its_point_s_limit_where_its_noise_is_small_too() -> None:
    """Its own limit is no larger than what the mean over all rows gives."""
    assert limits_for([1e-4] * 4)[2] == pytest.approx(30 * 1e-4)


def test_rows_of_one_size_have_the_mean_s_limit() -> None:
    """Other experts at one position, which cost it its own size, count as before: also where rows are up to thirty times smaller."""
    assert limits_for([1e-4, 2.0, 1e-4, 1e-4], np.array([1.0, 3.0, 0.1, 1.0])) == [pytest.approx(30 * 2.0003 / 4)] * 4


def test_the_share_is_of_the_usual_row() -> None:
    """One row far larger than all others makes none of them small, and rows of zeros alone have no usual one."""
    assert share_of_usual(np.array([1e6, 1.0, 2.0, 1.0])).tolist() == [1, 1, 1, 1]
    assert share_of_usual(np.zeros(3)).tolist() == [1, 1, 1]


def test_a_record_s_own_limit_holds_there_alone() -> None:
    """An error of 0.5 agrees at the one position whose limit is 1, and is a divergence at the next."""
    right = random()
    ours = spoiled(right, ("logits",), slice(3, 5), float(np.sqrt(0.5)))
    measured = Limits(1e-2, 1e-2, "measured", points={"logits": 1e-2}, rows=(RowLimit("logits", 0, 3, 1.0),))
    first = comparison(dump(ours), dump(right), Options(compute="bf16", limits=measured)).verdict.first_divergence
    assert first is not None
    assert (first.checkpoint, first.token_idx) == ("logits", 4)


def test_what_is_as_far_off_as_unrelated_values_tells_nothing() -> None:
    """A layer's output a thousand times too large is no other record because a norm after it, half wrong itself, agrees by its limit."""
    right = random()
    ours = {name: x.copy() for name, x in right.items()}
    ours["blk.23.l_out"] *= np.float32(1000)
    ours = spoiled(ours, ("output_norm", "logits"), slice(None), float(np.sqrt(0.5)))
    measured = Limits(10.0, 10.0, "measured", points=dict.fromkeys(right, 10.0))
    verdict = comparison(dump(ours), dump(right), Options(compute="bf16", limits=measured)).verdict
    assert verdict.first_divergence is not None
    assert (verdict.first_divergence.checkpoint, verdict.record_faults) == ("blk.23.l_out", ())
