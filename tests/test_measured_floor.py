"""`parity diff --model`: what F16 and BF16 arithmetic cost is measured on this model and prompt."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from cli import Cli

from checkpoints.errors import InputError
from checkpoints.record import Dump
from engine.faults import CATALOGUE, plant
from engine.graph import Step
from engine.precision import rounded
from engine.synth import Shape, synthesize
from parity.compare import Options, compare
from parity.measured_floor import measured_limits
from parity.planted import Faulty, Planted

PROMPT = (1, 17, 40, 299, 5, 5, 80, 3)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Faulty:
    """A small qwen2."""
    path = tmp_path_factory.mktemp("floor") / "small.gguf"
    synthesize(path, Shape("qwen2", 4, 112, 14, 2, 0, 128, 300), weight_type="f32", seed=11)
    return Faulty(path)


def _dump(engine: Faulty, steps: Sequence[Step], compute: str) -> Dump:
    kept, engine.right = engine.right, list(steps)
    try:
        dump = engine.dump(Planted(()), PROMPT)
    finally:
        engine.right = kept
    assert dump.header is not None
    return replace(dump, header=replace(dump.header, compute=compute))


@pytest.mark.parametrize("kind", ["f16", "bf16", "tf32"])
def test_a_right_engine_keeps_the_measured_limits(engine: Faulty, kind: str) -> None:
    """Rounded products alone stay within what rounded products and activations cost."""
    right = _dump(engine, engine.right, "f32")
    ours = _dump(engine, rounded(engine.right, kind, storage=False), kind)
    verdict = compare(ours, right, Options(limits=measured_limits(ours, right, engine.model)))
    assert verdict
    assert verdict.limits.source.startswith("measured")
    assert not compare(_dump(engine, ours_as_f32(engine, kind), "f32"), right)


def ours_as_f32(engine: Faulty, kind: str) -> list[Step]:
    """The same engine, which now claims F32."""
    return rounded(engine.right, kind, storage=False)


def test_a_small_fault_stands_out_of_the_measured_floor_only(engine: Faulty) -> None:
    """Another ε in F16 arithmetic hides in the table's limit for any model, not in the one measured on this model."""
    right = _dump(engine, engine.right, "f32")
    steps = plant(engine.right, CATALOGUE["norm-epsilon"], eps=1e-3)
    ours = _dump(engine, rounded(steps, "f16", storage=False), "f16")
    by_table = compare(ours, right)
    measured = compare(ours, right, Options(limits=measured_limits(ours, right, engine.model)))
    assert by_table
    assert not measured


def test_unknown_arithmetic_is_one_line(parity: Cli, engine: Faulty) -> None:
    """Nothing can be measured for an engine that does not say what it computes in."""
    right = _dump(engine, engine.right, "f32")
    with pytest.raises(InputError, match="does not say what it computes in"):
        measured_limits(replace(right, header=None), right, engine.model)
    assert measured_limits(right, right, engine.model) is None
    assert "--model" in parity("diff", "--help").out
