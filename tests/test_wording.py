"""Numbers, names and counts as sentences and tables show them."""

from math import inf

import numpy as np
import pytest

from checkpoints.nearest import nearest, unknown_names
from checkpoints.reading.line_order import note_on
from reports.numbers import error, limit, of_limit, ranges, values

SHOWN = {
    **{0: "–", 4e-5: "<0.01 %", 5e-5: "0.01 %", 1: "100.00 %", 1.04: "1.0 ×", 9.94: "9.9 ×", 10.4: "10 ×", 55.5: "56 ×"},
    **{123_456: "120,000 ×", 99_999_999: "100,000,000 ×", 1e8: "1e8 ×", 3.2e12: "3e12 ×"},
}


@pytest.mark.parametrize(("proportion", "shown"), SHOWN.items())
def test_a_proportion_of_a_limit(proportion: float, shown: str) -> None:
    """Percent up to the limit, one decimal up to ten times, then two digits, then a power of ten."""
    assert of_limit(proportion) == shown


def test_errors_and_limits() -> None:
    """An unknown error, none, a small one and an infinite one; limits in as few digits as they have."""
    assert [error(value) for value in (None, 0.0, 1.26e-13, inf)] == ["–", "0", "1.3e-13", "∞"]
    assert [limit(value) for value in (1e-10, 1.5e-9)] == ["1e-10", "1.5e-09"]


def test_digits_that_tell_two_values_apart() -> None:
    """As few as suffice, from 6 on; neighbours in float32 may need all 9, and equal values show what they are."""
    neighbours = np.nextafter(np.float32(1023), np.float32(2000)), np.float32(1023.00012)
    assert values((float(neighbours[0]),), (float(neighbours[1]),)) == [["1023.00006"], ["1023.00012"]]
    assert values((1.5,), (1.25,), (3.0,)) == [["1.5"], ["1.25"], ["3"]]
    assert values((1.5,), (1.5,)) == [["1.5"], ["1.5"]]


def test_positions_as_stretches() -> None:
    """A stretch is written by its ends; a gap of one position begins another."""
    assert ranges((0, 1, 2, 4, 6, 7)) == "0–2, 4, 6–7"


def test_four_unknown_names_are_listed_and_more_are_counted() -> None:
    """Each with the points that look most like it, if any does."""
    (four,) = unknown_names(["zzqx", "vvv1", "pp2", "rr3"])
    (five,) = unknown_names(["zzqx", "vvv1", "pp2", "rr3", "embd", "ss4"])
    assert "zzqx, vvv1" in four
    assert "rr3; where" in four
    assert "rr3 and 1 more; where" in five
    assert nearest("layer_5_attn_output")[0] == "blk.5.attn_out"
    assert nearest("xylophone") == []


def test_the_note_on_lines_without_positions() -> None:
    """The last position that was counted, and the point that has fewer lines than the others, if one has."""
    assert note_on({"embd": 3, "logits": 3}, 2) == (
        "no line has a token_idx: a point's first line is taken as position 0, its second as 1, … up to 2"
    )
    assert note_on({"embd": 3, "logits": 2}, 2).endswith("up to 2 (logits has only 2: of which positions?)")
    assert note_on({"a": 2, "b": 2, "c": 2, "d": 2, "e": 2}, 9).startswith("lines of a, b, c, d, … lack a token_idx")
