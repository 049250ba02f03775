"""Operations whose formula leaves few digits of a float32: an engine that computes them more exactly than llama.cpp is as right."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from planted import Faulty, Planted, tokens_of
from slow import slow_but

from checkpoints.answers.isolate import PROVEN, WRONG
from checkpoints.jsonl import write
from engine.graph import Step
from engine.lift.node import GgmlOperation
from parity.isolate.isolate import IsolateRequest, isolate
from reference.client import Reference


@pytest.fixture(params=slow_but(["mamba", "mamba2"], "mamba2"))
def small_steps(request: pytest.FixtureRequest, small_model: Callable[..., Path]) -> Path:
    """A model whose time steps are as small as those of trained models: 1e-3 to 0.1."""
    return small_model(request.param, "f32")


def in_float64(step: Step, factor: float = 1.0) -> Step:
    """A scan that rounds its result alone, times a factor."""

    def exactly(*inputs: np.ndarray, op: GgmlOperation, **params: object) -> np.ndarray:
        wide = [given.astype(np.float64) if given.dtype == np.float32 else given for given in inputs]
        result: np.ndarray = (op(*wide, **params) * factor).astype(np.float32)  # type: ignore[arg-type]
        return result

    scans = isinstance(step.op, GgmlOperation) and step.op.name == "SSM_SCAN"
    return replace(step, op=partial(exactly, op=step.op)) if scans else step


def test_the_references_scan_of_small_time_steps_is_proven(small_steps: Path, reference: Reference) -> None:
    """1 + exp(dt) is rounded to float32 in ggml and in our engine: where it was not here, a right llama.cpp was called wrong."""
    answer = isolate(IsolateRequest(small_steps, tokens=tokens_of(small_steps, 7, seed=1), generate=1), reference)
    assert {item.status for item in answer.operations} == {PROVEN}
    assert max(item.nmse or 0 for item in answer.operations if "scan" in item.name) < 1e-11


@pytest.mark.parametrize(("factor", "wrong"), [(1.0, False), (1.001, True), (30.0, True)])
def test_a_more_exact_scan_is_right(
    factor: float, wrong: bool, small_steps: Path, reference: Reference, tmp_path: Path
) -> None:
    """An engine with log1p, which keeps all digits, is not accused for it; a scan 1.001 or 30 times too large is."""
    engine, tokens = Faulty(small_steps, reference.graph(small_steps)), tokens_of(small_steps, 7, seed=1)
    steps = [in_float64(step, factor) for step in engine.right]
    dump = engine.dump(Planted(()), tokens, points="all", size=1 << 20, bare=False, steps=steps)
    assert dump.header is not None
    path, header = tmp_path / "ours.jsonl", replace(dump.header, source="an engine")
    write(replace(dump, header=header), path, header)
    answer = isolate(IsolateRequest(small_steps, tokens=tokens, dump=path, mode="exact"), reference)
    found = {item.name for item in answer.operations if item.status == WRONG}
    assert any("scan" in name for name in found) is wrong
    assert wrong or not found
