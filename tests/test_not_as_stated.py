"""A header states a lower arithmetic, and the numbers are float32's: a fault as small as that arithmetic's noise is none of it."""

from collections.abc import Sequence

import numpy as np
import pytest
from explaining import PROMPT, RIGHT
from msgspec.structs import replace
from planted import Faulty

from checkpoints.record import Dump
from engine.graph import Step
from engine.replay.precision import rounded
from parity.diff.compare import Options
from parity.explain.case import ExplainOptions
from parity.explain.input import explain_dump
from parity.explain.on_model import compared_on


def _stating(engine: Faulty, steps: Sequence[Step], kind: str) -> Dump:
    dump = engine.dump(RIGHT, PROMPT, points="default", steps=steps, bare=False)
    assert dump.header is not None
    return replace(dump, header=replace(dump.header, compute=kind, source="an engine"))


def _nearly_right(step: Step) -> Step:
    return replace(step, op=lambda *inputs, **params: step.op(*inputs, **params) * np.float32(1.001))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_layers_that_agree_as_in_float32_show_that_it_is(engine: Faulty, kind: str) -> None:
    """A factor of one product in float32 passes for no noise of the stated arithmetic, unless --compute allows for it everywhere."""
    right = engine.dump(RIGHT, PROMPT, points="default", size=1 << 20, bare=False)
    steps = [_nearly_right(step) if step.makes == "blk.2.ffn_up" else step for step in engine.right]
    ours = _stating(engine, steps, kind)
    verdict = compared_on(ours, right, Options(), engine.model).verdict
    assert verdict.first_divergence is not None
    assert any(note.startswith(f"the header states {kind.upper()}, but blk.0.l_out agrees") for note in verdict.notes)
    answer = explain_dump(ours, engine.model, ExplainOptions(budget=30.0))
    assert not answer
    assert answer.notes[0].startswith(f"the header states {kind.upper()}, but blk.0.l_out agrees")
    assert [cause.named.fault for cause in answer.causes] == ["multiplier"]
    assert compared_on(ours, right, Options(compute=kind), engine.model).verdict


@pytest.mark.parametrize("storage", [False, True])
@pytest.mark.parametrize("kind", ["f16", "bf16", "q8", "tf32"])
def test_an_engine_that_computes_as_it_says_is_right(engine: Faulty, kind: str, storage: bool) -> None:
    """Products alone rounded, or activations, too."""
    right = engine.dump(RIGHT, PROMPT, points="default", size=1 << 20, bare=False)
    ours = _stating(engine, rounded(engine.right, kind, storage=storage), kind)
    assert compared_on(ours, right, Options(), engine.model).verdict
