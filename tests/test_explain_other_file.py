"""`parity explain` says soon that a dump is of another model's file."""

from pathlib import Path

import numpy as np
import pytest
from explaining import PROMPT, RIGHT, SHAPE, small_engine
from msgspec.structs import replace
from planted import PATIENT, Faulty

from engine.replay.precision import rounded
from engine.synth import synthesize
from parity.explain.explain import explain

_SAID = "another model's file"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Faulty:
    """A small qwen2."""
    return small_engine(tmp_path_factory.mktemp("other-file"))


def test_another_models_file_is_said_and_nothing_else_is_tried(engine: Faulty, tmp_path: Path) -> None:
    """A right engine that read other weights of the same shape has rows that no row of this file is, and no pairs of faults are tried."""
    path = tmp_path / "other.gguf"
    synthesize(path, SHAPE, weight_type="f32", seed=12)
    answer = explain(Faulty(path).dump(RIGHT, PROMPT), engine.model, replace(PATIENT, tokens=PROMPT))
    assert answer.causes == ()
    assert answer.first is not None
    assert answer.first.checkpoint == "embd"
    assert _SAID in answer.law
    assert answer.variants < 1000


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8"])
def test_another_prompt_is_not_another_file(engine: Faulty, kind: str) -> None:
    """Rows of other tokens, each in an arithmetic of its own and times a number, are rows of this file."""
    steps = [
        replace(step, op=lambda *inputs, own=step.op, **params: own(*inputs, **params) * np.float32(3))
        if step.makes == "embd"
        else step
        for step in engine.right
    ]
    dump = engine.dump(
        RIGHT, tuple((token + 1) % 300 for token in PROMPT[:-2]), points="embd", steps=rounded(steps, kind, storage=True)
    )
    answer = explain(dump, engine.model, replace(PATIENT, tokens=PROMPT[:-2]))
    assert answer.first is not None
    assert _SAID not in answer.law
