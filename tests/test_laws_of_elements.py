"""A law of the recorded elements says no more than they show: beside an outlier, and of rows that were not recorded whole."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from explaining import PROMPT, RIGHT, STEPS
from msgspec.structs import replace
from planted import Faulty

from parity.explain.case import Case, Half
from parity.explain.explain import explain
from parity.explain.records.beside import few_positions
from parity.laws.beside import Beside, room_of_elements
from parity.laws.laws import law

F16_LIMIT = 1e-4  # about 30 times what F16 costs


def test_beside_an_outlier_other_numbers_are_not_right_unseen() -> None:
    """Of the outlier's energy F16's limit is wider than all other elements, which are other numbers: nothing calls them right."""
    draw = np.random.default_rng(5)
    right, dumped = draw.normal(0, 1, (2, 6, 16))
    right[:, 3] = dumped[:, 3] = 900.0
    dumped[:, 5] = 60.0
    energy = np.square(right).sum(axis=1)
    room = room_of_elements(np.full(6, F16_LIMIT), energy, dumped, right)
    assert (room < np.square(dumped - right)[:, 6:].sum(axis=1)).all()
    assert "right" not in law(Beside(dumped, right, np.arange(16), room, np.zeros(6), np.arange(6)))


def test_a_row_of_one_element_has_the_usual_room() -> None:
    """Nothing is beside the only element of a row that is not zero."""
    right = np.array([[5.0, 0.0, 0.0], [3.0, 0.0, 0.0]])
    assert (room_of_elements(np.full(2, 1e-3), np.square(right).sum(axis=1), right, right) > 0).all()


@pytest.mark.usefixtures("computed")
def test_a_factor_that_the_sketch_contradicts_is_said_of_the_recorded_elements(engine: Faulty) -> None:
    """The first 16 elements alone are 1.7 times the right ones, and no others were recorded: the rows' sketch tells that these are not."""

    def scaled(*inputs: np.ndarray, op: Callable[..., np.ndarray], **params: object) -> np.ndarray:
        out = op(*inputs, **params).copy()
        out[:, :16] *= np.float32(1.7)
        return out

    steps = [replace(step, op=partial(scaled, op=step.op)) if step.makes == "blk.2.ffn_norm" else step for step in engine.right]
    answer = explain(engine.dump(RIGHT, PROMPT, points="*", size=16, bare=False, steps=steps), engine.model, STEPS)
    assert answer.law == "every recorded element is 1.7 times the right one; the whole rows are not"
    assert not answer.causes


def test_a_factor_of_whole_rows_is_said_of_them() -> None:
    """The same factor in recorded elements and sketch is every element's; a sketch that is not finite tells nothing."""
    right, sketches = np.random.default_rng(1).normal(0, 1, (2, 4, 16))
    known = Beside(1.7 * right, right, np.arange(16), np.full(4, 1e-9), np.zeros(4), np.arange(4))
    for of_dump, times in (
        (1.7 * sketches, "every element"),
        (sketches, "every recorded element"),
        (np.inf * sketches, "every element"),
    ):
        assert law(replace(known, sketches=(of_dump, sketches))).startswith(f"{times} is 1.7 times the right one")


def test_under_wide_limits_other_positions_are_not_said_to_be_right(engine: Faulty) -> None:
    """A record at position 2 alone is wrong, by float32's limits; by wide ones it is the only one over its limit, which says less."""
    dump = engine.dump(RIGHT, PROMPT, points="*", size=16)
    entry = next(entry for entry in Case(dump, Half(engine.transformer), STEPS).entries if entry.point == "blk.1.ffn_out")
    errors = np.where(entry.rows == 2, 1.0, 0.0)
    positions = np.arange(len(PROMPT))
    assert few_positions(entry, errors, positions) == "at position 2 alone "
    wide = replace(entry, limit=np.full(len(entry.rows), 1e-4))
    assert few_positions(wide, errors, positions) == "at position 2, the only one over its limit, "
