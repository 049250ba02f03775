"""Faults of recurrent layers: convolutions, decays, gates, the state from pass to pass."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from msgspec.structs import replace

from .. import ops
from ..backend import Array, module_of
from ..ggml_ops.activations import silu, softplus
from ..graph import Altered, Step, name_of
from ..inapplicable import NotApplicable
from .base import Fault, Parameters, Steps, read_of, sibling
from .edits import SOFTPLUS, HandsOn, Then, WithInput, ggml, integer, left_out, maker, only, require

_CONVOLUTIONS = ("ssm_conv", "conv.conv", "conv_output_raw")
_SCAN_C = 4  # of the values that a scan reads, A aside, which is a weight
_SCAN_DT = 2  # GGML_OP_SSM_SCAN's operand


def _tap(step: Step, _right: Steps, parameters: Parameters) -> Step:
    """The step with its last input, the taps [channels, taps], in another order."""
    by = parameters["by"]

    def moved(taps: Array) -> Array:
        return taps[..., ::-1] if by == 0 else np.roll(taps, by, axis=-1)

    return replace(require(step, "SSM_CONV"), op=WithInput(step.op, -1, moved))


def _late(columns: Array) -> Array:
    """The columns that a convolution reads [.., T + taps − 1], each one place later; what comes first is zero."""
    moved = module_of(columns).zeros_like(columns)
    moved[..., 1:] = columns[..., :-1]
    return moved


def _one_late(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    return replace(require(step, "SSM_CONV"), op=WithInput(step.op, 0, _late))


class _FromEdge(HandsOn, frozen=True):
    """A convolution that reads the first position's values before the first position, where a sequence begins with zeros."""

    def __call__(self, columns: Array, taps: Array, *rest: Any, **params: Any) -> Array:
        """Columns [.., T + taps − 1], taps [channels, taps]."""
        before, padded = taps.shape[-1] - 1, columns.copy()
        padded[..., :before] = columns[..., before : before + 1]
        return self.op(padded, taps, *rest, **params)


def _padded(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    return replace(require(step, "SSM_CONV"), op=_FromEdge(step.op))


def _activated(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    return replace(require(step, "SSM_CONV"), op=Then(step.op, silu))


def _no_softplus(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    require(step, "UNARY")
    if integer(step, 0) != SOFTPLUS:
        raise NotApplicable(f"{step.makes} is not a softplus")
    return left_out(step)


def _softplus_twice(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    """Mamba's scan applies softplus itself; elsewhere it is a step of its own."""
    if ggml(step, "SSM_SCAN"):
        return replace(step, op=WithInput(step.op, step.params["operands"][_SCAN_DT].index, softplus))
    return replace(step, op=Then(step.op, softplus)) if ggml(step, "UNARY") and integer(step, 0) == SOFTPLUS else step


def _no_decay(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    return only(require(step, "MUL"), read_of(step, 0))


_DECAYS: dict[str, Callable[[Array], Array]] = {
    "−exp of what the file has": lambda decay: -np.exp(decay),
    "the logarithm of its size": lambda decay: np.log(np.abs(decay)),
    "minus the logarithm of its size": lambda decay: -np.log(np.abs(decay)),
    "without its sign": np.abs,
}


def _decay(step: Step, _right: Steps, parameters: Parameters) -> Step:
    """The step with another function of A = −exp(A_log), which the file has."""
    change = _DECAYS[parameters["a"]]
    weights = tuple(
        Altered(weight, lambda source, name: change(source.get(name)))
        if isinstance(weight, str) and weight.endswith("ssm_a")
        else weight
        for weight in step.weights
    )
    if weights == step.weights:
        raise NotApplicable(f"{step.makes} reads no decay")
    return replace(step, weights=weights)


def _no_skip(step: Step, right: Steps, _parameters: Parameters) -> Step:
    scaled = [read for read in step.names if ggml(right.get(read, step), "MUL") and "ssm_d" in str(right[read].weights)]
    if step.op is not ops.add or not scaled:
        raise NotApplicable(f"{step.makes} adds no D · x")
    return only(step, next(read for read in step.reads if read != scaled[0]))


def _no_bias(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    if not ggml(step, "ADD") or "ssm" not in str(step.weights):
        raise NotApplicable(f"{step.makes} adds no bias")
    return only(step, read_of(step, 0))


def _exchanged(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    """B and C are the scan's third and fourth values of a pass, after the state, x and the time step."""
    if len(require(step, "SSM_SCAN").reads) < _SCAN_C + 1:
        raise NotApplicable(f"{step.makes} reads no B and C")
    *before, second, first = step.reads[: _SCAN_C + 1]
    return replace(step, reads=(*before, first, second, *step.reads[_SCAN_C + 1 :]))


def _conv_gates(step: Step, right: Steps, parameters: Parameters) -> Step:
    """LFM2's block is C · conv(B · x): its projection's three parts in another order."""
    inner_gate, outer_gate = (sibling(step, right, kind) for kind in ("mul", "mul.2"))
    if not all("conv.in_proj" in name_of(read_of(gate, 0)) and len(gate.reads) == 2 for gate in (inner_gate, outer_gate)):
        raise NotApplicable(f"{step.makes} is no gate of a short convolution")
    place = ("B", "x").index(parameters["with"])
    inner, outer = list(inner_gate.reads), list(outer_gate.reads)
    inner[place], outer[0] = outer[0], inner[place]
    return replace(step, reads=tuple(inner if step is inner_gate else outer))


def _gate_after_norm(step: Step, right: Steps, _parameters: Parameters) -> Sequence[Step]:
    """norm(y) · silu(z), where the model has norm(y · silu(z))."""
    gated = maker(step, right)
    if gated.op is not ops.swiglu or len(gated.reads) != 2:
        raise NotApplicable(f"{step.makes} is no norm of gated values")
    z, y = gated.reads
    normed = replace(step, makes=f"{step.makes}.alone", reads=(y,), inner=True)
    return normed, replace(gated, makes=step.makes, reads=(z, normed.makes))


FAULTS = (
    Fault(
        name="convolution-taps",
        kinds=_CONVOLUTIONS,
        change=_tap,
        what="the convolution's taps are {by}",
        symptom="wrong from position 0 on, of plausible size",
        fix="the last tap belongs to the position itself",
        seen="kernels stored in reverse order; a state that is one position late",
        parameters={"by": (1, -1, 0)},
        says={1: "one place late", -1: "one place early", 0: "back to front"},
    ),
    Fault(
        name="convolution-late",
        kinds=("SSM_CONV",),
        change=_one_late,
        what="the convolution is one position late: a position does not see itself",
        symptom="wrong from position 0 on; position t has what belongs to t − 1",
        fix="write a position's values into the convolution's state before it is read",
        seen="states that are shifted after the convolution, not before it",
    ),
    Fault(
        name="convolution-padding",
        kinds=("SSM_CONV",),
        change=_padded,
        what="the convolution begins with the first position's values, not with zeros",
        symptom="the first positions are wrong, as many as there are taps less one; in the layer after it all that read them",
        fix="before the first position of a sequence the convolution's state is zero",
        seen="padding in the mode of the edge; states that are filled with the first row",
    ),
    Fault(
        name="convolution-activated",
        kinds=("SSM_CONV",),
        change=_activated,
        what="SiLU is applied to the convolution's result, which this model does not do, or does after the bias",
        symptom="wrong from position 0 on",
        fix="no activation after LFM2's short convolution; Mamba's comes after the bias",
        seen="convolution kernels of Mamba with the activation in them, used for other models",
    ),
    Fault(
        name="time-step-softplus-missing",
        kinds=("a_softplus",),
        change=_no_softplus,
        what="the time step is used without softplus",
        symptom="states that grow instead of decaying",
        fix="dt = softplus(projection + bias)",
        seen="softplus fused into a kernel that was later replaced",
    ),
    Fault(
        name="time-step-softplus-twice",
        kinds=("SSM_SCAN", "a_softplus"),
        change=_softplus_twice,
        what="softplus is applied to the time step twice",
        symptom="states that decay too fast",
        fix="hand the scan dt as it is where its kernel applies softplus",
        seen="scan kernels with dt_softplus, given a dt that went through softplus already",
    ),
    Fault(
        name="time-step-bias-missing",
        kinds=("ssm_dt",),
        change=_no_bias,
        what="the time step's bias is not added",
        symptom="wrong from position 0 on",
        fix="dt = softplus(projection + ssm_dt.bias)",
        seen="biases that only some of a model's projections have",
    ),
    Fault(
        name="decay-missing",
        kinds=("gate",),
        change=_no_decay,
        what="the decay is not multiplied by A = −exp(A_log)",
        symptom="right at position 0, then wrong",
        fix="multiply softplus(dt) by ssm_a, which GGUF stores as −exp(A_log)",
        seen="exp applied a second time, or never",
    ),
    Fault(
        name="decay-form",
        kinds=("gate", "SSM_SCAN"),
        change=_decay,
        what="the decay A is {a}",
        symptom="right at position 0, then wrong, or growing without bound",
        fix="use ssm_a as it is: GGUF stores −exp(A_log)",
        seen="exp applied a second time; A_log stored as it is; the sign lost",
        parameters={"a": tuple(_DECAYS)},
    ),
    Fault(
        name="skip-missing",
        kinds=("add", "mamba2_y_add_d"),
        change=_no_skip,
        what="D · x is not added to the scan's result",
        symptom="wrong from position 0 on",
        fix="y + ssm_d · x",
        seen="scan kernels without the skip connection",
    ),
    Fault(
        name="convolution-bias-missing",
        kinds=("ssm_conv1d",),
        change=_no_bias,
        what="the convolution's bias is not added",
        symptom="wrong from position 0 on",
        fix="add ssm_conv1d.bias before SiLU",
        seen="kernels for models without the bias",
    ),
    Fault(
        name="scan-b-and-c-exchanged",
        kinds=("SSM_SCAN",),
        change=_exchanged,
        what="the scan's B and C are exchanged",
        symptom="position 0 is right, later ones are wrong",
        fix="the state takes up dt · B · x and gives out C · state; the projection holds x, B, C in this order",
        seen="projections split in another order",
    ),
    Fault(
        name="conv-gates-exchanged",
        kinds=("mul", "mul.2"),
        change=_conv_gates,
        what="a short convolution's C is exchanged with {with}",
        symptom="wrong from position 0 on, or from 1 on",
        fix="split the projection into B, C, x, in this order: C · conv(B · x)",
        seen="ports of LFM2 that name the parts in another order",
        parameters={"with": ("B", "x")},
    ),
    Fault(
        name="gate-after-norm",
        kinds=("ssm_norm",),
        change=_gate_after_norm,
        what="the gate is applied after the norm: norm(y) · silu(z)",
        symptom="wrong from position 0 on, of plausible size",
        fix="norm(y · silu(z)), in groups: Mamba-2's norm_before_gate is false",
        seen="RMSNormGated of other models (norm_before_gate = true), taken over",
    ),
)
