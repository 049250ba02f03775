"""Faults of the gated delta rule: its gate, its β, and the norms of queries and keys."""

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from ..backend import Array, module_of
from ..ggml_ops.params import OpParams
from ..graph import Step, name_of
from ..inapplicable import NotApplicable
from ..lift.node import GgmlOperation
from .base import Fault, Parameters, Steps, layer_near, read_of
from .edits import SIGMOID, Then, WithInput, ggml, integer, left_out, require
from .index import of_operation

_QUERIES, _KEYS, _VALUES, _GATE, _BETA = range(5)  # GGML_OP_GATED_DELTA_NET's operands
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
    if producer is None or not ggml(producer, "UNARY") or integer(producer, 0) != SIGMOID:
        raise NotApplicable(f"{step.makes}: β is not a sigmoid")
    return _changed(step, _BETA, _before_sigmoid)


def _before_sigmoid(beta: Array) -> Array:
    """The argument of the sigmoid that β came from."""
    wide = beta.astype("float64")
    return module_of(beta).log(wide / (1 - wide)).astype(beta.dtype)


def _heads(step: Step, place: int) -> tuple[int, int]:
    """How many heads an operand of the delta rule has, and their size: the value that is handed over may be flat."""
    shape = require(step, *_RULE).params["operands"][place].shape
    return int(shape[-2].fixed), int(shape[-1].fixed)


def _some_values(step: Step, _right: Steps, parameters: Parameters) -> Step:
    kept, of = {"half": 2, "quarter": 4}[parameters["part"]], parameters["heads"]
    count, size = _heads(step, _VALUES)
    if count % kept:
        raise NotApplicable(f"{step.makes}: {count} value heads are no multiple of {kept}")

    def left(given: Array) -> Array:
        """Any shape that holds [..., H, d]."""
        values = given.copy().reshape(-1, count, size)
        for head in range(count):
            if head >= count // kept if of == "first" else head % kept:
                values[:, head] = 0
        return values.reshape(given.shape)

    return _changed(step, _VALUES, left)


def _query_scale(step: Step, _right: Steps, parameters: Parameters) -> Step:
    power = {"not scaled": 0.5, "scaled twice": -0.5}[parameters["how"]]
    factor = np.float32(_heads(step, _QUERIES)[1] ** power)
    return _changed(step, _QUERIES, lambda queries: queries * factor)


def _no_norm(step: Step, right: Steps, parameters: Parameters) -> Step:
    """No L2 norm, which ggml's graph writes as RMS_NORM and SCALE by 1/√d, or as L2_NORM: its steps pass on what they read."""
    rules = of_operation(right, *_RULE)
    places = {"queries": (_QUERIES,), "keys": (_KEYS,), "queries and keys": (_QUERIES, _KEYS)}[parameters["of"]]
    for rule in rules:
        for place in places:
            name = name_of(read_of(rule, place))
            while name in right and ggml(right[name], "REPEAT", "SCALE", "RMS_NORM", "L2_NORM"):
                if name == step.makes:
                    return step if ggml(step, "REPEAT") else left_out(step)
                name = name_of(read_of(right[name], 0))
    return step


class _OtherOrder(Struct, frozen=True):
    """Heads that repeat in turn, each repeated one after the other, or the other way round."""

    heads: int
    size: int

    def __call__(self, repeated: Array) -> Array:
        """Any shape that holds [..., H, d]."""
        xp, split = module_of(repeated), repeated.reshape(-1, self.heads, self.size)
        for count in (count for count in range(2, self.heads) if self.heads % count == 0):
            each = self.heads // count
            if bool((split[:, count:] == split[:, :-count]).all()):
                return xp.repeat(split[:, :count], each, axis=1).reshape(repeated.shape)
            in_groups = split.reshape(-1, count, each, self.size)
            if bool((in_groups == in_groups[:, :, :1]).all()):
                return xp.tile(in_groups[:, :, 0], (1, each, 1)).reshape(repeated.shape)
        raise NotApplicable("no heads repeat")


class _EachRepeated(GgmlOperation, frozen=True):
    """The delta rule with fewer key than value heads, each repeated one after the other where ggml repeats them in turn."""

    def compute(self, *arguments: Any, params: OpParams, shape: tuple[int, ...]) -> Array:
        """The rule in ggml's four dimensions."""
        queries, keys, values, *rest = arguments
        each = values.shape[2] // keys.shape[2]
        repeated = (np.repeat(vector, each, axis=2) for vector in (queries, keys))
        return super().compute(*repeated, values, *rest, params=params, shape=shape)


def _other_repetition(step: Step, right: Steps, _parameters: Parameters) -> Step:
    if ggml(step, *_RULE):
        keys, values = (_heads(step, place)[0] for place in (_KEYS, _VALUES))
        return step if keys in (1, values) else replace(step, op=_EachRepeated(_RULE[0]))
    rules = of_operation(right, *_RULE)
    read = {name_of(read_of(rule, place)) for rule in rules for place in (_QUERIES, _KEYS)}
    if step.makes not in read:
        return step
    *heads, size = (int(side.fixed) for side in step.params["shape"] if side.fixed)
    return replace(step, op=Then(step.op, _OtherOrder(prod(heads), size)))


def _projection(rule: Step, place: int, right: Steps) -> Step | None:
    """The step that makes what the rule's gate or β is a function of: a projection, or a part of one."""
    step = right.get(name_of(read_of(rule, place)))
    while step is not None and ggml(step, "MUL", "ADD", "UNARY"):
        step = right.get(name_of(read_of(step, 0)))
    return step


def _projections(step: Step, right: Steps, _parameters: Parameters) -> Step:
    """The gate made from β's projection, and β from the gate's."""
    layer = layer_near(step)
    for rule in of_operation(right, *_RULE):
        if layer is None or layer_near(rule) != layer:
            continue
        gate, beta = (_projection(rule, place, right) for place in (_GATE, _BETA))
        if gate is None or beta is None or step not in (gate, beta):
            continue
        if gate.op != beta.op or gate.params.keys() != beta.params.keys() or any(gate.weights[1:]) or any(beta.weights[1:]):
            raise NotApplicable(f"{step.makes}: gate and β are projected otherwise")
        other = beta if step is gate else gate
        return replace(step, reads=other.reads, weights=other.weights)
    return step


FAULTS = (
    Fault(
        name="delta-heads-repeated",
        kinds=("REPEAT", *_RULE),
        change=_other_repetition,
        what="the delta rule's queries and keys are repeated in turn where each is repeated by itself, or the other way round",
        symptom="wrong from position 0 on in models with fewer key than value heads",
        fix="value head h reads key head h // (H / H') of Qwen3-Next, and h % H' where the converter has put value heads so",
        seen="repeat for repeat_interleave, and the other way round",
    ),
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
        name="delta-projections-exchanged",
        kinds=("MUL_MAT", "CONT"),
        change=_projections,
        what="the projections of the delta rule's gate and β are exchanged",
        symptom="wrong from position 0 on, of plausible size",
        fix="gate = softplus(alpha + dt bias) · A, β = sigmoid(beta); a fused projection holds β first, then alpha",
        seen="b and a of in_proj_ba read in the other order",
    ),
    Fault(
        name="delta-value-heads",
        kinds=_RULE,
        change=_some_values,
        what="a {part} of the delta rule's value heads are computed, the {heads}; the others stay 0",
        symptom="wrong from position 0 on in models with more value than key heads",
        fix="loop over the value heads; value head h reads the key head that it belongs to",
        seen="loops over as many heads as there are keys",
        parameters={"part": ("half", "quarter"), "heads": ("first", "one of each key head")},
        says={"first": "first ones", "one of each key head": "first of each key head"},
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
