"""A lower arithmetic may choose other experts: that excuses what they bring, and no fault behind them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from explaining import unstated
from msgspec.structs import replace
from planted import PATIENT, Faulty, Planted, tokens_of

from engine.graph import Step
from engine.replay.precision import rounded
from engine.synth.recipe import shape_of
from engine.synth.recipes import RECIPES
from parity.explain.case import Case, Half, open_model
from parity.explain.explain import explain
from parity.explain.rounding.flipped import led_to, without_flipped
from parity.explain.rounding.precision import fits, floor
from parity.synth.synthetic import make_by_recipe
from reference.client import Reference

pytestmark = pytest.mark.slow


def test_a_fault_behind_recorded_choices_of_experts_is_no_other_choice(
    reference: Reference, stories: Path, tmp_path: Path
) -> None:
    """8 bits may choose other experts at these scores, but the dump's are ours: products of experts that are doubled are not excused."""
    model = tmp_path / "m.gguf"
    shape = replace(shape_of(RECIPES["olmoe"]), layers=4)
    make_by_recipe(model, RECIPES["olmoe"], shape, {}, tokenizer=stories)
    engine, tokens = Faulty(model, reference.graph(model)), tokens_of(model, 6, seed=3)

    def fitting(steps: Sequence[Step]) -> float | None:
        dump = unstated(engine.dump(Planted(()), tokens, points="*", bare=False, steps=rounded(steps, "q8", storage=False)))
        case = Case(dump, Half(open_model(model, PATIENT)), PATIENT)
        measured = floor("q8", case.entries, case.transformer.steps, case.replay, case.make, case.positions)
        return fits(measured, without_flipped(case, measured))

    def doubled(step: Step) -> Step:
        return replace(step, op=lambda *inputs, **params: 2 * step.op(*inputs, **params))

    assert fitting(engine.right) is not None
    assert fitting([doubled(step) if step.makes == "blk.3.ffn_moe_down" else step for step in engine.right]) is None


def test_what_is_farther_off_than_other_experts_bring_it_is_a_fault(
    reference: Reference, stories: Path, tmp_path: Path
) -> None:
    """8 bits may choose other experts before the last layer's outputs: an engine that makes these 30 times too large is not excused."""
    model = tmp_path / "m.gguf"
    shape = replace(shape_of(RECIPES["olmoe"]), layers=3)
    make_by_recipe(model, RECIPES["olmoe"], shape, {}, tokenizer=stories)
    engine, tokens = Faulty(model, reference.graph(model)), tokens_of(model, 6, seed=3)

    def fitting(steps: Sequence[Step]) -> tuple[float | None, Any]:
        dump = unstated(engine.dump(Planted(()), tokens, bare=False, steps=rounded(steps, "q8", storage=False)))
        case = Case(dump, Half(open_model(model, PATIENT)), PATIENT)
        measured = floor("q8", case.entries, case.transformer.steps, case.replay, case.make, case.positions)
        led = {entry.point: rows for entry, rows in zip(case.entries, led_to(case, measured), strict=True)}
        return fits(measured, without_flipped(case, measured)), led["blk.2.l_out"]

    right, led = fitting(engine.right)
    assert right is not None
    assert led.any()

    def larger(step: Step) -> Step:
        def op(*inputs: Any, **params: Any) -> Any:
            value = step.op(*inputs, **params)
            return np.where(led[:, None], value * np.float32(30), value)

        return replace(step, op=op)

    assert fitting([larger(step) if step.makes == "blk.2.l_out" else step for step in engine.right])[0] is None


def test_a_fault_behind_choices_that_were_not_recorded_is_not_acquitted(
    reference: Reference, stories: Path, tmp_path: Path
) -> None:
    """Outputs of layers alone: 8 bits may have chosen other experts, or the last layer's are doubled. The engine is not called right."""
    model = tmp_path / "m.gguf"
    shape = replace(shape_of(RECIPES["qwen3moe"]), layers=3)
    make_by_recipe(model, RECIPES["qwen3moe"], shape, {"expert_count": 8, "expert_used_count": 2}, tokenizer=stories)
    engine, tokens = Faulty(model, reference.graph(model)), tokens_of(model, 6, seed=3)

    def doubled(step: Step) -> Step:
        return replace(step, op=lambda *inputs, **params: 2 * step.op(*inputs, **params))

    steps = [doubled(step) if step.makes == "blk.2.ffn_moe_down" else step for step in engine.right]
    dump = unstated(engine.dump(Planted(()), tokens, size=16, bare=False, steps=rounded(steps, "q8", storage=False)))
    answer = explain(dump, model, PATIENT)
    assert not answer
    assert (answer.causes, answer.precision_only, answer.looks_like) == ((), "", "q8")
    assert any(note.startswith("experts:") for note in answer.notes)
