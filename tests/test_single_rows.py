"""Engines in TF32 that compute passes of one token in float32, as cuBLAS does: right ones are right, and faults are found in both."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from explaining import unstated
from msgspec.structs import replace
from planted import PATIENT, Faulty, Planted

from checkpoints.record import Dump
from engine.backend import Array
from engine.graph import Step
from engine.replay.precision import rounded, sparing
from engine.synth import Shape, synthesize
from parity.diff.compare import Options
from parity.explain.explain import explain
from parity.explain.on_model import compared_on

PROMPT, AFTER = (1, 17, 40, 299, 5, 80, 3, 9), 2


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Faulty:
    """A small qwen2."""
    path = tmp_path_factory.mktemp("single") / "small.gguf"
    synthesize(path, Shape("qwen2", 3, 112, 14, 2, 0, 128, 300), weight_type="f32", seed=11)
    return Faulty(path)


@pytest.fixture(scope="module")
def right(engine: Faulty) -> Dump:
    """What it dumps in float32."""
    return engine.dump(Planted(()), PROMPT, points="all", size=1 << 20, bare=False)


def _where(step: Step, single: Callable[..., Array], several: Callable[..., Array]) -> Step:
    """A step with one operation for passes of one token, and another for those of several."""

    def op(*inputs: Any, **params: Any) -> Array:
        whole = single(*inputs, **params)
        return whole if step.axis is not None and whole.shape[step.axis] == 1 else several(*inputs, **params)

    return replace(step, op=op)


def _several_rows(steps: Sequence[Step]) -> list[Step]:
    lower = rounded(steps, "tf32", storage=False)
    return [step if new is step else _where(step, step.op, new.op) for step, new in zip(steps, lower, strict=True)]


def _dumped(engine: Faulty, steps: Sequence[Step]) -> Dump:
    return unstated(engine.dump(Planted(()), PROMPT, points="all", size=1 << 20, generated=AFTER, bare=False, steps=steps))


def _off(step: Step, *, prompt: bool) -> Step:
    """The step whose result is 1.001 times the right one in the prompt's pass, or in those after it."""

    def off(*inputs: Any, **params: Any) -> Array:
        return np.asarray(step.op(*inputs, **params) * np.float32(1.001))

    return _where(step, step.op, off) if prompt else _where(step, off, step.op)


def test_rows_that_are_spared_are_those_of_float32(engine: Faulty) -> None:
    """Of products in TF32 that spare two rows these have the bits of float32, and all others do not."""
    step = next(step for step in engine.right if step.makes == "blk.0.q")
    x = np.random.default_rng(3).normal(size=(8, 112)).astype(np.float32)
    inputs = [x, *(engine.transformer.weights.get(str(name)) for name in step.weights)]
    whole = step.op(*inputs, **step.params)
    spared = sparing(rounded([step], "tf32", storage=False), (6, 7), 8)[0].op(*inputs, **step.params)
    assert (spared == whole).all(axis=1).tolist() == [False] * 6 + [True] * 2


def test_tf32_that_multiplies_single_rows_in_float32_is_parity(engine: Faulty, right: Dump) -> None:
    """A right engine whose prompt is in TF32, and whose passes of one token are in float32, is parity in TF32 or F16, unstated."""
    verdict = compared_on(_dumped(engine, _several_rows(engine.right)), right, Options(), engine.model).verdict
    assert verdict, verdict.first_divergence
    assert verdict.precision is not None
    assert verdict.precision.arithmetic in ("tf32", "f16")


@pytest.mark.slow
def test_explain_finds_no_fault_where_single_rows_are_in_float32(engine: Faulty) -> None:
    """`explain` says of such an engine that TF32 or F16 explains everything."""
    answer = explain(_dumped(engine, _several_rows(engine.right)), engine.model, PATIENT)
    assert answer, answer.first
    assert answer.precision_only in ("tf32", "f16")


@pytest.mark.parametrize("point", ["blk.0.v", "blk.1.ffn_out"])
@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("arithmetic", [list, _several_rows], ids=["float32", "tf32"])
def test_a_factor_in_some_passes_alone_is_found(
    engine: Faulty, right: Dump, point: str, prompt: bool, arithmetic: Callable[[Sequence[Step]], list[Step]]
) -> None:
    """An operation that is 1.001 times the right one in the prompt alone, or in the passes after it alone, is a divergence there."""
    steps = [_off(step, prompt=prompt) if step.makes == point else step for step in arithmetic(engine.right)]
    verdict = compared_on(_dumped(engine, steps), right, Options(), engine.model).verdict
    assert verdict.first_divergence is not None
    assert verdict.first_divergence.checkpoint == point
