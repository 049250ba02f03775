"""Faults of features that only some models have: multipliers of embedding, residuals and logits, two RoPE bases, other activations."""

from collections.abc import Callable
from math import inf
from typing import Any

import numpy as np
from msgspec.structs import replace

from .. import ops
from ..backend import Array
from ..graph import RowsOf, Step
from ..inapplicable import NotApplicable
from .base import AT, Fault, Parameters, Steps, parameter_of, subsets, with_parameters
from .edits import ggml, integer, maker, number, require, with_values

_MULTIPLIED = ("embd", "scale", "scale.2", "logits")
_ROPE = ("q_rope", "k_rope")
_GELU = ("ffn_geglu", "ffn_gelu", "ffn_moe_geglu")
_TANH = 4  # GGML_UNARY_OP_TANH


def _multiplier(step: Step, right: Steps, parameters: Parameters) -> Step:
    require(step, "SCALE")
    before = maker(step, right)
    if ggml(before, "UNARY") and integer(before, 0) == _TANH:
        raise NotApplicable(f"{step.makes} ends a soft cap")
    by, how = number(step, 0), parameters["how"]
    if isinstance(how, float):
        return with_values(step, {0: how})
    return with_values(step, {0: float({"missing": 1.0, "applied twice": by**2, "inverted": 1 / by}[how])})


def _on_stream(step: Step, right: Steps, _parameters: Parameters) -> Step:
    """The sum of a branch and the hidden state, of which the other one is multiplied."""
    makers = [right.get(name) for name in step.names]
    scaled = next((at for at, made in enumerate(makers) if made is not None and ggml(made, "SCALE")), None)
    if step.op is not ops.add or len(step.reads) != 2 or scaled is None:
        return step
    multiplier = makers[scaled]
    assert multiplier is not None
    reads = (multiplier.reads[0], step.reads[1 - scaled])
    return replace(step, op=_plus_scaled, reads=reads, params={"by": number(multiplier, 0)})


def _plus_scaled(branch: Array, x: Array, *, by: float) -> Array:
    return branch.reshape(x.shape) + x * np.float32(by)


def _bases(right: Steps) -> tuple[float, ...]:
    return tuple(sorted({float(step.params["base"]) for step in right.values() if step.op is ops.rope}))


def _other_base(step: Step, right: Steps, _parameters: Parameters) -> Step:
    bases = _bases(right)
    if step.op is not ops.rope or len(bases) != 2:
        raise NotApplicable(f"{step.makes}: the model has only one RoPE base")
    return with_parameters(step, base=bases[0] if parameter_of(step, "base") == bases[1] else bases[1])


_GLU_KINDS = {"tanh": 1, "erf": 4, "quick": 5, "SiLU": 2}  # enum ggml_glu_op
_UNARY_KINDS = {"tanh": 8, "erf": 16, "quick": 9, "SiLU": 10}  # enum ggml_unary_op


def _gelu(step: Step, _right: Steps, parameters: Parameters) -> Step:
    kinds = _GLU_KINDS if ggml(require(step, "GLU", "UNARY"), "GLU") else _UNARY_KINDS
    if integer(step, 0) not in kinds.values():
        raise NotApplicable(f"{step.makes} is not a GELU")
    return with_values(step, {0: kinds[parameters["gelu"]]})


def _clamped(gate: Array, up: Array, *, alpha: float, limit: float, plus: float) -> Array:
    """min(gate, l) · sigmoid(α · min(gate, l)) · (clamp(up, ±l) + plus)."""
    x, y = np.minimum(gate, np.float32(limit)), np.clip(up, np.float32(-limit), np.float32(limit))
    with np.errstate(over="ignore"):
        return x / (np.float32(1) + np.exp(np.float32(-alpha) * x)) * (y + np.float32(plus))


def _swiglu_oai(step: Step, _right: Steps, parameters: Parameters) -> Step:
    require(step, "GLU")
    if integer(step, 0) != 3 or len(step.reads) != 2:
        raise NotApplicable(f"{step.makes} is not a clamped SwiGLU")
    values = {"alpha": number(step, 2), "limit": number(step, 3), "plus": 1.0}
    values |= {"the limit": {"limit": inf}, "the +1": {"plus": 0.0}, "α": {"alpha": 1.0}}[parameters["without"]]
    return replace(step, op=_clamped, params=values)


def _shifted_positions(step: Step, _right: Steps, parameters: Parameters) -> Step:
    if not any(isinstance(weight, RowsOf) and weight.weight.startswith("position_embd") for weight in step.weights):
        raise NotApplicable(f"{step.makes} looks up no positions")
    return replace(step, op=_Moved(step.op, _ROWS[parameters["by"]]))


_ROWS = {"one row": 1, "two rows": 2, "minus one row": -1}


class _Moved:
    """Rows of position embeddings, looked up from a shifted position."""

    def __init__(self, op: Callable[..., Array], by: int) -> None:
        self._op, self._by = op, by

    def __call__(self, positions: Array, *inputs: Any, **params: Any) -> Array:
        try:
            return self._op(np.maximum(positions + self._by, 0), *inputs, **params)
        except IndexError as error:  # the prompt fills the context: an engine would read beyond the table
            raise NotApplicable(f"positions are shifted beyond their table: {error}") from error


def _no_positions(step: Step, right: Steps, _parameters: Parameters) -> Step:
    if step.op is not ops.add or "pos_embd" not in step.names:
        raise NotApplicable(f"{step.makes} adds no positions")
    other = next(read for read in step.reads if read != "pos_embd")
    return replace(step, op=_handed_on, reads=(other,))


def _handed_on(x: Array) -> Array:
    return x.copy()


FAULTS = (
    Fault(
        name="multiplier",
        kinds=_MULTIPLIED,
        change=_multiplier,
        what="the model's multiplier is {how}, in {at}",
        symptom="values of the wrong size from the multiplier on",
        fix="read embedding_scale, residual_scale and logit_scale from the metadata; Gemma multiplies embeddings by √width",
        seen="Llama code that loads Granite, MiniCPM, Cohere or Gemma",
        parameters={"how": ("missing", "applied twice", "inverted"), AT: (*subsets(*_MULTIPLIED)[1:], ("scale", "scale.2"))},
    ),
    Fault(
        name="multiplier-on-stream",
        kinds=("SUM",),
        change=_on_stream,
        what="the multiplier of a branch is applied to the hidden state that the branch is added to",
        symptom="values of the wrong size from layer 0 on",
        fix="residual + multiplier · branch",
        seen="Granite's and MiniCPM's residual multiplier on the wrong side of the sum",
    ),
    Fault(
        name="rope-base-of-other-layers",
        kinds=_ROPE,
        change=_other_base,
        what="layers use the RoPE base of the other kind of layers",
        symptom="position 0 is right, later ones are wrong, and more so the later they are",
        fix="layers with a window of attention have their own base (rope.freq_base_swa)",
        seen="one base for all layers of Gemma 3",
    ),
    Fault(
        name="gelu-kind",
        kinds=_GELU,
        change=_gelu,
        what="GELU by {gelu}, which is not this model's",
        symptom="a difference of 1e-4 to 1e-2 from layer 0 on",
        fix="Gemma and GPT-2 use the tanh formula, BERT the error function, some encoders the quick one",
        seen="the framework's default GELU",
        parameters={"gelu": ("erf", "quick", "SiLU", "tanh")},
    ),
    Fault(
        name="swiglu-clamp",
        kinds=("ffn_moe_swiglu_oai",),
        change=_swiglu_oai,
        what="the clamped SwiGLU is computed without {without}",
        symptom="wrong from the first layer on that has it",
        fix="min(gate, l) · sigmoid(α · gate) · (clamp(up) + 1)",
        seen="plain SwiGLU for gpt-oss",
        parameters={"without": ("the +1", "α", "the limit")},
    ),
    Fault(
        name="position-rows",
        kinds=("pos_embd",),
        change=_shifted_positions,
        what="position embeddings are looked up {by}",
        symptom="slightly wrong everywhere, from position 0 on",
        fix="row t of position_embd for position t, counted from 0",
        seen="OPT's offset of two carried over to GPT-2",
        parameters={"by": tuple(_ROWS)},
        says={"one row": "one row too far", "two rows": "two rows too far", "minus one row": "one row too early"},
        once=True,
    ),
    Fault(
        name="position-rows-missing",
        kinds=("embd",),
        change=_no_positions,
        what="position embeddings are not added",
        symptom="wrong from position 0 on",
        fix="add position_embd's row to the token's",
        seen="Llama code that loads GPT-2 or StarCoder",
        once=True,
    ),
)
