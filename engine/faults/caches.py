"""Faults of the cache and of how attention sees it: another layer's rows, heads left at zero, caps in the wrong place."""

from math import exp

from msgspec.structs import replace

from .. import ops
from ..backend import Array, module_of
from ..graph import History, Step, name_of
from ..inapplicable import NotApplicable
from .base import AT, Fault, Parameters, Steps, kind_of, layer_of, parameter_of, read_of, sibling, subsets
from .edits import maker, number, require
from .windows import cap_of, soft_capped

_READS = ("k_read", "v_read")
_SOFT = ("kq_soft_max",)
_SEEN_BELOW = 16.0  # exp(−16) = 1e-7 is float32's rounding: with a larger cap a masked key's weight cannot be seen


def _plain_read(step: Step) -> Step:
    if step.op is not ops.cached or not isinstance(read_of(step, 0), History):
        raise NotApplicable(f"{step.makes} is not a plain read of the cache")
    return step


def _of_other_layer(step: Step, right: Steps, parameters: Parameters) -> Step:
    """The rows of an earlier layer whose cache has the same kind and width; the first such layer keeps its own."""
    kind, layer = kind_of(_plain_read(step)), layer_of(step)
    earlier = [other for other in range(layer) if f"blk.{other}.{kind}" in right]
    if not earlier:
        return step
    other = right[f"blk.{earlier[0] if parameters['layer'] == 'the first' else earlier[-1]}.{kind}"]
    return replace(step, op=_same_width, reads=(*step.reads, *_plain_read(other).reads))


def _same_width(own: Array, other: Array) -> Array:
    if own.shape != other.shape:
        raise NotApplicable("the layers' caches are of different widths")
    return ops.cached(other)


_HEADS = {
    "the last head": lambda heads: range(heads - 1, heads),
    "the second half of the heads": lambda heads: range(heads // 2, heads),
    "every head but the first": lambda heads: range(1, heads),
}


def _zeroed(history: Array, *, kv_heads: int, heads: str) -> Array:
    """Cache rows [S, K · d] in which some heads are zero."""
    rows = ops.cached(history).reshape(history.shape[0], kv_heads, -1).copy()
    rows[:, list(_HEADS[heads](kv_heads))] = 0
    zeroed: Array = rows.reshape(history.shape[0], -1)
    return zeroed


def _heads_zeroed(step: Step, right: Steps, parameters: Parameters) -> Step:
    kv_heads = parameter_of(sibling(step, right, "kq"), "kv_heads")
    if kv_heads < 2:
        raise NotApplicable(f"{step.makes} holds one head")
    return replace(_plain_read(step), op=_zeroed, params={"kv_heads": kv_heads, "heads": parameters["heads"]})


def _one_slot_late(rows: Array) -> Array:
    """Cache rows [S, n] that were written one slot too late: the first was never written."""
    moved = module_of(rows).zeros_like(rows)
    moved[1:] = rows[:-1]
    return moved


def _one_slot_early(rows: Array) -> Array:
    moved = module_of(rows).zeros_like(rows)
    moved[:-1] = rows[1:]
    return moved


def _own_slot(scores: Array) -> tuple[Array, Array]:
    """Where a query meets its own key, whose slot the next position overwrites: indices of queries and keys in [H, T, S]."""
    xp, (_, queries, keys) = module_of(scores), scores.shape
    return xp.arange(queries), xp.arange(queries) + keys - queries


def _scores_of_slots(q: Array, k: Array, *, late: bool, **heads: int) -> Array:
    if late:
        return ops.attention_scores(q, _one_slot_late(k), **heads)
    scores = ops.attention_scores(q, _one_slot_early(k), **heads).copy()
    scores[(slice(None), *_own_slot(scores))] = 0
    return scores


def _values_of_slots(weights: Array, v: Array, *, late: bool, kv_heads: int) -> Array:
    if late:
        return ops.weighted_values(weights, _one_slot_late(v), kv_heads=kv_heads)
    weights = weights.copy()
    weights[(slice(None), *_own_slot(weights))] = 0
    return ops.weighted_values(weights, _one_slot_early(v), kv_heads=kv_heads)


_OF_SLOTS = {ops.attention_scores: _scores_of_slots, ops.weighted_values: _values_of_slots}


def _other_slot(step: Step, _right: Steps, parameters: Parameters) -> Step:
    if step.op not in _OF_SLOTS:
        raise NotApplicable(f"{step.makes} does not read a cache by itself")
    return replace(step, op=_OF_SLOTS[step.op], params={**step.params, "late": parameters["slot"] == "late"})


def _capped_mask(
    scores: Array,
    positions: Array,
    key_positions: Array,
    sinks: Array | None = None,
    *,
    cap: float,
    scale: float,
    **params: object,
) -> Array:
    """The soft max of scores that were masked before they were capped: a masked key has the score −cap, not −∞."""
    xp = module_of(scores)
    seen = ops.causal_soft_max(xp.zeros_like(scores), positions, key_positions, scale=1.0, **params) > 0  # type: ignore[arg-type]
    masked = xp.where(seen, scores, scores.dtype.type(-cap))
    return ops.causal_soft_max(masked, positions, key_positions, sinks, scale=scale, window="all")


def _cap_after_mask(step: Step, right: Steps, _parameters: Parameters) -> Step:
    _, cap = cap_of(maker(step, right), right)
    if step.op is not ops.causal_soft_max:
        raise NotApplicable(f"{step.makes} is not a plain softmax")
    if cap > _SEEN_BELOW:
        raise NotApplicable(f"a masked key's weight of {exp(-cap):.0e} is too small to be seen")
    return replace(step, op=_capped_mask, params={**step.params, "cap": cap})


def _cap_before_scale(step: Step, right: Steps, _parameters: Parameters) -> Step:
    """The cap applied to scores before they are divided by √d."""
    queries = sibling(step, right, "kq")
    scaled = require(maker(queries, right), "SCALE")
    by = number(scaled, 0)
    if name_of(read_of(scaled, 0)) != sibling(step, right, "q_rope").makes or by == 0:
        raise NotApplicable(f"{step.makes}: the queries are not scaled")
    first, cap = cap_of(step, right)
    return replace(step, op=_late_scale, reads=(read_of(first, 0),), params={"cap": cap, "by": by})


def _late_scale(scores: Array, *, cap: float, by: float) -> Array:
    scale = scores.dtype.type(by)
    return soft_capped(scores / scale, cap=cap) * scale


FAULTS = (
    Fault(
        name="cache-of-other-layer",
        kinds=_READS,
        change=_of_other_layer,
        what="layers read the cache of {layer} earlier layer that has one, at {at}",
        symptom="the first layer with attention is right, the others are wrong from position 0 or 1 on",
        fix="each layer has its own rows; only models that say so (attention.shared_kv_layers) share them",
        seen="one buffer for all layers; a layer index that is missing or off by one",
        parameters={"layer": ("the last", "the first"), AT: subsets(*_READS)},
    ),
    Fault(
        name="cache-heads-zero",
        kinds=_READS,
        change=_heads_zeroed,
        what="{heads} of the cache's rows are zero, at {at}",
        symptom="single heads of attention are wrong",
        fix="write all key/value heads of a position into its row",
        seen="writes that cover one head, or half a warp; a grid with the wrong number of heads",
        parameters={"heads": tuple(_HEADS), AT: (("v_read",), ("k_read",), _READS)},
    ),
    Fault(
        name="cache-slot",
        kinds=("kqv_out", "kq"),
        change=_other_slot,
        what="{at}: a position's row is written one slot too {slot}, and a slot that nobody wrote is 0",
        symptom="wrong from position 0 on for values, from 1 on for keys",
        fix="write the row of position t to slot t, for keys and for values",
        seen="indices that are advanced before the write; a counter for keys and another one for values",
        parameters={"slot": ("late", "early"), AT: (("kqv_out",), ("kq",), ("kqv_out", "kq"))},
        says={("kqv_out",): "values", ("kq",): "keys", ("kqv_out", "kq"): "keys and values"},
    ),
    Fault(
        name="softcap-after-mask",
        kinds=_SOFT,
        change=_cap_after_mask,
        what="scores are masked before the soft cap, which makes −cap of −∞: later positions are seen",
        symptom="slightly wrong at all positions but the last",
        fix="cap first, then mask",
        seen="masks that are folded into the product, caps that are applied after it",
        whole=True,
    ),
    Fault(
        name="softcap-before-scale",
        kinds=("kq_scaled_2",),
        change=_cap_before_scale,
        what="attention's soft cap is applied to scores that are not scaled yet",
        symptom="position 0 is right, large scores are too small",
        fix="scale the queries or the scores, then cap",
        seen="fused attention that scales inside its softmax",
    ),
)
