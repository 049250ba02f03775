"""A point that llama.cpp views without reading it by itself, a half of a product say, is judged by what is made from the product."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from explaining import STEPS
from msgspec.structs import replace
from planted import Faulty, Planted, tokens_of

from engine.graph import Step
from parity.explain.explain import explain
from reference.client import Reference


def _larger(step: Step) -> Step:
    return replace(step, op=lambda *inputs, **params: step.op(*inputs, **params) * np.float32(1.05))


@pytest.mark.parametrize("used", [False, True])
def test_what_is_made_from_its_source_acquits_a_copy(
    reference: Reference, small_model: Callable[..., Path], used: bool
) -> None:
    """A gate that is 1.05 times too large in its record alone is no wrong operation; it is one if what is made from it differs as well."""
    model = small_model("phi3")
    engine = Faulty(model, reference.graph(model))
    wrong = ("blk.1.ffn_gate", *(("blk.1.ffn_swiglu",) if used else ()))
    steps = [_larger(step) if step.makes in wrong else step for step in engine.right]
    dump = engine.dump(Planted(()), tokens_of(model, 7, seed=3), points="*", steps=steps, bare=False)
    answer = explain(dump, model, STEPS)
    assert answer.first is not None
    assert answer.first.checkpoint == "blk.1.ffn_gate"
    alone = [(suspect.checkpoint, suspect.agreeing) for suspect in answer.suspects]
    assert alone == ([] if used else [("blk.1.ffn_gate", ("blk.1.ffn_swiglu",))])
