"""What `parity explain` finds beyond an arithmetic that nothing states."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from explaining import unstated
from msgspec.structs import replace
from planted import PATIENT, Faulty, Planted, half_sums, tokens_of

from checkpoints.answers.explain import Explanation
from checkpoints.points import parse
from engine import ops
from engine.graph import Step
from engine.replay.precision import ROUNDINGS, rounded
from engine.replay.rounded_weights import with_rounded_weights
from engine.synth.recipe import shape_of
from engine.synth.recipes import RECIPES
from parity.explain.explain import explain
from parity.synth.synthetic import make_by_recipe
from reference.client import Reference


@pytest.mark.slow
def test_a_cause_beyond_an_arithmetic_leaves_what_is_allowed_where_it_is_stated(
    reference: Reference, stories: Path, tmp_path: Path
) -> None:
    """An engine with 8-bit activations that states nothing, with a shifted cache: scores are further off than others, and no further than
    stated 8 bits may be, so that the cache is named and not the first rounding.
    """
    model, chosen = tmp_path / "model.gguf", RECIPES["gpt2"]
    make_by_recipe(model, chosen, shape_of(chosen), {}, kind="f16", seed=9601, tokenizer=stories, running=reference)
    engine, tokens = Faulty(model, reference.graph(model)), tokens_of(model, 7, seed=9601)
    steps = Planted((("cache-shifted", {"by": 1, "at": ("k_read", "v_read")}, None),)).steps(engine.right)
    dump = engine.dump(Planted(()), tokens, points="*", size=1 << 20, steps=rounded(steps, "q8", storage=True), bare=False)
    explanation = explain(unstated(dump), model, PATIENT)
    assert [cause.named.fault for cause in explanation.causes] == ["cache-shifted"]
    assert explanation.remaining is None


@pytest.fixture(scope="module")
def engine(reference: Reference, small_model: Callable[..., Path]) -> Faulty:
    """A small qwen3."""
    path = small_model("qwen3")
    return Faulty(path, reference.graph(path))


def answer_to(engine: Faulty, steps: Sequence[Step]) -> Explanation:
    """What is said of an engine that runs these steps and does not state its arithmetic."""
    dump = engine.dump(Planted(()), tokens_of(engine.model, 6, 1), points="*", size=16, bare=False, steps=steps)
    return explain(unstated(dump), engine.model, PATIENT)


def sums_in_f16(steps: Sequence[Step]) -> list[Step]:
    """The steps of an engine that sums products in F16, as no rounding of ours does."""
    return [replace(step, op=half_sums) if step.op is ops.linear else step for step in steps]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lower", "named"),
    [
        (partial(rounded, kind="f16", storage=False), "F16 or TF32"),
        (partial(rounded, kind="bf16", storage=True), "BF16"),
        (sums_in_f16, "F16"),
    ],
)
def test_a_fault_in_an_engine_of_a_lower_arithmetic_that_states_nothing(
    engine: Faulty, lower: Callable[[Sequence[Step]], list[Step]], named: str
) -> None:
    """The arithmetic is said once, and the fault in a later layer is found behind it: a known one by its name, another by its place."""
    answer = answer_to(engine, lower(Planted((("rope-pairs", {}, (1,)),)).steps(engine.right)))
    assert [(cause.named.fault, cause.named.layers) for cause in answer.causes] == [("rope-pairs", (1,))]
    assert answer.judged_as.startswith(f"{named} arithmetic, which nothing states: ")
    assert answer.remaining is None
    assert not any("arithmetic" in note for note in answer.notes)

    def exchanged(*inputs: np.ndarray, op: Callable[..., np.ndarray], **params: object) -> np.ndarray:
        return np.sin(op(*inputs, **params)[:, ::-1])

    steps = [
        replace(step, op=partial(exchanged, op=step.op)) if step.makes == "blk.1.ffn_out" else step for step in engine.right
    ]
    changed = {step.makes: step for step in steps if step.makes == "blk.1.ffn_out"}
    answer = answer_to(engine, [changed.get(step.makes, step) for step in lower(engine.right)])
    assert not answer.causes
    assert answer.judged_as.startswith(f"{named} arithmetic, which nothing states: ")
    assert answer.placed is not None
    assert answer.placed.operations == ("blk.1.ffn_out",)


@pytest.mark.slow
def test_a_right_engine_in_two_arithmetics_is_not_blamed_behind_the_first(engine: Faulty) -> None:
    """The first layer in F16, the others in BF16, which costs more than F16 does: no cause, and no operation is placed."""
    f16, bf16 = (rounded(engine.right, kind, storage=False) for kind in ("f16", "bf16"))
    steps = [b if (parse(a.makes).layer or 0) >= 1 else a for a, b in zip(f16, bf16, strict=True)]
    answer = answer_to(engine, steps)
    assert not answer.causes
    assert answer.placed is None
    assert answer.rounds


@pytest.mark.slow
def test_a_table_in_bf16_alone_is_no_arithmetic(engine: Faulty) -> None:
    """The embeddings in BF16, all else in float32 but for a fault: float32's limits hold behind the table, and no arithmetic is assumed."""
    steps = with_rounded_weights(engine.right, "bf16", lambda _step, name: name == "token_embd.weight")
    answer = answer_to(engine, Planted((("rope-pairs", {}, (1,)),)).steps(steps))
    assert [cause.named.fault for cause in answer.causes] == ["weights-rounded", "rope-pairs"]
    assert not answer.judged_as


def cut_off_to_bf16(x: np.ndarray) -> np.ndarray:
    """Values whose digits beyond BF16's are cut off, not rounded."""
    return (np.ascontiguousarray(x).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def cutting(*inputs: np.ndarray, op: Callable[..., np.ndarray], **params: object) -> np.ndarray:
    with patch.dict(ROUNDINGS, {"bf16": cut_off_to_bf16}):
        return op(*inputs, **params)


@pytest.mark.slow
def test_a_right_engine_that_cuts_digits_off_is_not_blamed(reference: Reference, stories: Path, tmp_path: Path) -> None:
    """Cut off, digits cost more than rounded and make rows smaller: no factor is said of them beyond BF16, and no operation is placed."""
    model, chosen = tmp_path / "model.gguf", RECIPES["lfm2moe"]
    make_by_recipe(model, chosen, shape_of(chosen), {}, kind="f16", seed=1, tokenizer=stories, running=reference)
    engine = Faulty(model, reference.graph(model))
    steps = [replace(step, op=partial(cutting, op=step.op)) for step in rounded(engine.right, "bf16", storage=True)]
    answer = answer_to(engine, steps)
    assert not answer.causes
    assert answer.placed is None
    assert answer.rounds
