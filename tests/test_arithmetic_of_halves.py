"""An encoder–decoder that does not state its arithmetic: what its own halves' replay shows about the errors of the first place."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from changed_files import File
from explaining import unstated
from msgspec.structs import replace
from planted import PATIENT, Faulty, Planted, tokens_of

from checkpoints.answers.diff import Verdict
from checkpoints.answers.explain import Explanation
from checkpoints.formats import load
from checkpoints.record import Dump
from engine.graph import Step
from engine.halves import as_encoder, encoder_alone
from engine.opened import open_plain
from engine.replay.precision import rounded
from engine.weights.gguf_model import GgufModel
from parity.diff.compare import Options
from parity.diff.verdict.first import BLAMED
from parity.explain.explain import explain
from parity.explain.on_model import compared_on
from parity.run.ours import OursJob
from parity.run.ours import dump as write_dump
from reference.client import Reference
from reference.jobs import DumpJob

IDS = (5, 9, 12, 40, 33, 7, 21)
EPSILON = "attention.layer_norm_rms_epsilon"


@pytest.fixture(scope="module")
def t5(small_model: Callable[..., Path]) -> Path:
    return small_model("t5", "f32", layers=2)


def played(model: Path, out: Path, reference: Reference) -> Dump:
    """What llama.cpp dumps of a model at the default points."""
    reference.dump(DumpJob(model=model, out=out, tokens=IDS))
    return load(out)


@pytest.mark.slow
def test_a_wrong_epsilon_is_no_rounding(t5: Path, tmp_path: Path, reference: Reference) -> None:
    """Errors as small as F16's that follow the epsilon of all norms: a divergence in float32, not parity in F16."""
    file = File(t5)
    file.set(EPSILON, 10 * file.number(EPSILON))
    ref = played(t5, tmp_path / "ref.jsonl", reference)
    ours = replace(played(file.write(tmp_path / "changed.gguf"), tmp_path / "ours.jsonl", reference), header=None)
    verdict = compared_on(ours, ref, Options(), t5).verdict
    assert not verdict
    assert verdict.pattern is not None
    assert verdict.pattern.code == "one-number"
    assert "eps were multiplied by 10" in verdict.pattern.sentence


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["f16", "bf16", "tf32"])
@pytest.mark.parametrize("storage", [False, True])
def test_a_right_engine_in_lower_arithmetic_is_not_accused(
    t5: Path, tmp_path: Path, reference: Reference, kind: str, storage: bool
) -> None:
    """Rounded products, and rounded activations, of both halves: parity in a lower arithmetic."""
    engine = open_plain(GgufModel(t5), "numpy", recorded=partial(reference.graph, t5))
    engine.steps = rounded(engine.steps, kind, storage=storage)
    engine.encoder = as_encoder(rounded(encoder_alone(engine.encoder or ()), kind, storage=storage))
    out = tmp_path / "ours.jsonl"
    write_dump(engine, OursJob(out, IDS))
    verdict = compared_on(unstated(load(out)), played(t5, tmp_path / "ref.jsonl", reference), Options(), t5).verdict
    assert verdict
    assert verdict.precision is not None
    assert verdict.precision.arithmetic != "f32"


@pytest.mark.slow
@pytest.mark.parametrize("points", ["default", "all"])
def test_logits_in_lower_arithmetic_behind_a_table_are_not_called_exact(
    t5: Path, tmp_path: Path, reference: Reference, points: str
) -> None:
    """A table of GELU allows what F16 costs: F16 logits behind it show by their steps, and a factor of them by what all positions share."""
    engine = open_plain(GgufModel(t5), "numpy", recorded=partial(reference.graph, t5))
    right, out = engine.steps, tmp_path / "ours.jsonl"
    reference.dump(DumpJob(model=t5, out=tmp_path / "ref.jsonl", tokens=IDS, points=points))
    ref = load(tmp_path / "ref.jsonl")

    def verdict_of(change: Callable[[Step], Step]) -> Verdict:
        engine.steps = [change(step) if step.makes == "logits" else step for step in right]
        write_dump(engine, OursJob(out, IDS, points=points))
        return compared_on(unstated(load(out)), ref, Options(), t5).verdict

    assert verdict_of(lambda step: step)
    lower = verdict_of(lambda step: rounded([step], "f16", storage=True)[0])
    assert not lower
    assert lower.operation == ""
    assert lower.pattern is not None
    assert "mixed precision" in lower.pattern.sentence
    scaled = verdict_of(lambda step: replace(step, op=lambda *a, **k: step.op(*a, **k) * np.float32(1.0011)))
    assert not scaled
    assert scaled.first_divergence is not None
    assert scaled.first_divergence.checkpoint == "logits"
    assert scaled.pattern is not None
    assert " 1.001" in scaled.pattern.sentence


@pytest.mark.slow
def test_a_decoder_in_a_lower_arithmetic_than_its_encoder(
    reference: Reference, small_model: Callable[..., Path], tmp_path: Path
) -> None:
    """A T5 whose decoder alone rounds to F16: its first product is not called wrong."""
    path, out = small_model("t5"), tmp_path / "ref.jsonl"
    tokens = tokens_of(path, 5, 1)
    reference.dump(DumpJob(path, out, tokens, points="all", slice_size=4096))
    engine, ref = Faulty(path, reference.graph(path)), load(out)
    ours = engine.dump(
        Planted(()), tokens, points="all", size=4096, bare=False, steps=rounded(engine.right, "f16", storage=False)
    )
    assert ours.header is not None
    ours = replace(ours, header=replace(ours.header, compute="", source="an engine"))
    verdict = compared_on(ours, ref, Options(), path).verdict
    assert verdict.pattern is not None
    assert "mixed precision" in verdict.pattern.sentence
    assert BLAMED not in verdict.operation


@pytest.mark.slow
@pytest.mark.parametrize("storage", [False, True])
def test_an_encoder_in_a_lower_arithmetic_than_its_decoder(
    storage: bool, small_model: Callable[..., Path], reference: Reference
) -> None:
    """A T5 whose encoder alone is F16: explain blames nothing in the decoder that reads it, and names a wrong product there."""
    path = small_model("t5")
    engine = Faulty(path, reference.graph(path))
    encoder = engine.transformer.encoder
    assert encoder is not None
    engine.transformer.encoder = rounded(encoder, "f16", storage=storage)

    def explained(steps: Sequence[Step]) -> Explanation:
        ours = engine.dump(Planted(()), tokens_of(path, 7, 1), points="all", size=4096, bare=False, steps=steps)
        assert ours.header is not None
        ours = replace(ours, header=replace(ours.header, compute="", source="an engine"))
        return explain(ours, path, PATIENT)

    answer = explained(engine.right)
    assert answer
    assert answer.precision_only == "f16"
    assert not answer.causes
    scaled = [
        replace(step, op=lambda *x, op=step.op, **params: op(*x, **params) * np.float32(1.002))
        if step.makes == "blk.1.attn_out"
        else step
        for step in engine.right
    ]
    answer = explained(scaled)
    assert [(cause.named.fault, cause.named.layers) for cause in answer.causes] == [("multiplier", (1,))]
