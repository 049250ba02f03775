"""Float64 knows the states that passes leave behind, as it knows the values that have a row for each position."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from checkpoints.formats import load
from checkpoints.record import Dump
from engine.graph import Step
from engine.lift.node import GgmlOperation
from engine.opened import open_plain
from engine.weights.gguf_model import GgufModel
from parity.diff.compare import Options
from parity.explain.on_model import compared_on
from parity.explain.rounding.known_model import KnownModel
from parity.run.ours import OursJob, dump
from reference.client import Reference
from reference.jobs import DumpJob

PROMPT, GENERATED = (5, 6, 7), (8, 9)
STATE = "blk.0.cache_s"
# The limit of exact mode.
NEAR = 1e-10


def _wrong_scan(steps: Sequence[Step]) -> list[Step]:
    """The steps, every other element of the first layer's scan and of the state that it leaves a hundredth too large."""

    def larger(op: Callable[..., Any], *inputs: Any, **params: Any) -> Any:
        value = op(*inputs, **params)
        value[..., ::2] *= np.float32(1.01)
        return value

    scans = [step for step in steps if isinstance(step.op, GgmlOperation) and step.op.name in ("SSM_SCAN", "RWKV_WKV7")]
    return [replace(step, op=partial(larger, step.op)) if step is scans[0] else step for step in steps]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["mamba2", "rwkv7"])
def test_float64_knows_states(
    small_model: Callable[..., Path], reference: Reference, tmp_path: Path, architecture: str
) -> None:
    """A wrong state names the wrong side, whichever that is, and llama.cpp's states after the prompt and each step are near float64's."""
    model = small_model(architecture, "f32", layers=2)
    right, wrong = tmp_path / "right.jsonl", tmp_path / "wrong.jsonl"
    reference.dump(DumpJob(model, right, PROMPT, points="all", lead=GENERATED))
    engine = open_plain(GgufModel(model), "numpy", recorded=partial(reference.graph, model))
    engine.steps = _wrong_scan(engine.steps)
    dump(engine, OursJob(wrong, PROMPT, generated=GENERATED, points="all"))
    llama, ours = load(right), load(wrong)

    def nearer(left: Dump, other: Dump) -> str:
        verdict = compared_on(left, other, Options(), model).verdict
        assert verdict.first_divergence is not None
        assert (verdict.first_divergence.checkpoint, verdict.first_divergence.token_idx) == (STATE, len(PROMPT) - 1)
        assert verdict.truth is not None
        assert verdict.truth.checkpoint == STATE
        assert len(verdict.truth.values) == 16
        return verdict.truth.alone

    assert nearer(ours, llama) == "ours"
    assert nearer(llama, ours) == "reference"
    distances = KnownModel(llama, model).distances({STATE: llama.points[STATE]})[STATE]
    assert llama.points[STATE].token_idx.tolist() == [2, 3, 4]
    assert (distances < NEAR).all()
