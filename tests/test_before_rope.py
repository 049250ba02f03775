"""Queries and keys that were recorded before RoPE, where no other point has them: pairs of the right lengths, at other angles."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from planted import PATIENT, TOKENS, Faulty, Planted
from recorded import F32, only

from checkpoints.reading.reader import read
from checkpoints.record import Dump
from engine.graph import Step
from parity.diff.compare import compare
from parity.explain.explain import explain
from reference.client import Reference
from reference.jobs import DumpJob

LAYERS = range(2)
TELLING = [f"blk.{n}.{kind}" for n in LAYERS for kind in ("q_rope", "k_rope", "kqv_out", "l_out")]


@pytest.fixture(scope="module", params=["granite", "qwen3"])
def engine(request: pytest.FixtureRequest, reference: Reference, small_model: Callable[..., Path]) -> Faulty:
    """Models whose rotation pairs neighbours, and halves."""
    model = small_model(request.param)
    return Faulty(model, reference.graph(model))


def _early(dump: Dump, before: str) -> Dump:
    """The dump with queries before RoPE under the name of those after it."""
    points = {f"blk.{n}.q_rope": replace(dump.points[f"blk.{n}.{before}"], point=f"blk.{n}.q_rope") for n in LAYERS}
    return only(replace(dump, points={**dump.points, **points}), *TELLING)


def _scaled(step: Step) -> Step:
    return replace(step, op=lambda *inputs, **params: step.op(*inputs, **params) * np.float32(1.5))


def _before(engine: Faulty) -> str:
    return "q_norm" if "blk.0.q_norm" in {step.makes for step in engine.right} else "q"


@pytest.mark.parametrize("size", [32, 4096])
def test_queries_before_rope_are_no_fault(engine: Faulty, size: int) -> None:
    """What attention makes of them agrees at every position: the record is of an earlier moment."""
    size = max(size, 48) if _before(engine) == "q_norm" else size  # a whole head, if its halves are paired
    right = engine.dump(Planted(()), TOKENS, points="all", size=size, bare=False)
    verdict = compare(_early(right, _before(engine)), only(right, *TELLING), F32)
    assert verdict.first_divergence is None, verdict.pattern
    assert {fault.checkpoint for fault in verdict.record_faults} == {f"blk.{n}.q_rope" for n in LAYERS}
    assert "before RoPE" in verdict.record_faults[0].sentence


@pytest.mark.parametrize("fault", [("rope-base", {"base": 10001.0}), ("rope-base", {"base": 500000.0}), ("rope-missing", {})])
def test_a_wrong_rotation_is_no_early_record(engine: Faulty, fault: tuple[str, dict[str, float]]) -> None:
    """A rotation by other angles, however slightly, is a divergence at the rotation."""
    right = engine.dump(Planted(()), TOKENS, points="all", size=4096, bare=False)
    wrong = engine.dump(Planted(((*fault, None),)), TOKENS, points="all", size=4096, bare=False)
    verdict = compare(only(wrong, *TELLING), only(right, *TELLING), F32)
    assert verdict.first_divergence is not None
    assert verdict.first_divergence.checkpoint == "blk.0.q_rope"
    assert not verdict.record_faults


@pytest.mark.parametrize("fault", [True, False])
def test_what_a_wrong_rotation_and_an_early_record_have_in_common(
    reference: Reference, small_model: Callable[..., Path], tmp_path: Path, fault: bool
) -> None:
    """Where what is made from queries recorded before RoPE is wrong as well, nothing tells them from queries that are rotated wrongly."""
    model = small_model("deepseek2")
    engine = Faulty(model, reference.graph(model))
    reference.dump(DumpJob(model, tmp_path / "ref.jsonl", TOKENS, points="all", slice_size=4096))
    early = Planted((("capture-before-rope", {"at": ("q_pe", "k_pe")}, None),))
    steps = [_scaled(step) if fault and step.makes == "blk.0.q_rope" else step for step in engine.right]
    dump = engine.dump(early, TOKENS, points="all", size=4096, bare=False, steps=steps)
    verdict = compare(dump, read(tmp_path / "ref.jsonl"), F32)
    if not fault:
        assert verdict.first_divergence is None
        return
    assert verdict.first_divergence is not None
    assert verdict.first_divergence.checkpoint == "blk.0.q_pe"
    assert verdict.operation.endswith(
        "this operation is wrong, or it was recorded before RoPE, and what is computed from it is wrong"
    )


@pytest.mark.slow
@pytest.mark.parametrize("besides", [(), (("rope-pairs", {"at": ("q_pe", "k_pe")}, None),)])
def test_records_before_rope_hide_no_fault(
    reference: Reference, small_model: Callable[..., Path], besides: tuple[tuple[str, dict[str, object], None], ...]
) -> None:
    """Of parts of queries and keys that alone are rotated, too: the moment is named, and the wrong rotation beside it."""
    model = small_model("deepseek2")
    engine = Faulty(model, reference.graph(model))
    early = ("capture-before-rope", {"at": ("q_pe", "k_pe")}, None)
    dump = engine.dump(Planted((*besides, early)), TOKENS, points="all", size=16, bare=False)
    named = {cause.named.fault for cause in explain(dump, model, PATIENT).causes}
    assert named == {early[0], *(name for name, *_ in besides)}


def test_a_model_without_rope_has_no_record_before_it(
    reference: Reference, small_model: Callable[..., Path], tmp_path: Path
) -> None:
    """gpt2's graph has no rotation: keys whose pairs are turned are not said to be recorded before RoPE."""
    model = small_model("gpt2")
    engine = Faulty(model, reference.graph(model))

    def turned(*inputs: np.ndarray, op: Callable[..., np.ndarray], **params: object) -> np.ndarray:
        out = op(*inputs, **params)
        angle = np.arange(len(out), dtype=np.float32)[:, None]
        even, odd = out[:, ::2], out[:, 1::2]
        turns = (even * np.cos(angle) - odd * np.sin(angle), even * np.sin(angle) + odd * np.cos(angle))
        return np.stack(turns, axis=-1).reshape(out.shape).astype(np.float32)

    steps = [replace(step, op=partial(turned, op=step.op)) if step.makes == "blk.1.attn_out" else step for step in engine.right]
    ours = engine.dump(Planted(()), TOKENS, points="all", size=4096, bare=False, steps=steps)
    reference.dump(DumpJob(model, tmp_path / "ref.jsonl", TOKENS, points="all", slice_size=4096))
    verdict = compare(ours, read(tmp_path / "ref.jsonl"), F32)
    assert verdict.first_divergence is not None
    assert verdict.first_divergence.checkpoint == "blk.1.attn_out"
    assert "RoPE" not in verdict.operation
    assert verdict.pattern is None or "RoPE" not in verdict.pattern.sentence
