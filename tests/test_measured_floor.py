"""`parity diff --model`: what F16 and BF16 arithmetic cost is measured on this model and prompt."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from cli import Cli
from planted import Faulty, Planted

from checkpoints.errors import InputError
from checkpoints.record import Dump
from engine.faults import CATALOGUE, plant
from engine.graph import Step
from engine.replay.precision import rounded
from engine.synth import Shape, synthesize
from parity.diff.compare import Options, compare
from parity.explain.measured_floor import measured_limits

PROMPT = (1, 17, 40, 299, 5, 5, 80, 3)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Faulty:
    """A qwen2 that is deep enough for noise to grow."""
    path = tmp_path_factory.mktemp("floor") / "small.gguf"
    synthesize(path, Shape("qwen2", 24, 112, 14, 2, 0, 128, 300), weight_type="f32", seed=11)
    return Faulty(path)


def _dump(engine: Faulty, steps: Sequence[Step], compute: str) -> Dump:
    dump = engine.dump(Planted(()), PROMPT, steps=steps)
    assert dump.header is not None
    return replace(dump, header=replace(dump.header, compute=compute))


@pytest.mark.parametrize("kind", ["f16", "bf16", "tf32"])
def test_a_right_engine_keeps_the_measured_limits(engine: Faulty, kind: str) -> None:
    """Rounded products alone stay within what rounded products and activations cost, and would not pass as float32."""
    right = _dump(engine, engine.right, "f32")
    ours = _dump(engine, rounded(engine.right, kind, storage=False), kind)
    verdict = compare(ours, right, Options(limits=measured_limits(ours, right, engine.model)))
    assert verdict
    assert verdict.limits.source.startswith("measured")
    assert ours.header is not None
    assert not compare(replace(ours, header=replace(ours.header, compute="f32")), right)


def test_a_deep_right_engine_is_accused_by_the_table_only(engine: Faulty) -> None:
    """Activations kept in BF16 cost more over 24 layers than a limit for every model allows; measured, they are right."""
    right = _dump(engine, engine.right, "f32")
    ours = _dump(engine, rounded(engine.right, "bf16", storage=True), "bf16")
    assert not compare(ours, right)
    assert compare(ours, right, Options(limits=measured_limits(ours, right, engine.model)))


def test_a_fault_stands_out_of_the_measured_floor(engine: Faulty) -> None:
    """Limits that are measured are no free pass: another activation diverges in F16 and in BF16."""
    right = _dump(engine, engine.right, "f32")
    for kind in ("f16", "bf16"):
        steps = plant(engine.right, CATALOGUE["activation"], activation="GELU (exact)")
        ours = _dump(engine, rounded(steps, kind, storage=True), kind)
        verdict = compare(ours, right, Options(limits=measured_limits(ours, right, engine.model)))
        assert verdict.first_divergence is not None
        assert verdict.first_divergence.checkpoint == "blk.0.l_out"


def test_unknown_arithmetic_is_one_line(parity: Cli, engine: Faulty) -> None:
    """Nothing can be measured for an engine that does not say what it computes in, and nothing need be for float32."""
    right = _dump(engine, engine.right, "f32")
    with pytest.raises(InputError, match="does not say what it computes in"):
        measured_limits(replace(right, header=None), right, engine.model)
    assert measured_limits(right, right, engine.model) is None
    assert "--model" in parity("diff", "--help").out
