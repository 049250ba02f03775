"""Buffers that swap each layer, in a wrong engine: what was captured of the early layers is set aside, and the fault is named."""

import numpy as np
import pytest
from explaining import PROMPT, RIGHT, names
from msgspec.structs import replace
from planted import TOKENS, Faulty, Planted

from parity.explain.explain import ExplainOptions, explain
from parity.models.embedded import path as embedded


@pytest.mark.slow
def test_a_fault_behind_points_of_one_buffer_is_named(engine: Faulty) -> None:
    """embd and layer 0 show the last layer's output, and the scale of attention is wrong, too: that is named, and the two points are said
    to be no values of their own; the same capture of a right engine is one cause."""
    wrong = Planted((("attn-scale", {"scale": 0.2}, None),))
    points = "embd,blk.0.l_out,blk.{last}.l_out,output_norm,logits"
    last = max(int(step.makes.split(".")[1]) for step in engine.right if step.makes.startswith("blk."))
    for planted, found in ((wrong, "attn-scale"), (RIGHT, "capture-overwritten")):
        dump = engine.dump(planted, PROMPT, points=points.format(last=last), bare=False)
        shown = dump.points[f"blk.{last}.l_out"]
        swapped = {name: replace(shown, point=name) for name in ("embd", "blk.0.l_out")}
        explanation = explain(replace(dump, points={**dump.points, **swapped}), engine.model, ExplainOptions(budget=120.0))
        assert names(explanation) == [found]
        noted = any(
            f"embd and blk.0.l_out show blk.{last}.l_out, which is computed later" in note for note in explanation.notes
        )
        assert noted == (planted is wrong)


@pytest.mark.slow
def test_layers_that_do_nothing_are_not_called_one_buffer() -> None:
    """Of 24 layers only the first is computed, so that each later point is its output: the first of them is wrong, not the last one."""
    engine = Faulty(embedded())
    idle = {f"blk.{layer}.l_out": f"blk.{layer - 1}.l_out" for layer in range(1, 24)}
    steps = [
        replace(step, op=np.copy, reads=(idle[step.makes],), weights=(), params={}) if step.makes in idle else step
        for step in engine.right
    ]
    explanation = explain(engine.dump(RIGHT, TOKENS, steps=steps), engine.model, ExplainOptions(budget=40.0))
    assert explanation.first is not None
    assert explanation.first.checkpoint == "blk.5.l_out"
    assert not any("one buffer" in note for note in explanation.notes)
