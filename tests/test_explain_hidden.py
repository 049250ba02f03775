"""`parity explain` finds a fault in all layers that the noise of a stated arithmetic hides, by the direction of its effect."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from explaining import PROMPT, RIGHT, small_engine
from msgspec.structs import replace
from planted import Faulty, tokens_of

from checkpoints.answers.explain import Explanation
from engine.backend import Array
from engine.faults import CATALOGUE, plant
from engine.graph import Step
from engine.replay.precision import ROUNDINGS, rounded
from parity.explain.explain import ExplainOptions, explain
from parity.explain.rounding import hidden
from reference.client import Reference
from reports.explanation import as_json, lines


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Faulty:
    """A small qwen2."""
    return small_engine(tmp_path_factory.mktemp("hidden"))


def _bf16_cut_off(x: Array) -> Array:
    return (np.ascontiguousarray(x).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def _q8_by_rows(x: Array) -> Array:
    scale = np.maximum(np.abs(x).max(axis=-1, keepdims=True), np.float32(1e-30)) / np.float32(127)
    return (np.rint(x / scale) * scale).astype(np.float32)


# Engines that round in another way than ours: digits are cut off, a row has one scale.
_ROUNDINGS = {"bf16": _bf16_cut_off, "q8": _q8_by_rows}
_FAULT: dict[str, Any] = {"part": 1, "axis": "rows", "at": ("ffn_gate",)}


def _explained(engine: Faulty, kind: str, steps: Sequence[Step], tokens: tuple[int, ...] = PROMPT) -> Explanation:
    def op(own: Callable[..., Array]) -> Callable[..., Array]:
        def rounding(*inputs: Any, **params: Any) -> Array:
            with patch.dict(ROUNDINGS, {kind: _ROUNDINGS[kind]}):
                return own(*inputs, **params)

        return rounding

    lower = [replace(step, op=op(step.op)) for step in rounded(steps, kind, storage=False)]
    dump = engine.dump(RIGHT, tokens, steps=lower, bare=False)
    return explain(dump, engine.model, ExplainOptions(budget=600.0, compute=kind))


@pytest.mark.slow
def test_a_fault_below_the_noise_is_named_by_its_direction(engine: Faulty) -> None:
    """Every record passes as the arithmetic's noise, and the cause says that it was found inside it, and how surely."""
    answer = _explained(engine, "q8", plant(engine.right, CATALOGUE["part-missing"], None, **_FAULT))
    assert not answer
    assert [(cause.named.fault, cause.named.parameters) for cause in answer.causes] == [("part-missing", _FAULT)]
    assert answer.causes[0].hidden.startswith("hidden in the noise of ")
    assert answer.remaining is None
    assert as_json(answer)["causes"][0]["hidden"] == answer.causes[0].hidden
    assert any("your error contains its effect" in line.plain for line in lines(answer, 300))


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(_ROUNDINGS))
def test_an_engine_without_a_fault_has_none_in_its_noise(engine: Faulty, kind: str) -> None:
    """The same arithmetic without a fault has no entry's direction."""
    answer = _explained(engine, kind, engine.right)
    assert answer
    assert answer.causes == ()
    assert answer.precision_only == kind


@pytest.mark.parametrize(
    "points", ["blk.0.k,blk.0.kq_soft_max", "blk.1.kq,blk.1.v_read,logits", "blk.0.k_read,blk.3.l_out", "blk.2.kq"]
)
@pytest.mark.parametrize("kind", ["bf16", "q8"])
def test_scores_and_caches_have_no_direction_and_stop_no_answer(engine: Faulty, points: str, kind: str) -> None:
    """A right engine that recorded attention's scores or what it reads from its cache first, or nothing else, has no cause."""
    dump = engine.dump(RIGHT, PROMPT, steps=rounded(engine.right, kind, storage=False), points=points, bare=False)
    answer = explain(dump, engine.model, ExplainOptions(budget=600.0, compute=kind))
    assert answer
    assert answer.causes == ()


def test_an_error_of_no_entry_is_not_given_a_name(engine: Faulty) -> None:
    """What nothing in the catalogue does, and noise hides, stays what it looks like: no direction is near enough."""
    scaled = [
        replace(step, op=lambda *inputs, own=step.op, **params: own(*inputs, **params) * np.float32(1.02))
        if step.makes.endswith(".v")
        else step
        for step in engine.right
    ]
    assert _explained(engine, "q8", scaled).causes == ()


@pytest.mark.slow
def test_a_search_that_the_time_ended_says_so(engine: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer of noise whose hidden faults were not all tried says it in a note, and one with time for all does not."""
    quick = rounded(engine.right, "bf16", storage=False)
    dump = engine.dump(RIGHT, PROMPT, steps=quick, points="embd,blk.0.l_out", bare=False)
    options = ExplainOptions(budget=600.0, compute="bf16")
    assert not any("not finished" in note for note in explain(dump, engine.model, options).notes)
    monkeypatch.setattr(hidden, "_OF_BUDGET", 0.0)
    answer = explain(dump, engine.model, options)
    assert answer
    assert any("not finished" in note for note in answer.notes)


@pytest.mark.slow
def test_values_that_are_not_finite_take_no_part(reference: Reference, small_model: Callable[[str], Path]) -> None:
    """A right F16 engine of a model that masks some logits gets its answer without a warning (any is an error in these tests)."""
    model = small_model("chameleon")
    masking = Faulty(model, reference.graph(model))
    tokens = tokens_of(model, 6, seed=5)
    dump = masking.dump(RIGHT, tokens, steps=rounded(masking.right, "f16", storage=False), bare=False)
    answer = explain(dump, model, ExplainOptions(tokens=tokens, budget=600.0, compute="f16"))
    assert answer
    assert answer.causes == ()


@pytest.mark.slow
def test_digits_cut_off_are_no_variance_of_other_size(reference: Reference, small_model: Callable[[str], Path]) -> None:
    """A right engine of a model with LayerNorms whose digits are cut off has a factor near one in them, and no cause."""
    model = small_model("gpt2")
    cutting = Faulty(model, reference.graph(model))
    answer = _explained(cutting, "bf16", cutting.right, tokens_of(model, 9, seed=3))
    assert answer
    assert answer.causes == ()
