"""Fitted numbers that are wrong only in a part: in one head, one expert, attention's sinks, one position, or from a position on."""

from collections.abc import Callable
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from .. import ops
from ..backend import Array, module_of
from ..graph import POSITIONS, Altered, Step, WeightSource
from ..inapplicable import NotApplicable
from .base import AT, Change, Fault, Parameters, Steps, Values, kind_of, sibling
from .edits import HandsOn, ggml
from .fitted import Fitted, without_a_right_value
from .rotation import ROTATED, at_positions, both_then_each

_FAR = 16  # positions by which a rotation may be off from a position on
_MOST = 64  # parts of one kind that are tried: each is some three passes up to the first place


class _OfHead(HandsOn, frozen=True):
    """A product [T, heads · n] of which one head's columns are multiplied by a number, before the bias is added."""

    head: int
    heads: int
    by: float

    def __call__(self, *inputs: Any, **params: Any) -> Array:
        biased = self.op is ops.linear and len(inputs) > 2 and inputs[2] is not None
        value = self.op(*inputs[:2], None, **params) if biased else self.op(*inputs, **params)
        size = value.shape[1] // self.heads
        part = slice(self.head * size, (self.head + 1) * size)
        changed = module_of(value).array(value, copy=True)
        changed[:, part] *= changed.dtype.type(self.by)
        return changed + inputs[2] if biased else changed


def _heads_of(step: Step, right: Steps) -> int:
    """How many heads the rows of a step have: those of keys and values, or of queries.

    Raises:
        NotApplicable: the scores of the step's layer are computed by another operation.
    """
    scores = sibling(step, right, "kq")
    if scores.op is not ops.attention_scores:
        raise NotApplicable(f"{scores.makes} does not say how many heads there are")
    return int(scores.params["kv_heads" if kind_of(step) in ("k", "v") else "heads"])


def _one_head(step: Step, right: Steps, parameters: Parameters) -> Step:
    heads, head = _heads_of(step, right), parameters["head"]
    if head >= heads:
        raise NotApplicable(f"{step.makes} has only {heads} heads")
    return replace(step, op=_OfHead(step.op, head, heads, parameters["by"]))


def _heads(right: Steps) -> Values:
    most = max((int(step.params["heads"]) for step in right.values() if step.op is ops.attention_scores), default=0)
    return tuple(range(most)) if 1 < most <= _MOST else ()


class _OfExpert(HandsOn, frozen=True):
    """The product with the chosen experts' matrices [T, used · n], of which one expert's part is multiplied by a number."""

    expert: int
    by: float

    def __call__(self, x: Array, chosen: Array, *weights: Any, **params: Any) -> Array:
        value = self.op(x, chosen, *weights, **params)
        xp, rows = module_of(value), chosen.reshape(-1, chosen.shape[-1])
        factors = xp.where(rows == self.expert, value.dtype.type(self.by), value.dtype.type(1))
        changed: Array = (value.reshape(*rows.shape, -1) * factors[:, :, None]).reshape(value.shape)
        return changed


def _one_expert(step: Step, _right: Steps, parameters: Parameters) -> Step:
    if not ggml(step, "MUL_MAT_ID"):
        raise NotApplicable(f"{step.makes} is no product with chosen experts")
    return replace(step, op=_OfExpert(step.op, parameters["expert"], parameters["by"]))


def _experts(right: Steps) -> Values:
    sizes = [
        step.params["result_shape"][-1].fixed
        for step in right.values()
        if kind_of(step) == "ffn_moe_probs" and "result_shape" in step.params
    ]
    return tuple(range(max(sizes))) if sizes and max(sizes) <= _MOST else ()


class OtherNumbers(Struct, frozen=True):
    """A weight that is multiplied by a number, or to which it is added."""

    by: float
    how: str

    def __call__(self, weights: WeightSource, name: str) -> Array:
        """The changed weight."""
        weight = weights.get(name)
        number = weight.dtype.type(self.by)
        changed: Array = weight * number if self.how == "times" else weight + number
        return changed


def _sinks(how: str) -> Change:
    def change(step: Step, _right: Steps, parameters: Parameters) -> Step:
        names = [weight for weight in step.weights if isinstance(weight, str)]
        if len(names) != 1:
            raise NotApplicable(f"{step.makes} has no sinks")
        return replace(step, weights=(Altered(names[0], OtherNumbers(parameters["by"], how)),))

    return change


class _OfRow(Struct, frozen=True):
    """An operation whose result at one position is multiplied by a number; after its operands it reads the positions."""

    op: Callable[..., Array]
    reads: int
    position: int
    by: float

    def __call__(self, *inputs: Any, **params: Any) -> Array:
        value = self.op(*inputs[: self.reads], *inputs[self.reads + 1 :], **params)
        here = inputs[self.reads] == self.position
        changed = module_of(value).array(value, copy=True)
        changed[here] *= changed.dtype.type(self.by)
        return changed


def _one_row(step: Step, _right: Steps, parameters: Parameters) -> Step:
    if step.axis != 0:
        raise NotApplicable(f"{step.makes} has no row for each position")
    op = _OfRow(step.op, len(step.reads), parameters["position"], parameters["by"])
    return replace(step, op=op, reads=(*step.reads, POSITIONS))


def _new(
    name: str, change: Change, what: str, where: dict[str, Any], *texts: str, starts: tuple[float, ...] = (1.01, 0.0)
) -> Fitted:
    kinds = tuple(dict.fromkeys(kind for chosen in where[AT] for kind in chosen))
    return without_a_right_value(name, kinds, change, what, {"by": (), **where}, *texts, starts=starts)


def _each(*kinds: str) -> tuple[tuple[str, ...], ...]:
    return tuple((kind,) for kind in kinds)


def _from_a_position(step: Step, _right: Steps, parameters: Parameters) -> Step:
    first, by = parameters["first"], int(parameters["by"])
    return at_positions(step, lambda positions: positions + (positions >= first) * by)


_POSITION = Fault(
    name="rope-position-from",
    kinds=ROTATED,
    change=_from_a_position,
    what="from position {first} on, RoPE's positions are off by {by}, on {at}",
    symptom="right up to a position, then wrong",
    fix="position t of the sequence, from 0, for queries and keys alike, in every chunk and in decode",
    seen="chunks and decode steps that count padding, or begin at another number",
    parameters={"by": (), "first": (1,), AT: both_then_each},
    group="fitted",
)
FITTED = (
    Fitted(
        fault=_POSITION,
        parameter="by",
        wanted=lambda *_: None,
        starts=lambda _wanted: tuple(float(n) for n in range(-_FAR, _FAR + 1) if n),
        positive=False,
        whole=True,
        of_row="first",
    ),
    _new(
        "head-multiplier",
        _one_head,
        "the weights of head {head} in {at} are {by} times as large as in this model",
        {"head": _heads, AT: _each("kqv_out", "q", "k", "v")},
        "one head's values are wrong, and what attention makes of them",
        "compare the rows (attn_q, attn_k, attn_v) or columns (attn_output) of this head with the file's",
        "kernels that dequantise a head's first block with another scale; a head that is pruned or left out",
    ),
    _new(
        "expert-multiplier",
        _one_expert,
        "the weights of expert {expert} in {at} are {by} times as large as in this model",
        {"expert": _experts, AT: _each("ffn_moe_down", "ffn_moe_up", "ffn_moe_gate")},
        "only positions that choose this expert are wrong",
        "compare this expert's matrix (ffn_*_exps.weight, the third dimension) with the file's",
        "stacks of experts of which one is read at a wrong offset or with another scale",
    ),
    _new(
        "sinks-multiplier",
        _sinks("times"),
        "attention's sinks are {by} times as large as in this model",
        {AT: _each("kq_soft_max")},
        "attention's weights are all too small or too large by one factor",
        "attn_sinks are scores like the others: neither scaled nor rotated",
        "sinks that are multiplied by the attention's scale",
    ),
    _new(
        "sinks-offset",
        _sinks("plus"),
        "{by} is added to attention's sinks",
        {AT: _each("kq_soft_max")},
        "attention's weights are all too small or too large by one factor",
        "one sink a head, whose exponential is added once to the sum",
        "a sink for each of several keys; sinks that count more than once",
        starts=(0.01,),
    ),
    replace(
        _new(
            "row-multiplier",
            _one_row,
            "the row of position {position} in {at} is {by} times as large as in this model",
            {"position": (1,), AT: _each("q", "k", "v", "kqv_out", "attn_out", "ffn_gate", "ffn_up", "ffn_out")},
            "right up to a position; later ones are wrong where they attend to it",
            "ask whether this row is written, and once: a tile's last rows, rows that two blocks add up",
            "tiles whose last rows are not computed; sums with atomic additions over an uncleared buffer",
            starts=(0.0, 2.0),
        ),
        whole=True,  # a number that is fitted to one row would fit a lower arithmetic's noise in it
        of_row="position",
    ),
)
