"""Which changes of a layer's output may be the error, by the derivatives of what was recorded after it."""

import numpy as np
import pytest
from explaining import only
from planted import Faulty

from engine.backend import Array
from engine.faults import CATALOGUE, plant
from parity.explain.budget import Budget
from parity.explain.explain import Case, ExplainOptions
from parity.explain.search.likely import Likely

NAME = "blk.2.l_out"
Place = tuple[Likely, Array, Array]


@pytest.fixture
def place(engine: Faulty) -> Place:
    """The search for a fault in layer 2, and that layer's output up to the first wrong row: the faulty engine's, and the right one's."""
    case = Case(only(engine, ("no-gate", {}, (2,))), engine.model, ExplainOptions())
    screening = case.screening(case.entries, Budget(60))
    state = screening.start()
    assert state.first is not None
    faulty, right = (
        case.make(steps, state.first.row + 1).values[NAME]
        for steps in (plant(case.transformer.steps, CATALOGUE["no-gate"], (2,)), case.transformer.steps)
    )
    return Likely(screening, state), faulty, right


def test_a_layer_that_no_point_stands_at_is_found_by_what_residuals_hand_on(place: Place) -> None:
    """The fault's own change is likely, one of another size and direction is not, and neither is one of a row that is right."""
    likely, faulty, right = place
    noise = right + np.random.default_rng(3).standard_normal(right.shape).astype(np.float32)
    assert likely.among(NAME, {0: faulty, 1: noise, 2: 2 * right - faulty}, len(right)) == {0}


def test_what_makes_nearly_all_of_the_error_is_tried_before_further_layers(place: Place) -> None:
    """The fault's own change does, and a tenth more of it; half of it, its opposite and rows before the first wrong one do not."""
    likely, faulty, right = place
    assert likely.among(NAME, {0: faulty}, len(right)) == {0}
    parts = {1.0: True, 1.1: True, 0.5: False, 0.0: False, -1.0: False}
    nearly = {part: likely.nearly_makes_the_error(NAME, {0: right + part * (faulty - right)}) for part in parts}
    assert nearly == parts
    assert not likely.nearly_makes_the_error(NAME, {0: faulty[:-1]})
