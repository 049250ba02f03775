"""Faults of the gated delta rule: its gate, its β, and the norms of queries and keys."""

from collections.abc import Callable
from math import prod

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from ..backend import Array, module_of
from ..graph import Step, name_of
from ..inapplicable import NotApplicable
from .base import Fault, Parameters, Steps, read_of
from .edits import Then, WithInput, ggml, integer, left_out, require
from .index import of_operation

_QUERIES, _KEYS, _VALUES, _GATE, _BETA = range(5)  # GGML_OP_GATED_DELTA_NET's operands
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


def _some_values(step: Step, _right: Steps, parameters: Parameters) -> Step:
    kept, of = {"half": 2, "quarter": 4}[parameters["part"]], parameters["heads"]

    def left(values: Array) -> Array:
        """[..., H, d]"""
        count = values.shape[-2]
        if count % kept:
            raise NotApplicable(f"{step.makes}: {count} value heads are no multiple of {kept}")
        values = values.copy()
        for head in range(count):
            if head >= count // kept if of == "first" else head % kept:
                values[..., head, :] = 0
        return values

    return _changed(step, _VALUES, left)


def _query_scale(step: Step, _right: Steps, parameters: Parameters) -> Step:
    power = {"not scaled": 0.5, "scaled twice": -0.5}[parameters["how"]]
    return _changed(step, _QUERIES, lambda queries: queries * np.float32(queries.shape[-1] ** power))


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


def _other_repetition(step: Step, right: Steps, _parameters: Parameters) -> Step:
    rules = of_operation(right, *_RULE)
    read = {name_of(read_of(rule, place)) for rule in rules for place in (_QUERIES, _KEYS)}
    if step.makes not in read:
        return step
    *heads, size = (int(side.fixed) for side in step.params["shape"] if side.fixed)
    return replace(step, op=Then(step.op, _OtherOrder(prod(heads), size)))


FAULTS = (
    Fault(
        name="delta-heads-repeated",
        kinds=("REPEAT",),
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
