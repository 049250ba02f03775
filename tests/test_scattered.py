"""Rounding spares nothing: where a part of a row's elements is exactly right, lower arithmetic is no explanation."""

import numpy as np
import pytest
from explaining import PROMPT, RIGHT, small_engine, unstated
from msgspec.structs import replace

from engine.backend import Array
from engine.faults.edits import Then
from engine.replay.precision import rounded
from parity.explain.case import Case
from parity.explain.explain import ExplainOptions
from parity.explain.rounding.precision import floor
from parity.explain.rounding.scattered import scattered


def test_a_part_that_is_exactly_right_is_no_rounding(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A quarter of a norm 1.0003 times too large has errors of F16's size: three quarters are right, which a right F16 engine's are not."""
    engine = small_engine(tmp_path_factory.mktemp("scattered"))

    def off(x: Array) -> Array:
        changed = x.copy()
        changed[:, : x.shape[1] // 4] *= np.float32(1.0003)
        return changed

    wrong = [replace(step, op=Then(step.op, off)) if step.makes == "blk.0.attn_norm" else step for step in engine.right]
    for steps, rounds in ((wrong, False), (rounded(engine.right, "f16", storage=True), True)):
        case = Case(unstated(engine.dump(RIGHT, PROMPT, points="all", size=4096, steps=steps)), engine.model, ExplainOptions())
        cost = floor("f16", case.entries, case.transformer.steps, case.replay, case.make, case.positions)
        assert scattered(case, replace(cost, alike=0.0)) is rounds
        assert any("exactly right" in note for note in case.notes) is not rounds
