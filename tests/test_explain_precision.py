"""`parity explain` tells lower arithmetic from faults."""

from dataclasses import replace
from pathlib import Path

import pytest
from explaining import PROMPT, RIGHT, small_engine, unstated
from planted import Faulty, half_sums

from checkpoints.reading.reader import read
from engine import ops
from engine.faults import CATALOGUE, plant
from engine.graph import Step
from engine.replay.precision import rounded
from engine.synth import Shape, synthesize
from parity.explain.explain import ExplainOptions, explain
from reference.client import Reference
from reference.jobs import DumpJob


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Faulty:
    """A small qwen2 with groups of 7 query heads."""
    return small_engine(tmp_path_factory.mktemp("explain"))


def test_an_engine_that_sums_in_f16_is_not_accused(engine: Faulty) -> None:
    """Arithmetic that our own estimate of F16 does not copy is told from a fault all the same."""
    right: list[Step] = [replace(step, op=half_sums) if step.op is ops.linear else step for step in engine.right]
    dump = unstated(engine.dump(RIGHT, PROMPT, steps=right))
    explanation = explain(dump, engine.model)
    assert explanation.precision_only in ("f16", "tf32")
    assert explanation.causes == ()


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_llama_cpp_with_native_weights_is_not_accused(reference: Reference, tmp_path: Path, kind: str) -> None:
    """llama.cpp rounds activations to the weights' partner type: a right engine, and no fault of the catalogue."""
    plain, model, out = tmp_path / "f32.gguf", tmp_path / "native.gguf", tmp_path / "native.jsonl"
    synthesize(plain, Shape("qwen2", 3, 128, 4, 2, 0, 128, 320), weight_type="f32", seed=5)
    reference.quantize(plain, kind, model)
    reference.dump(DumpJob(model=model, out=out, tokens=PROMPT, mode="native"))
    explanation = explain(read(out), model)
    assert explanation
    assert explanation.precision_only
    assert explanation.causes == ()


def test_a_fault_of_an_f16_engine_is_found_above_its_noise(engine: Faulty) -> None:
    """With --compute the noise of that arithmetic is measured, and the fault stands out of it."""
    steps = rounded(plant(engine.right, CATALOGUE["no-qkv-bias"]), "f16", storage=False)
    dump = engine.dump(RIGHT, PROMPT, steps=steps)
    explanation = explain(dump, engine.model, ExplainOptions(compute="f16"))
    assert explanation.remaining is None
    classes = [{cause.named.fault, *(other.fault for other in cause.equivalent)} for cause in explanation.causes]
    assert classes
    assert "no-qkv-bias" in classes[0]
