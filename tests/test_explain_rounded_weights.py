"""`parity explain` names weights that an engine rounds though the file has them in float32, and what is wrong besides."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from explaining import PROMPT, RIGHT, unstated
from msgspec.structs import replace
from planted import Faulty
from slow import slow_but

from checkpoints.answers.explain import Explanation
from engine.faults import CATALOGUE, plant
from engine.faults.edits import Then
from engine.graph import Step
from engine.replay.precision import is_normed, rounded
from engine.replay.rounded_weights import with_rounded_weights
from engine.synth.recipe import shape_of
from engine.synth.recipes import RECIPES
from parity.diff.compare import Options
from parity.explain.explain import ExplainOptions, explain
from parity.explain.on_model import compared_on
from parity.synth.synthetic import make_by_recipe
from reference.client import Reference

pytestmark = pytest.mark.usefixtures("step_clock")

WANTED: dict[str, Callable[[Step, str], bool]] = {
    "blk.*.attn_norm.weight, blk.*.ffn_norm.weight, output_norm.weight": lambda step, _: is_normed(step),
    "blk.*.attn_k.bias, blk.*.attn_q.bias, blk.*.attn_v.bias": lambda _, name: name.endswith(".bias"),
    "token_embd.weight": lambda _, name: name == "token_embd.weight",
    "all weights": lambda *_: True,
}
NORMS, *_OTHERS = WANTED


def _explained(engine: Faulty, steps: list[Step], points: str) -> Explanation:
    return explain(unstated(engine.dump(RIGHT, PROMPT, points=points, steps=steps)), engine.model, ExplainOptions(budget=10))


@pytest.mark.parametrize("points", slow_but(["default", "*"], "default"))
@pytest.mark.parametrize(("kind", "said"), [("bf16", "BF16"), ("f16", "F16")])
@pytest.mark.parametrize("what", WANTED)
def test_rounded_weights_are_a_cause_of_their_own(engine: Faulty, what: str, kind: str, said: str, points: str) -> None:
    """Every record is reproduced: it is neither an arithmetic of the whole engine nor a law of channels."""
    answer = _explained(engine, with_rounded_weights(engine.right, kind, WANTED[what]), points)
    assert [(cause.named.fault, cause.named.sentence) for cause in answer.causes] == [
        ("weights-rounded", f"{what} rounded to {said}")
    ]
    assert answer.remaining is None
    assert not answer.precision_only


@pytest.mark.slow
@pytest.mark.parametrize(("factor", "points"), [(1.0, "default"), (1.0, "*"), (1.001, "default")])
def test_a_table_that_two_steps_read_may_be_rounded_for_one_of_them(
    reference: Reference, stories: Path, tmp_path: Path, points: str, factor: float
) -> None:
    """Of one table for embeddings and logits only the rows that are looked up are rounded: that is the cause, and a product with the
    table that is 1.001 times too large is left over.
    """
    model, chosen = tmp_path / "model.gguf", RECIPES["smollm3"]
    make_by_recipe(model, chosen, shape_of(chosen), {}, kind="f32", seed=91100, tokenizer=stories, running=reference)
    engine = Faulty(model, reference.graph(model))
    rows = with_rounded_weights(engine.right, "bf16", lambda step, _: step.makes == "embd")
    steps = [
        replace(step, op=Then(step.op, lambda x: x * np.float32(factor))) if step.makes == "logits" else step for step in rows
    ]
    answer = _explained(engine, steps, points)
    assert answer.causes[0].named.fault == "weights-rounded"
    assert (answer.remaining is None and len(answer.causes) == 1) == (factor == 1.0)
    assert factor != 1.0 or answer.causes[0].named.sentence == "token_embd.weight (not for logits) rounded to BF16"


@pytest.mark.parametrize("points", slow_but(["default", "*"], "default"))
@pytest.mark.parametrize("kind", slow_but(["bf16", "f16"], "f16"))
def test_lower_arithmetic_is_not_put_down_to_the_weights_it_rounds(engine: Faulty, kind: str, points: str) -> None:
    """An engine that keeps every value in a lower type rounds its embeddings, too, and they are all of the first place."""
    answer = _explained(engine, rounded(engine.right, kind, storage=True), points)
    assert answer.causes == ()
    assert answer.precision_only


@pytest.mark.slow
@pytest.mark.parametrize("points", ["default", "*"])
@pytest.mark.parametrize("factor", [1.0003, 1.002, 30.0])
def test_a_factor_beside_rounded_norms_is_no_rounding(engine: Faulty, factor: float, points: str) -> None:
    """As small as the rounding, or far larger: the norms alone are not given as the reason for everything."""
    steps = [
        replace(step, op=Then(step.op, lambda x: x * np.float32(factor))) if step.makes == "blk.2.ffn_out" else step
        for step in with_rounded_weights(engine.right, "bf16", WANTED[NORMS])
    ]
    answer = _explained(engine, steps, points)
    assert not answer
    assert answer.remaining is not None or len(answer.causes) > 1


@pytest.mark.slow
@pytest.mark.parametrize("points", ["default", "*"])
def test_a_fault_beside_rounded_norms_is_named_too(engine: Faulty, points: str) -> None:
    """A residual that is missing in one layer of an engine whose norms are BF16: both are causes."""
    norms = with_rounded_weights(engine.right, "bf16", WANTED[NORMS])
    answer = _explained(engine, plant(norms, CATALOGUE["residual-missing"], (2,), at=("l_out",)), points)
    assert [cause.named.fault for cause in answer.causes] == ["weights-rounded", "residual-missing"]
    assert answer.causes[1].named.layers == (2,)


@pytest.mark.parametrize("factor", [1.0, 1.001])
def test_diff_blames_no_operation_for_weights_in_a_lower_type(engine: Faulty, factor: float) -> None:
    """Where nothing states the arithmetic and norms kept in BF16 give every record, diff leaves it open; with a factor beside
    them it does not say that they are all.
    """
    steps = [
        replace(step, op=Then(step.op, lambda x: x * np.float32(factor))) if step.makes == "blk.2.ffn_out" else step
        for step in with_rounded_weights(engine.right, "bf16", WANTED[NORMS])
    ]
    ours, right = (engine.dump(RIGHT, PROMPT, points="default", steps=of, bare=False) for of in (steps, engine.right))
    verdict = compared_on(unstated(ours), right, Options(), engine.model).verdict
    assert not verdict
    assert verdict.pattern is not None
    assert ("all that differs" in verdict.pattern.sentence) == (factor == 1.0), verdict.pattern
    assert factor != 1.0 or verdict.pattern.code == "undecided"
