"""Faults of recurrent layers: convolutions, decays, gates, the state from pass to pass."""

from collections.abc import Callable

import numpy as np
from msgspec.structs import replace

from .. import ops
from ..backend import Array
from ..graph import Altered, Step
from ..inapplicable import NotApplicable
from .base import Fault, Parameters, Steps, read_of
from .edits import WithInput, ggml, integer, left_out, only, require

_CONVOLUTIONS = ("ssm_conv", "conv.conv", "conv_output_raw")
_SOFTPLUS = 15  # enum ggml_unary_op


def _tap(step: Step, _right: Steps, parameters: Parameters) -> Step:
    """The step with its last input, the taps [channels, taps], in another order."""
    by = parameters["by"]

    def moved(taps: Array) -> Array:
        return taps[..., ::-1] if by == 0 else np.roll(taps, by, axis=-1)

    return replace(require(step, "SSM_CONV"), op=WithInput(step.op, -1, moved))


def _no_softplus(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    require(step, "UNARY")
    if integer(step, 0) != _SOFTPLUS:
        raise NotApplicable(f"{step.makes} is not a softplus")
    return left_out(step)


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


FAULTS = (
    Fault(
        name="convolution-taps",
        kinds=_CONVOLUTIONS,
        change=_tap,
        what="the convolution's taps are in the wrong order ({by} places on; 0: back to front)",
        symptom="wrong from position 0 on, of plausible size",
        fix="the last tap belongs to the position itself",
        seen="kernels stored in reverse order; a state that is one position late",
        parameters={"by": (1, -1, 0)},
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
        kinds=("add",),
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
)
