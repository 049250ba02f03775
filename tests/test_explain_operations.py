"""Entries of the catalogue act wherever their operation occurs, by whatever name a model calls its value."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from explaining import RIGHT
from msgspec.structs import replace
from planted import PATIENT, Faulty, tokens_of

from engine import ops
from engine.backend import Array
from engine.faults.base import kinds_of
from engine.graph import Step
from parity.explain.explain import explain
from reference.client import Reference


def _gated(z: Array, y: Array) -> Array:
    return ((1 / (1 + np.exp(-z.astype(np.float64)))) * y).astype(np.float32)


def _by_heads(x: Array, weight: Array, *, eps: float) -> Array:
    heads = [ops.rms_norm(part, of, eps=eps) for part, of in zip(np.split(x, 8, axis=1), np.split(weight, 8), strict=True)]
    return np.concatenate(heads, axis=1)


def _over_the_row(x: Array, weight: Array, *, eps: float, heads: int) -> Array:
    return ops.rms_norm(x, np.tile(weight, heads), eps=eps)


def _norm_after(step: Step, right: dict[str, Step]) -> list[Step]:
    """norm(y · silu(z)) where the model has norm(y) · silu(z)."""
    norm = right[step.names[0]]
    gated = replace(step, makes=f"{step.makes}.alone", reads=(norm.reads[0], step.reads[1]), inner=True)
    return [gated, replace(norm, makes=step.makes, reads=(gated.makes,))]


def _each_head_repeated(step: Step, _right: dict[str, Step]) -> list[Step]:
    """Two key heads for four value heads, each repeated one after the other where ggml repeats them in turn."""
    values = step.params["operands"][2]
    operands = (*(replace(values, index=place) for place in (0, 1)), *step.params["operands"][2:])

    def repeated(x: Array) -> Array:
        return np.repeat(x.reshape(1, -1, 2, 32), 2, axis=2)

    def rule(q: Array, k: Array, *rest: Array, **params: Any) -> Array:
        return step.op(repeated(q), repeated(k), *rest, **params)

    return [replace(step, op=rule, params={**step.params, "operands": operands})]


def _unscaled(step: Step, _right: dict[str, Step]) -> list[Step]:
    def rule(q: Array, *rest: Array, **params: Any) -> Array:
        return step.op(q * np.float32(np.sqrt(32)), *rest, **params)

    return [replace(step, op=rule)]


def _by(op: Callable[..., Array]) -> Callable[[Step, dict[str, Step]], list[Step]]:
    return lambda step, _right: [replace(step, op=op)]


_AS_IT_IS = _by(lambda x, *_weights, **_params: x.copy())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "kind", "change", "name"),
    [
        ("mamba2", "glu", _by(_gated), "activation"),
        ("mamba2", "ssm_norm", _by(_by_heads), "row-norm-by-head"),
        ("mamba2", "ssm_norm", _AS_IT_IS, "norm-skipped"),
        ("qwen35", "ssm_norm", _by(_over_the_row), "head-norm-whole-width"),
        ("qwen35", "ssm_norm", _AS_IT_IS, "head-norm-missing"),
        ("qwen35", "GATED_DELTA_NET", _each_head_repeated, "delta-heads-repeated"),
        ("qwen35", "GATED_DELTA_NET", _unscaled, "delta-query-scale"),
        ("kimi-linear", "mul", _norm_after, "gate-before-norm"),
    ],
)
def test_an_entry_acts_at_its_operation(
    recipe: str, kind: str, change: Any, name: str, reference: Reference, small_model: Callable[..., Path]
) -> None:
    """Gates, norms and norms by heads of a scan's result are named as those of attention and feed-forwards are."""
    model = small_model(recipe)
    engine = Faulty(model, reference.graph(model))
    right = {step.makes: step for step in engine.right}
    steps = [new for step in engine.right for new in (change(step, right) if kind in kinds_of(step) else [step])]
    tokens = tokens_of(model, 6, seed=5)
    explanation = explain(engine.dump(RIGHT, tokens, points="all", steps=steps), model, replace(PATIENT, tokens=tokens))
    assert [cause.named.fault for cause in explanation.causes] == [name]
    assert explanation.remaining is None
