"""What an operation would make of another operand, behind a fault that adds a value of its own."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from explaining import STEPS
from msgspec.structs import replace
from planted import Faulty, Planted, tokens_of

from engine.backend import Array
from engine.faults import CATALOGUE, as_recorded, plant
from engine.faults.edits import Then
from engine.replay.precision import rounded
from parity.explain.explain import explain
from reference.client import Reference


@pytest.mark.slow
@pytest.mark.usefixtures("computed")
def test_a_value_that_only_a_fault_makes_has_no_other_operand(small_model: Callable[..., Path], reference: Reference) -> None:
    """Branches one after the other, and an edit of what reads the norm between them: the right run has no such value to compare with."""
    model = small_model("cohere2", kind="f32")
    engine = Faulty(model, reference.graph(model))
    steps = [
        replace(step, op=Then(step.op, lambda x: x * np.abs(x))) if step.makes == "blk.0.ffn_up" else step
        for step in plant(list(engine.right), CATALOGUE["sequential-branches"], None)
    ]
    tokens = tokens_of(model, 6, 3)
    dump = engine.dump(Planted(()), tokens, points="*", size=10, bare=False, steps=as_recorded(steps))
    explanation = explain(dump, model, replace(STEPS, tokens=tokens))
    assert not explanation
    assert "sequential-branches" in [cause.named.fault for cause in explanation.causes]
    assert explanation.remaining is not None


def test_under_wide_limits_another_operand_must_leave_less_than_the_right_one(
    small_model: Callable[..., Path], reference: Reference
) -> None:
    """Every eighth element of the last norm is halved in 8-bit arithmetic: within its limits the norm of any similar row would pass."""
    model = small_model("phi3", kind="f32")
    engine = Faulty(model, reference.graph(model))

    def halved(x: Array) -> Array:
        x = x.copy()
        x[..., ::8] *= np.float32(0.5)
        return x

    steps = [
        replace(step, op=Then(step.op, halved)) if step.makes == "output_norm" else step
        for step in rounded(engine.right, "q8", storage=False)
    ]
    tokens = tokens_of(model, 7, 3)
    dump = engine.dump(Planted(()), tokens, points="*", size=10, bare=False, steps=as_recorded(steps))
    assert dump.header is not None
    dump = replace(dump, header=replace(dump.header, compute="q8"))
    explanation = explain(dump, model, replace(STEPS, tokens=tokens, compute="q8"))
    assert not explanation
    assert "instead of" not in explanation.law
