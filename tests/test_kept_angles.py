"""RoPE's cosines and sines that are kept in a lower type are said, for our own rotation and for ggml's, also where float32 is stated."""

from collections.abc import Callable
from pathlib import Path

import pytest
from explaining import PROMPT, RIGHT
from planted import Faulty

from engine.lift.node import GgmlOperation
from engine.replay.kept import kept
from parity.explain.explain import ExplainOptions, explain
from reference.client import Reference


@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize("architecture", ["qwen3", "phi3-longrope"])
def test_a_table_of_rope_in_a_lower_type_is_said(
    reference: Reference, small_model: Callable[..., Path], architecture: str, kind: str
) -> None:
    """Every rotation reads it; a rotation with factors, or of a part of a head, is ggml's own operation."""
    model = small_model(architecture)
    engine = Faulty(model, reference.graph(model))
    steps = kept(engine.right, f"{kind} angles")
    changed = [step for step, right in zip(steps, engine.right, strict=True) if step is not right]
    assert changed
    assert all(isinstance(step.op, GgmlOperation) for step in changed) is (architecture != "qwen3")
    dump = engine.dump(RIGHT, PROMPT, points="*", size=1 << 20, steps=steps)
    answer = explain(dump, model, ExplainOptions(budget=10))
    assert not answer
    assert answer.causes == ()
    assert f"RoPE's cosines and sines are kept in {kind.upper()}" in answer.law
