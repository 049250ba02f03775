"""Derivatives of a row of a value by the same row of earlier values, which say what is likely in a layer that no point stands at."""

from collections.abc import Mapping

import numpy as np
import pytest

from checkpoints.graph import Size
from engine import ops
from engine.backend import Array
from engine.graph import POSITIONS, History, Step, View, compute
from engine.replay.adjoint import derivatives
from engine.replay.batched import can_batch

_ROW, _ROWS, _WIDTH = 4, 5, 8
_ROPE = {"dims": 4, "base": 100.0, "scale": 1.0, "pairs": "neox"}
_STEPS = (
    Step("norm", ops.rms_norm, ("x",), ("norm.weight",), {"eps": 1e-3}),
    Step("q", ops.linear, ("norm",), ("q.weight", "q.bias"), {}),
    Step("k", ops.linear, ("norm",), ("k.weight", None), {}),
    Step("q_norm", ops.rms_norm, ("q",), ("head.weight",), {"eps": 1e-3, "heads": 2}),
    Step("q_rope", ops.rope, ("q_norm", POSITIONS), (), {"heads": 2, **_ROPE}),
    Step("k_rope", ops.rope, ("k", POSITIONS), ("factors",), {"heads": 1, **_ROPE, "pairs": "norm"}),
    Step("keys", ops.cached, (History("k_rope"),), (), {}),
    Step("kq", ops.attention_scores, ("q_rope", "keys"), (), {"heads": 2, "kv_heads": 1}),
    Step("soft", ops.causal_soft_max, ("kq", POSITIONS, POSITIONS), ("sinks",), {"scale": 0.5}),
    Step("out", ops.weighted_values, ("soft", "k"), (), {"kv_heads": 1}),
    Step("sum", ops.add, ("x", "out"), (), {}),
    Step("layer", ops.layer_norm, ("sum",), ("norm.weight", "q.bias"), {"eps": 1e-3}),
    Step("end", ops.swiglu, ("layer", "sum"), (), {}),
)


class _Weights:
    """Weights of float64."""

    def __init__(self) -> None:
        rng = np.random.default_rng(1)
        shapes = {
            "norm.weight": (_WIDTH,),
            "q.weight": (_WIDTH, _WIDTH),
            "q.bias": (_WIDTH,),
            "k.weight": (4, _WIDTH),
            "head.weight": (4,),
            "factors": (2,),
            "sinks": (2,),
        }
        self._of = {name: rng.standard_normal(shape) for name, shape in shapes.items()}

    def get(self, name: str) -> Array:
        return self._of[name]


def _values(x: Array, weights: _Weights) -> Mapping[str, Array]:
    values: dict[str, Array] = {"x": x, POSITIONS: np.arange(_ROWS)}
    for step in _STEPS:
        values[step.makes] = compute(step, [values[name] for name in step.names], weights)  # type: ignore[arg-type]
    return values


def test_derivatives_are_the_slopes_of_small_steps() -> None:
    """Through every operation that is computed in batches, in float64: what a small step in a row changes there, to five digits."""
    assert all(can_batch(step) for step in _STEPS if step.op is not ops.causal_soft_max)
    weights = _Weights()
    x = np.random.default_rng(2).standard_normal((_ROWS, _WIDTH))
    elements = np.array([0, 3, 7])
    answer = derivatives(_STEPS, "end", elements, _ROW, _values(x, weights), weights)["x"]  # type: ignore[arg-type]
    slopes = np.zeros_like(answer)
    for element in range(_WIDTH):
        step = np.zeros_like(x)
        step[_ROW, element] = 1e-5
        ends = [_values(x + sign * step, weights)["end"][_ROW, elements] for sign in (1, -1)]
        slopes[:, element] = (ends[0] - ends[1]) / 2e-5
    assert np.abs(slopes).max() > 0.1
    np.testing.assert_allclose(answer, slopes, rtol=1e-5, atol=1e-6 * np.abs(slopes).max())


def test_of_a_part_of_each_row_only_its_elements_answer() -> None:
    """The second half of a row, read as a view: the derivatives by the whole row are those of its second half."""
    weights = _Weights()
    values = dict(_values(np.random.default_rng(2).standard_normal((_ROWS, _WIDTH)), weights))
    values["half"] = values["sum"][:, _WIDTH // 2 :]
    width = Size(_WIDTH)
    read = View("sum", (Size(0, 1), width), (Size(0, 1), Size(_WIDTH // 2)), (width, Size(1)), Size(_WIDTH // 2))
    half = Step("half", ops.part, (read,), (), {})
    answers = derivatives((half,), "half", np.array([0, 3]), _ROW, values, weights)  # type: ignore[arg-type]
    np.testing.assert_array_equal(answers["sum"], np.eye(_WIDTH)[[_WIDTH // 2, _WIDTH // 2 + 3]])


def test_steps_that_mix_the_rows_of_a_value_are_refused() -> None:
    """A value read with its rows and columns exchanged: KeyError, which callers know, and no error of shapes."""
    weights = _Weights()
    values = dict(_values(np.random.default_rng(2).standard_normal((_ROWS, _WIDTH)), weights))
    values["turned"] = values["sum"]
    turned = View("sum", (Size(0, 1), Size(_WIDTH)), (Size(_WIDTH), Size(0, 1)), (Size(1), Size(_WIDTH)))
    step = Step("turned", ops.linear, (turned,), ("q.weight", None), {})
    with pytest.raises(KeyError, match="turned"):
        derivatives((*_STEPS, step), "turned", np.array([0]), _ROW, values, weights)  # type: ignore[arg-type]
