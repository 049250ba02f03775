"""Attention with another number of heads than the model's: as wide together, each wider or narrower."""

from collections.abc import Callable
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from .. import ops
from ..backend import Array
from ..graph import Step
from ..inapplicable import NotApplicable
from .base import Fault, Parameters, Steps, kind_of, parameter_of, read_of, sibling, with_parameters

_ROTATED = ("q_rope", "k_rope")


class _Attention(Struct, frozen=True):
    """Scores, softmax and values with other numbers of heads."""

    heads: int
    kv_heads: int
    soft_max: Callable[..., Array]

    def __call__(self, q: Array, k: Array, v: Array, *inputs: Array, **params: Any) -> Array:
        """[T, H · d], [S, K · d], [S, K · d] -> [T, H · d]."""
        scores = ops.attention_scores(q, k, heads=self.heads, kv_heads=self.kv_heads)
        return ops.weighted_values(self.soft_max(scores, *inputs, **params), v, kv_heads=self.kv_heads)


def _times(count: int, by: float) -> int:
    if count * by != int(count * by):
        raise NotApplicable(f"{count} heads cannot be halved")
    return int(count * by)


def _rotated(x: Array, positions: Array, factors: Array | None, *, heads: int, dims: int, **params: Any) -> Array:
    if dims > x.shape[1] // heads:
        raise NotApplicable(f"a head has no {dims} dimensions")
    return ops.rope(x, positions, factors, heads=heads, dims=dims, **params)


def _other_count(step: Step, right: Steps, parameters: Parameters) -> Step:
    by = _BY[parameters["heads"]]
    if step.op is ops.rope:
        dims, whole = int(step.params["dims"]), parameters["rotated"] == _SCALED
        if (whole and dims % (2 * by)) or dims % 2:
            raise NotApplicable(f"{step.makes} cannot rotate a part of {dims} dimensions")
        changed = with_parameters(step, heads=_times(step.params["heads"], by), dims=int(dims / by) if whole else dims)
        return replace(changed, op=_rotated)
    if kind_of(step) in _ROTATED:
        raise NotApplicable(f"{step.makes} is no plain RoPE")
    scores, soft_max = sibling(step, right, "kq"), sibling(step, right, "kq_soft_max")
    plain = (scores.op, soft_max.op, step.op) == (ops.attention_scores, ops.causal_soft_max, ops.weighted_values)
    if not plain or soft_max.weights or soft_max.params.get("max_bias"):
        raise NotApplicable(f"{step.makes} is no plain attention")
    heads, kv_heads = (_times(int(parameter_of(scores, name)), by) for name in ("heads", "kv_heads"))
    params = {**soft_max.params, "scale": float(soft_max.params["scale"]) * by**0.5}
    reads = (*scores.reads, read_of(step, 1), *soft_max.reads[1:])
    return replace(step, op=_Attention(heads, kv_heads, soft_max.op), reads=reads, params=params)


_BY = {"half as many": 0.5, "twice as many": 2.0}
_KEPT, _SCALED = "as many dimensions of each as in this model", "as large a part of each as in this model"

FAULTS = (
    Fault(
        name="head-count",
        kinds=(*_ROTATED, "kqv_out"),
        change=_other_count,
        what="attention has {heads} heads, for queries, keys and values; RoPE rotates {rotated}",
        symptom="wrong from position 1 on; with fewer key/value heads than heads from position 0 on",
        fix="read <architecture>.attention.head_count, head_count_kv and key_length from the file",
        seen="a head size that is taken for granted (128, 64); head counts of a sibling of the model",
        parameters={"heads": tuple(_BY), "rotated": (_SCALED, _KEPT)},
    ),
)
