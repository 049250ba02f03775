"""What a wrong number is: the right one in a lower type, where it is that."""

from collections.abc import Callable
from pathlib import Path

import pytest
from explaining import PROMPT, RIGHT
from planted import Faulty

from engine.faults.edits import ggml, number, with_values
from engine.faults.number_words import type_of_constant
from parity.explain.explain import ExplainOptions, explain
from reference.client import Reference


@pytest.mark.parametrize(
    ("value", "wanted", "said"),
    [
        (34.0, 1152**0.5, "BF16"),
        (33.9375, 1152**0.5, "F16"),
        (33.75, 1152**0.5, ""),
        (0.08838, 128**-0.5, "BF16"),  # as few digits as reproduce the records
        (12.0, 12.0, ""),
        (0.5, 0.0, ""),
        (1.0, float("inf"), ""),
    ],
)
def test_a_constant_that_is_kept_in_a_lower_type(value: float, wanted: float, said: str) -> None:
    """Only where the type changes the number, and gives just this one."""
    assert type_of_constant(value, wanted) == said


def test_the_scale_of_embeddings_in_bf16_is_said_to_be_that(reference: Reference, small_model: Callable[..., Path]) -> None:
    """An engine that keeps the root of the width in BF16 multiplies by another number, and the answer says which and why."""
    model = small_model("gemma2", width=96)
    engine = Faulty(model, reference.graph(model))
    scale = next(step for step in engine.right if ggml(step, "SCALE") and step.makes == "embd")
    wanted = number(scale, 0)
    rounded = with_values(scale, {0: 9.8125})
    assert wanted == pytest.approx(96**0.5)
    steps = [rounded if step is scale else step for step in engine.right]
    answer = explain(engine.dump(RIGHT, PROMPT, points="*", steps=steps), model, ExplainOptions(budget=10))
    assert "it is 9.79796 rounded to BF16" in answer.causes[0].named.sentence
