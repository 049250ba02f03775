"""Fitted numbers inside an operation: of its bias, of a term of a sum, of a decay in a scan, of a softmax's denominator."""

from collections.abc import Callable

from msgspec import Struct
from msgspec.structs import replace

from .. import ops
from ..backend import Array
from ..graph import Altered, Step
from ..inapplicable import NotApplicable
from .base import AT, Parameters, Steps, Values, kind_of
from .edits import Then, WithInput, ggml
from .fitted import without_a_right_value
from .parts import OtherNumbers

_QKV = ("q", "k", "v")
_NONE = (("no such step",),)
_DECAYS = ("ssm_a",)


class _Times(Struct, frozen=True):
    """A value that is multiplied by a number."""

    by: float

    def __call__(self, value: Array) -> Array:
        """The product."""
        changed: Array = value * value.dtype.type(self.by)
        return changed


def _bias_of(step: Step) -> int | None:
    """Which of a step's weights is its bias; None if it has none."""
    number = 0 if ggml(step, "ADD_ID", "ADD") else 1 if step.op in (ops.linear, ops.layer_norm) else None
    known = number is not None and number < len(step.weights) and isinstance(step.weights[number], str)
    return number if known else None


def _bias(step: Step, _right: Steps, parameters: Parameters) -> Step:
    number = _bias_of(step)
    if number is None:
        return step
    changed = Altered(str(step.weights[number]), OtherNumbers(parameters["by"], "times"))
    return replace(step, weights=(*step.weights[:number], changed, *step.weights[number + 1 :]))


def _groups(right: Steps, wanted: Callable[[Step], bool], *together: tuple[str, ...]) -> Values:
    """The kinds of the steps that are wanted: groups that occur, all together, each alone."""
    kinds = tuple(dict.fromkeys(kind_of(step) for step in right.values() if not step.inner and wanted(step)))
    groups = (*(tuple(kind for kind in group if kind in kinds) for group in together), kinds, *((kind,) for kind in kinds))
    return tuple(dict.fromkeys(group for group in groups if group)) or _NONE


def _biased(right: Steps) -> Values:
    return _groups(right, lambda step: _bias_of(step) is not None, _QKV)


_TERMS = ("second", "first")


def _is_sum(step: Step) -> bool:
    return step.op is ops.add and len(step.reads) == 2 and all(isinstance(read, str) for read in step.reads)


def _term(step: Step, _right: Steps, parameters: Parameters) -> Step:
    if not _is_sum(step):
        return step
    return replace(step, op=WithInput(step.op, 1 - _TERMS.index(parameters["term"]), _Times(parameters["by"])))


def _decay(step: Step, _right: Steps, parameters: Parameters) -> Step:
    """The step with another factor of A."""
    weights = tuple(
        Altered(weight, OtherNumbers(parameters["by"], "times"))
        if isinstance(weight, str) and weight.endswith(_DECAYS)
        else weight
        for weight in step.weights
    )
    return replace(step, weights=weights)


def _decaying(right: Steps) -> Values:
    operations = ("SSM_SCAN", "MUL")
    scans = [
        name
        for name in operations
        if any(ggml(step, name) and _decay(step, right, {"by": 2.0}) != step for step in right.values())
    ]
    return tuple((name,) for name in scans) or _NONE


class _WithMore(Struct, frozen=True):
    """Weights of a softmax [H, T, S] whose sum has a number more: after the largest score is subtracted, its own share of the sum is 1."""

    more: float

    def __call__(self, weights: Array) -> Array:
        """[H, T, S] -> [H, T, S]."""
        changed: Array = weights / (1 + weights.dtype.type(self.more) * weights.max(axis=-1, keepdims=True))
        return changed


def _denominator(step: Step, _right: Steps, parameters: Parameters) -> Step:
    if step.op is not ops.causal_soft_max or step.weights:
        raise NotApplicable(f"{step.makes} is no softmax without sinks")
    return replace(step, op=Then(step.op, _WithMore(parameters["more"])))


FITTED = (
    without_a_right_value(
        "bias-multiplier", ("MUL_MAT", "ADD", "ADD_ID", "NORM", *_QKV), _bias,
        "the bias of {at} is {by} times as large as in this model", {"by": (), AT: _biased},
        "wrong from the first layer and position on, by the same vector everywhere",
        "add the bias as it is in the file", "a bias that is scaled with the product, or twice by a residual multiplier",
        starts=(1.01,),
    ),
    without_a_right_value(
        "term-multiplier", ("SUM",), _term,
        "the {term} term of {at} is multiplied by {by}, which this model does not do",
        {"by": (), "term": _TERMS, AT: lambda right: _groups(right, _is_sum)[1:] or _NONE},
        "what is added is right, the sum is not", "add both terms as they are",
        "the routed experts' scale on the shared expert too; residual multipliers of Granite or MiniCPM",
        starts=(1.01, 2.0),
    ),
    without_a_right_value(
        "decay-multiplier", ("SSM_SCAN", "MUL"), _decay,
        "the decay A is {by} times as large as in this model, in {at}", {"by": (), AT: _decaying},
        "right at position 0, then wrong by little", "use ssm_a as it is in the file", "decays kept in a lower type; a factor of log 2",
        starts=(1.01,),
    ),
    without_a_right_value(
        "softmax-denominator", ("kq_soft_max",), _denominator,
        "{more} is added to the softmax's sum, after the largest score is subtracted", {"more": ()},
        "attention a little too weak, also at position 0", "divide by the sum alone",
        "constants against a division by zero; normalisations of other attention kernels",
        starts=(1e-3,), positive=True,
    ),
)  # fmt: skip
