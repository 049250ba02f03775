"""Faults of the feed-forward network."""

from collections.abc import Callable

import numpy as np
from msgspec.structs import replace

from .. import ops
from ..backend import Array
from ..ggml_ops.activations import sigmoid
from ..ggml_ops.error_function import erf
from ..graph import Step
from ..inapplicable import NotApplicable
from .base import AT, Fault, Parameters, Steps, Values, kind_of, sibling, subsets

_GATED = ("ffn_swiglu", "GLU")  # the usual place, and wherever the operation is


def _gelu_exact(x: Array) -> Array:
    wide = x.astype(np.float64)
    return (0.5 * wide * (1.0 + erf(wide / np.sqrt(2.0)))).astype(np.float32)


def _gelu_tanh(x: Array) -> Array:
    wide = x.astype(np.float64)
    return (0.5 * wide * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (wide + 0.044715 * wide**3)))).astype(np.float32)


_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "GELU (tanh)": _gelu_tanh,
    "GELU (exact)": _gelu_exact,
    "GELU (quick)": lambda x: x * sigmoid(np.float32(1.702) * x),
    "ReLU": lambda x: np.maximum(x, np.float32(0)),
    "squared ReLU": lambda x: np.maximum(x, np.float32(0)) ** 2,
    "sigmoid": sigmoid,
    "tanh": np.tanh,
    "nothing": lambda x: x,
}


def _activated(gate: Array, up: Array, *, activation: str) -> Array:
    return _ACTIVATIONS[activation](gate) * up


def _gated(right: Steps) -> Values:
    """The kinds of a model's products of SiLU(gate) and up: those of feed-forwards together (shared experts' as well), then each
    alone, and each other, such as the gate of a scan's result."""
    kinds = tuple(dict.fromkeys(kind_of(step) for step in right.values() if step.op is ops.swiglu))
    usual = tuple(kind for kind in kinds if kind.startswith("ffn"))
    return (*(subsets(*usual) if usual else ()), *((kind,) for kind in kinds if kind not in usual)) or (_GATED[:1],)


def _silu_gated(step: Step) -> Step:
    """The step, if it is SiLU(gate) · up.

    Raises:
        NotApplicable: it is not, or another fault has already changed it.
    """
    if step.op is not ops.swiglu:
        raise NotApplicable(f"{step.makes} is no SiLU(gate) · up")
    return step


def _activation(step: Step, _right: Steps, parameters: Parameters) -> Step:
    return replace(_silu_gated(step), op=_activated, params={"activation": parameters["activation"]})


def _on_up(gate: Array, up: Array) -> Array:
    return ops.swiglu(up, gate)


def _on_product(gate: Array, up: Array) -> Array:
    product = gate * up
    return product * sigmoid(product)


def _gate_only(gate: Array, _up: Array) -> Array:
    return gate * sigmoid(gate)


def _up_only(_gate: Array, up: Array) -> Array:
    return up.copy()


def _up_activated(_gate: Array, up: Array) -> Array:
    return up * sigmoid(up)


def _summed(gate: Array, up: Array) -> Array:
    return gate * sigmoid(gate) + up


_OPERANDS = {"up": _on_up, "the product": _on_product}
_WITHOUT = {
    "SiLU(gate) alone": _gate_only,
    "up alone": _up_only,
    "SiLU(up) alone": _up_activated,
    "SiLU(gate) + up": _summed,
}


def _operand(step: Step, _right: Steps, parameters: Parameters) -> Step:
    if parameters["on"] == "up" and kind_of(step).startswith("ffn_moe"):
        raise NotApplicable(f"{step.makes}: experts whose gate and up are exchanged have an entry of their own")
    return replace(_silu_gated(step), op=_OPERANDS[parameters["on"]])


def _no_gate(step: Step, _right: Steps, parameters: Parameters) -> Step:
    return replace(_silu_gated(step), op=_WITHOUT[parameters["computes"]])


def _swap_gate_up(step: Step, right: Steps, _parameters: Parameters) -> Step:
    other = "ffn_up" if step.makes.rstrip("~").endswith("ffn_gate") else "ffn_gate"
    return replace(step, weights=sibling(step, right, other).weights)


FAULTS = (
    Fault(
        name="gate-up-swapped",
        kinds=("ffn_gate", "ffn_up"),
        change=_swap_gate_up,
        what="the weights of gate and up are exchanged",
        symptom="fluent nonsense from layer 0 on",
        fix="SiLU is applied to ffn_gate, and ffn_up multiplies it",
        seen="fused gate_up weights split in the wrong order",
    ),
    Fault(
        name="activation",
        kinds=_GATED,
        change=_activation,
        what="the activation of the gate is {activation}, not SiLU, in {at}",
        symptom="a difference of some percent from layer 0 on",
        fix="SiLU(x) = x / (1 + exp(-x))",
        seen="GPT-2's and Gemma's GELU carried over",
        parameters={"activation": tuple(_ACTIVATIONS), AT: _gated},
    ),
    Fault(
        name="activation-on-wrong-operand",
        kinds=_GATED,
        change=_operand,
        what="SiLU is applied to {on}, not to the gate, in {at}",
        symptom="fluent nonsense from layer 0 on",
        fix="SiLU(gate) · up",
        seen="kernels that take their two inputs in the other order",
        parameters={"on": tuple(_OPERANDS), AT: _gated},
    ),
    Fault(
        name="no-gate",
        kinds=_GATED,
        change=_no_gate,
        what="{computes} is computed instead of SiLU(gate) · up, in {at}",
        symptom="wrong from the first layer on that has it",
        fix="SiLU(gate) · up",
        seen="feed-forwards written for GPT-2",
        parameters={"computes": tuple(_WITHOUT), AT: _gated},
    ),
)
