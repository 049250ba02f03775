"""A rotation by other positions is named by those positions, whatever they are, where its result was recorded."""

from collections.abc import Callable

import numpy as np
import pytest
from explaining import PROMPT, RIGHT, edited
from planted import Faulty

from engine.backend import Array
from engine.faults.rotation import at_positions
from parity.explain.explain import ExplainOptions, explain


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: p % 3, "the rotation counts positions from 0 again after every 3 positions"),
        (lambda p: np.where(p == 3, 6, p), "positions are rotated as others: 3 as 6"),
        (lambda p: np.where((p == 3) | (p == 5), p - 1, p), "at 2 positions, 3 the first, the rotation counts 1 less"),
    ],
)
def test_the_positions_of_a_rotation_are_said(engine: Faulty, change: Callable[[Array], Array], said: str) -> None:
    """A ring, single positions."""
    steps = [at_positions(step, change) if step.makes == "blk.1.q_rope" else step for step in engine.right]
    answer = explain(engine.dump(RIGHT, PROMPT, points="*", steps=steps), engine.model, ExplainOptions(budget=10))
    assert answer.causes == ()
    assert answer.law.startswith(said)


@pytest.mark.parametrize(("first", "by"), [(4, 5), (5, -5)])
def test_an_offset_from_a_position_on_is_a_cause(engine: Faulty, first: int, by: int) -> None:
    """A decode loop that counts on from elsewhere, and one that begins at 0 again."""
    steps = [
        at_positions(step, lambda p: np.where(p >= first, p + by, p)) if step.makes == "blk.1.q_rope" else step
        for step in engine.right
    ]
    (cause,) = explain(engine.dump(RIGHT, PROMPT, points="*", steps=steps), engine.model, ExplainOptions(budget=10)).causes
    assert cause.named.fault == "rope-position-from"
    assert cause.named.parameters == {"by": by, "first": first, "at": ("q_rope",)}
    assert cause.named.layers == (1,)


def test_a_rotation_that_is_wrong_otherwise_has_no_such_law(engine: Faulty) -> None:
    """One element is scaled: no position gives that."""

    def scaled(x: Array) -> Array:
        changed = x.copy()
        changed[3:, 5] *= np.float32(1.01)
        return changed

    answer = explain(edited(engine, "blk.1.q_rope", scaled), engine.model, ExplainOptions(budget=10))
    assert "rotat" not in answer.law
    assert answer.law.startswith("element 5 alone")
