"""Faults of attention's sinks: one score for each head that is in the softmax's sum and takes no value."""

from collections.abc import Callable, Mapping
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from .. import ops
from ..backend import Array, module_of
from ..graph import Altered, Step, WeightSource
from ..inapplicable import NotApplicable
from .base import Fault, Parameters, Steps, parameter_of, sibling

_SOFT = ("kq_soft_max",)


def _zero(source: WeightSource, name: str) -> Array:
    return source.get(name) * 0


def _one_more(scores: Array, positions: Array, key_positions: Array, **params: Any) -> Array:
    """exp(x) / (1 + Σ exp(x)): [H, T, S] -> [H, T, S]."""
    sinks = module_of(scores).zeros(scores.shape[0], scores.dtype)
    return ops.causal_soft_max(scores, positions, key_positions, sinks, **params)


def _plus_one(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    if step.op is not ops.causal_soft_max or step.weights:
        raise NotApplicable(f"{step.makes} is no softmax without sinks")
    return replace(step, op=_one_more)


def _no_sinks(step: Step, _right: Steps, parameters: Parameters) -> Step:
    sinks = [weight for weight in step.weights if isinstance(weight, str)]
    if not sinks:
        return step
    if parameters["sinks"] != "left out":
        return replace(step, weights=(Altered(sinks[0], _zero),))
    if "operands" not in step.params:
        return replace(step, weights=())
    # Of ggml's own operation the sinks are an operand, which is left out as ggml leaves one out.
    operands = tuple(None if part is not None and part.index >= len(step.reads) else part for part in step.params["operands"])
    return replace(step, weights=(), params={**step.params, "operands": operands})


_Order = Callable[[int, int, int], int]  # whose sink a head has: of its number, how many heads there are, and key/value heads
_BY_KV_HEAD: Mapping[str, _Order] = {
    "head h % K, K key/value heads": lambda head, _heads, kv_heads: head % kv_heads,
    "head h // (H / K), its key/value head's number": lambda head, heads, kv_heads: head // (heads // kv_heads),
}
_ORDERS: Mapping[str, _Order] = {
    "the head before": lambda head, heads, _kv_heads: (head - 1) % heads,
    "the next head": lambda head, heads, _kv_heads: (head + 1) % heads,
    "the heads from the last one on": lambda head, heads, _kv_heads: heads - 1 - head,
    "head 0": lambda _head, _heads, _kv_heads: 0,
    **_BY_KV_HEAD,
}


class _OfOtherHeads(Struct, frozen=True):
    """Sinks [H] in another order."""

    order: str
    kv_heads: int

    def __call__(self, weights: WeightSource, name: str) -> Array:
        """[H]"""
        sinks, of = weights.get(name), _ORDERS[self.order]
        moved: Array = sinks[[of(head, len(sinks), self.kv_heads) for head in range(len(sinks))]]
        return moved


def _sinks_of_other_heads(step: Step, right: Steps, parameters: Parameters) -> Step:
    sinks = [weight for weight in step.weights if isinstance(weight, str)]
    if not sinks:
        raise NotApplicable(f"{step.makes} has no sinks")
    order = parameters["order"]
    kv_heads = int(parameter_of(sibling(step, right, "kq"), "kv_heads")) if order in _BY_KV_HEAD else 0
    return replace(step, weights=(Altered(sinks[0], _OfOtherHeads(order, kv_heads)),))


FAULTS = (
    Fault(
        name="sinks-missing",
        kinds=_SOFT,
        change=_no_sinks,
        what="attention's sinks are {sinks}",
        symptom="wrong from position 0 on, attention too strong",
        fix="add one score per head (attn_sinks) to the softmax and drop its weight",
        seen="Llama code that loads gpt-oss; a buffer of sinks that was never filled",
        parameters={"sinks": ("left out", "zero")},
    ),
    Fault(
        name="sinks-order",
        kinds=_SOFT,
        change=_sinks_of_other_heads,
        what="each head has the sink of {order}",
        symptom="wrong from position 0 on, attention too strong in some heads and too weak in others",
        fix="attn_sinks has one number for each query head, in the order of the heads",
        seen="sinks indexed by the key/value head; kernels that go through the heads group by group, or begin at another head",
        parameters={"order": tuple(_ORDERS)},
    ),
    Fault(
        name="softmax-plus-one",
        kinds=_SOFT,
        change=_plus_one,
        what="the softmax has 1 more in its denominator, or a sink of 0",
        symptom="wrong from position 0 on, attention too weak",
        fix="weights of a row sum to 1: add sinks only where the file has them",
        seen='"attention is off by one" experiments; sinks of gpt-oss left at 0 for models that have none',
    ),
)
