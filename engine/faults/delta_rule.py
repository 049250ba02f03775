"""Faults of the gated delta rule: its gate, its β, and the norms of queries and keys."""

from collections.abc import Callable

import numpy as np
from msgspec.structs import replace

from ..backend import Array, module_of
from ..graph import Step, name_of
from ..inapplicable import NotApplicable
from .base import Fault, Parameters, Steps, read_of
from .edits import WithInput, ggml, integer, left_out, require

_QUERIES, _KEYS, _GATE, _BETA = 0, 1, 3, 4  # GGML_OP_GATED_DELTA_NET's operands
_SIGMOID = 7  # GGML_UNARY_OP_SIGMOID
_RULE = ("GATED_DELTA_NET",)


def _changed(step: Step, place: int, change: Callable[[Array], Array]) -> Step:
    operand = require(step, *_RULE).params["operands"][place]
    return replace(step, op=WithInput(step.op, operand.index, change))


def _no_gate(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    return _changed(step, _GATE, lambda gate: gate * 0)


def _beta(step: Step, right: Steps, parameters: Parameters) -> Step:
    if parameters["beta"] == "1":
        return _changed(step, _BETA, lambda beta: module_of(beta).ones_like(beta))
    producer = right.get(name_of(read_of(step, _BETA)))
    if producer is None or not ggml(producer, "UNARY") or integer(producer, 0) != _SIGMOID:
        raise NotApplicable(f"{step.makes}: β is not a sigmoid")
    return _changed(step, _BETA, _before_sigmoid)


def _before_sigmoid(beta: Array) -> Array:
    """The argument of the sigmoid that β came from."""
    wide = beta.astype("float64")
    return module_of(beta).log(wide / (1 - wide)).astype(beta.dtype)


def _query_scale(step: Step, _right: Steps, parameters: Parameters) -> Step:
    power = {"not scaled": 0.5, "scaled twice": -0.5}[parameters["how"]]
    return _changed(step, _QUERIES, lambda queries: queries * np.float32(queries.shape[-1] ** power))


def _no_norm(step: Step, right: Steps, parameters: Parameters) -> Step:
    """No L2 norm, which ggml's graph writes as RMS_NORM and SCALE by 1/√d, or as L2_NORM: its steps pass on what they read."""
    rules = [other for other in right.values() if ggml(other, *_RULE)]
    places = {"queries": (_QUERIES,), "keys": (_KEYS,), "queries and keys": (_QUERIES, _KEYS)}[parameters["of"]]
    for rule in rules:
        for place in places:
            name = name_of(read_of(rule, place))
            while name in right and ggml(right[name], "REPEAT", "SCALE", "RMS_NORM", "L2_NORM"):
                if name == step.makes:
                    return step if ggml(step, "REPEAT") else left_out(step)
                name = name_of(read_of(right[name], 0))
    return step


FAULTS = (
    Fault(
        name="delta-gate-missing",
        kinds=_RULE,
        change=_no_gate,
        what="the state does not decay: the delta rule's gate is left out",
        symptom="right at position 0, then wrong",
        fix="state ← exp(gate) · state before each update",
        seen="DeltaNet code that loads Gated DeltaNet (Qwen3-Next, Qwen3.5, Kimi Linear)",
    ),
    Fault(
        name="delta-beta",
        kinds=_RULE,
        change=_beta,
        what="the delta rule's β is {beta}",
        symptom="wrong from position 0 on",
        fix="state += k ⊗ β · (v − state · k), β = sigmoid of its projection",
        seen="linear attention without a writing strength",
        parameters={"beta": ("1", "its projection without the sigmoid")},
    ),
    Fault(
        name="delta-norm-missing",
        kinds=("RMS_NORM", "SCALE", "L2_NORM"),
        change=_no_norm,
        what="{of} of the delta rule are not normalised to length 1",
        symptom="states of the wrong size, from position 0 on",
        fix="x / √(Σx² + ε) of each head's query and key, after the convolution",
        seen="kernels that expect the norm to be done, called by code that leaves it to them",
        parameters={"of": ("queries and keys", "queries", "keys")},
    ),
    Fault(
        name="delta-query-scale",
        kinds=_RULE,
        change=_query_scale,
        what="the delta rule's queries are {how} by 1/√(head size)",
        symptom="wrong from position 0 on by one factor, which the norm after it hides but for its epsilon",
        fix="q / √(head size) once, after the norm to length 1",
        seen="kernels that scale, called by code that scales as well, or neither",
        parameters={"how": ("not scaled", "scaled twice")},
    ),
)
