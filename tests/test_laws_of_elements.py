"""A law of the recorded elements says no more than they show: beside an outlier, and of rows that were not recorded whole."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from explaining import PROMPT, RIGHT, STEPS
from msgspec.structs import replace
from planted import Faulty

from engine.backend import choose
from engine.graph import Step
from engine.replay.precision import ROUNDINGS
from engine.replay.replay import Replay
from parity.explain.case import Case, Half
from parity.explain.explain import explain
from parity.explain.records.beside import beside, few_positions
from parity.laws.beside import Beside, Floats, room, room_of_others
from parity.laws.laws import law

F16_LIMIT = 1e-4  # about 30 times what F16 costs


def _beside(dumped: Floats, right: Floats, limit: float) -> Beside:
    noise = room(np.full(len(right), limit), np.square(right).sum(axis=1), dumped, right)
    zero, rows = np.zeros(len(right)), np.arange(len(right))
    return Beside(dumped, right, np.arange(right.shape[1]), noise, zero, rows, others=room_of_others(noise, right))


def test_beside_an_outlier_other_numbers_are_not_right_unseen() -> None:
    """Of the outlier's energy F16's limit is wider than all other elements, which are other numbers: nothing calls them right."""
    draw = np.random.default_rng(5)
    right, dumped = draw.normal(0, 1, (2, 6, 16))
    right[:, 3] = dumped[:, 3] = 900.0
    dumped[:, 5] = 60.0
    assert "right" not in law(_beside(dumped, right, F16_LIMIT))


@pytest.mark.parametrize("outlier", [50.0, 300.0, 900.0])
@pytest.mark.parametrize(("kind", "limit"), [("f16", 1e-5), ("bf16", 1e-3)])
def test_an_outliers_own_rounding_is_no_fault_of_it(outlier: float, kind: str, limit: float) -> None:
    """An outlier whose rounding is larger than all others has the law of its row, and is not wrong where others are."""
    right = np.random.default_rng(3).normal(0, 1, (6, 16))
    right[:, 3] = outlier * np.linspace(0.8, 1.2, 6)
    single = np.where(np.arange(16) == 7, 0.0, right)
    channels = np.linspace(1.2, 2.0, 16)
    for changed, said in (
        (1.7 * right, "every element is 1.7 times the right one"),
        (1.05 * right, "every element is 1.05 times the right one"),
        (right + 5, "every element is the right one plus 5"),
        (single, "element 7 alone is 0; the others are right"),
        (channels * right, "every element is off by a factor of its own at every position"),
    ):
        dumped = ROUNDINGS[kind](changed.astype(np.float32)).astype(np.float64)
        assert law(_beside(dumped, right, limit)).startswith(said)


def test_a_row_of_one_element_has_the_usual_room() -> None:
    """Nothing is beside the only element of a row that is not zero."""
    right = np.array([[5.0, 0.0, 0.0], [3.0, 0.0, 0.0]])
    assert np.isinf(room_of_others(np.full(2, 1e-3), right)).all()


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


@pytest.mark.usefixtures("computed")
def test_a_recorded_outlier_does_not_speak_for_what_was_not_recorded(engine: Faulty) -> None:
    """Nearly all of the row's energy is in a recorded element, and only recorded ones are 1.7 times the right ones: the rest is not."""

    def outlier(*inputs: np.ndarray, op: Callable[..., np.ndarray], factor: float, **params: object) -> np.ndarray:
        out = op(*inputs, **params).copy()
        out[:, 3] = 300 * np.sign(out[:, 3])
        out[:, :16] *= np.float32(factor)
        return out

    def engine_of(factor: float) -> list[Step]:
        return [
            replace(step, op=partial(outlier, op=step.op, factor=factor)) if step.makes == "blk.2.ffn_norm" else step
            for step in engine.right
        ]

    case = Case(
        engine.dump(RIGHT, PROMPT, points="*", size=16, bare=False, steps=engine_of(1.7)), Half(engine.transformer), STEPS
    )
    entry = next(entry for entry in case.entries if entry.point == "blk.2.ffn_norm")
    right = Replay(engine_of(1.0), PROMPT, range(len(PROMPT)), [0] * len(PROMPT), engine.transformer.weights, choose("numpy"))
    compared = beside(entry, np.ones(len(PROMPT)), right.on_host, np.arange(len(PROMPT)))
    assert compared is not None
    assert law(compared) == "every recorded element is 1.7 times the right one; the whole rows are not"


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
