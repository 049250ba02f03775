"""`parity explain` says soon that a dump is of another model's file, or that another token's row was looked up."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from explaining import PROMPT, RIGHT, SHAPE, small_engine
from msgspec.structs import replace
from planted import PATIENT, Faulty

from engine.backend import Array
from engine.replay.precision import rounded
from engine.synth import synthesize
from parity.explain.explain import explain
from reference.client import Reference

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


@pytest.mark.parametrize("at", [(5,), (2, 3, 6)])
def test_the_row_of_another_token_is_said(engine: Faulty, at: tuple[int, ...]) -> None:
    """Where single positions were looked up by other ids, the answer says which, and calls exact rows of the table no lower arithmetic."""
    ids = [(token + 7) % 300 if position in at else token for position, token in enumerate(PROMPT)]
    steps = [
        replace(step, op=lambda _tokens, rows, own=step.op, **params: own(np.array(ids), rows, **params))
        if step.makes == "embd"
        else step
        for step in engine.right
    ]
    answer = explain(engine.dump(RIGHT, PROMPT, steps=steps), engine.model, replace(PATIENT, tokens=PROMPT))
    assert answer.causes == ()
    said = [f"position {position} has the row of token {ids[position]} instead of {PROMPT[position]}" for position in at]
    assert answer.law.startswith(f"{', '.join(said)}: ")
    assert not answer.leads


def test_a_row_of_the_token_itself_that_is_wrong_is_no_other_tokens(engine: Faulty) -> None:
    """One position's embedding that is 1.01 times the right one is not said to be another token's."""

    def grown(own: Callable[..., Array], *inputs: Any, **params: Any) -> Array:
        value = own(*inputs, **params).copy()
        value[3] *= np.float32(1.01)
        return value

    steps = [replace(step, op=partial(grown, step.op)) if step.makes == "embd" else step for step in engine.right]
    answer = explain(engine.dump(RIGHT, PROMPT, steps=steps), engine.model, replace(PATIENT, tokens=PROMPT))
    assert "row of token" not in answer.law
    assert answer.law


def test_rows_of_a_table_of_f16_are_no_sign_of_f16_arithmetic(small_model: Callable[..., Path], reference: Reference) -> None:
    """Embeddings of a file of F16 are exact in F16 in any engine: what differs there is not laid to lower arithmetic."""
    path = small_model("seed_oss", kind="f16")
    engine = Faulty(path, reference.graph(path))
    tokens = (1, 17, 40, 299, 5, 80, 3)
    steps = [
        replace(
            step, op=lambda _tokens, rows, own=step.op, **params: own(np.array(tokens), rows, **params)[::-1] * np.float32(-1)
        )
        if step.makes == "embd"
        else step
        for step in engine.right
    ]
    answer = explain(engine.dump(RIGHT, tokens, steps=steps), engine.model, replace(PATIENT, tokens=tokens))
    assert answer.first is not None
    assert answer.first.checkpoint == "embd"
    assert not any("mantissa" in lead.sentence for lead in answer.leads)
