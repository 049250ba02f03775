"""Faults of the attention: scale, heads, mask, softmax, cache."""

from collections.abc import Callable

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from .. import ops
from ..backend import Array, module_of
from ..graph import PASSES, History, Step
from ..inapplicable import NotApplicable
from .base import AT, Fault, Parameters, Steps, kind_of, layer_of, parameter_of, sibling, with_parameters
from .edits import Then, ggml, with_values
from .value_layout import value_layout

_SOFT = ("kq_soft_max",)


def _scale(step: Step, right: Steps, parameters: Parameters) -> Step:
    if ggml(step, "SOFT_MAX"):  # cross-attention's, and others that are lifted as they are
        given = isinstance(parameters["scale"], float) and len(step.reads) > 1
        return with_values(step, {0: parameters["scale"]}) if given else step
    if isinstance(parameters["scale"], float):
        return with_parameters(step, scale=parameters["scale"])
    scale = parameter_of(step, "scale")
    heads = parameter_of(sibling(step, right, "kq"), "heads")
    scales = {
        "missing": 1.0,
        "by the width": scale * heads**-0.5,
        "applied twice": scale**2,
        "inverted": 1 / scale,
        "by twice the head size": scale * 2**-0.5,
        "by half the head size": scale * 2**0.5,
        "divided by the layer's number as well": scale / (1 + layer_of(step)),
    }
    return with_parameters(step, scale=scales[parameters["scale"]])


def _by_modulo(kv_rows: Array, heads: int, kv_heads: int) -> Array:
    """Key or value rows repeated for each query head in the order h % K: [S, K · d] -> [S, H · d]."""
    split = kv_rows.reshape(kv_rows.shape[0], kv_heads, -1)
    return split[:, [h % kv_heads for h in range(heads)]].reshape(kv_rows.shape[0], -1)


def _first_only(kv_rows: Array, heads: int, kv_heads: int) -> Array:
    """The first key/value head for every query head."""
    split = kv_rows.reshape(kv_rows.shape[0], kv_heads, -1)
    return split[:, [0] * heads].reshape(kv_rows.shape[0], -1)


def _next_group(kv_rows: Array, heads: int, kv_heads: int) -> Array:
    """The key/value head after a query head's own; the first one for the last group."""
    split = kv_rows.reshape(kv_rows.shape[0], kv_heads, -1)
    return split[:, [(h * kv_heads // heads + 1) % kv_heads for h in range(heads)]].reshape(kv_rows.shape[0], -1)


_ORDERS: dict[str, Callable[[Array, int, int], Array]] = {
    "h % K": _by_modulo,
    "0": _first_only,
    "(h // (H / K) + 1) % K": _next_group,
}


def _scores_by(q: Array, k: Array, *, heads: int, kv_heads: int, order: str) -> Array:
    return ops.attention_scores(q, _ORDERS[order](k, heads, kv_heads), heads=heads, kv_heads=heads)


def _values_by(weights: Array, v: Array, *, kv_heads: int, order: str) -> Array:
    heads = weights.shape[0]
    return ops.weighted_values(weights, _ORDERS[order](v, heads, kv_heads), kv_heads=heads)


def _heads(step: Step, _right: Steps, parameters: Parameters) -> Step:
    op = _scores_by if step.makes.rstrip("~").endswith("kq") else _values_by
    return replace(step, op=op, params={**step.params, "order": parameters["head"]})


def _over_queries(scores: Array, positions: Array, key_positions: Array, passes: Array, *, scale: float) -> Array:
    """softmax over the queries of one pass: the scores of other passes' queries no longer exist."""
    later = key_positions[None, :] > positions[:, None]
    shifted = np.where(later, np.float32(-np.inf), scores * np.float32(scale))
    weights = np.zeros_like(shifted)
    for number in np.unique(passes).tolist():
        rows = passes == number
        part = np.exp(shifted[:, rows] - shifted[:, rows].max(axis=1, keepdims=True))
        weights[:, rows] = part / part.sum(axis=1, keepdims=True)
    return np.where(later, np.float32(0), weights)


def _over_heads(scores: Array, positions: Array, key_positions: Array, *, scale: float) -> Array:
    later = key_positions[None, :] > positions[:, None]
    scaled = scores * np.float32(scale)
    weights = np.exp(scaled - scaled.max(axis=0, keepdims=True))
    return np.where(later, np.float32(0), weights / weights.sum(axis=0, keepdims=True))


def _without_maximum(scores: Array, positions: Array, key_positions: Array, *, scale: float) -> Array:
    """exp of the scores without subtracting their maximum, in float16: infinite above 11.09."""
    later = key_positions[None, :] > positions[:, None]
    with np.errstate(over="ignore", invalid="ignore"):
        weights = np.exp(scores * np.float32(scale)).astype(np.float16).astype(np.float32)
        weights = np.where(later, np.float32(0), weights)
        return weights / weights.sum(axis=-1, keepdims=True)


def _no_soft_max(scores: Array, positions: Array, key_positions: Array, *, scale: float) -> Array:
    later = key_positions[None, :] > positions[:, None]
    return np.where(later, np.float32(0), scores * np.float32(scale))


_AXES = {"heads": _over_heads, "nothing": _no_soft_max}


def _axis(step: Step, _right: Steps, parameters: Parameters) -> Step:
    if parameters["axis"] == "queries":
        return replace(step, op=_over_queries, reads=(*step.reads, PASSES))
    return replace(step, op=_AXES[parameters["axis"]])


def _overflow(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    return replace(step, op=_without_maximum)


class _InOrder(Struct, frozen=True):
    """The heads' results [T, H · d] put side by side in another order."""

    heads: int
    kv_heads: int
    order: str

    def __call__(self, right: Array) -> Array:
        """[T, H · d] -> [T, H · d]."""
        return _side_by_side(right, self.heads, self.kv_heads, self.order)


def _side_by_side(right: Array, heads: int, kv_heads: int, order: str) -> Array:
    t = right.shape[0]
    split = right.reshape(t, heads, -1)
    if order == "interleaved":
        return split.transpose(0, 2, 1).reshape(t, -1)
    if order == "reversed":
        return split[:, ::-1].reshape(t, -1)
    if order == "head-major":  # [H, T, d] read as [T, H · d]
        return split.transpose(1, 0, 2).copy().reshape(t, -1)
    return split.reshape(t, kv_heads, heads // kv_heads, -1).transpose(0, 2, 1, 3).reshape(t, -1)


def _concatenate(step: Step, right: Steps, parameters: Parameters) -> Step:
    heads, kv_heads = (int(parameter_of(sibling(step, right, "kq"), name)) for name in ("heads", "kv_heads"))
    return replace(step, op=Then(step.op, _InOrder(heads, kv_heads, parameters["order"])))


def _rows_moved(history: Array, *, by: int) -> Array:
    """The cache's rows, each replaced by the one `by` positions away; beyond the ends, by the first or last row."""
    xp, history = module_of(history), ops.cached(history)
    return history[xp.clip(xp.arange(history.shape[0]) + by, 0, history.shape[0] - 1)]


def _other_cache(step: Step, right: Steps, parameters: Parameters) -> Step:
    """A step that reads another value's cache: keys in place of values, or the other way round."""
    reads, instead = parameters["read"]
    if kind_of(step) != reads or step.op is not ops.cached:
        return step
    return replace(step, reads=(History(sibling(step, right, instead).makes),))


def _cache_shifted(step: Step, _right: Steps, parameters: Parameters) -> Step:
    if step.op is not ops.cached:
        raise NotApplicable(f"{step.makes} is not a plain read of the cache")
    return replace(step, op=_rows_moved, params={**step.params, "by": parameters["by"]})


FAULTS = (
    Fault(
        name="attn-scale",
        kinds=(*_SOFT, "SOFT_MAX"),
        change=_scale,
        what="the attention's scale is wrong ({scale})",
        symptom="position 0 is right (one key takes all weight), later ones are wrong",
        fix="scores / sqrt(head size), once",
        seen="scale folded into Q and applied again; width taken for head size",
        parameters={
            "scale": (
                *("missing", "by the width", "applied twice", "inverted", "by twice the head size", "by half the head size"),
                "divided by the layer's number as well",
            )
        },
    ),
    Fault(
        name="gqa-modulo",
        kinds=("kq", "kqv_out"),
        change=_heads,
        what="query head h reads key/value head {head} instead of h // (H / K), {at}",
        symptom="wrong from position 0 on in models with fewer key/value heads than heads",
        fix="query head h reads key/value head h // (H / K), not h % K",
        seen="attention kernels written for K = H; heads of another rank",
        parameters={"head": tuple(_ORDERS), "at": (("kq", "kqv_out"), ("kq",), ("kqv_out",))},
        says={("kq", "kqv_out"): "for keys and values", ("kq",): "for keys alone", ("kqv_out",): "for values alone"},
    ),
    Fault(
        name="softmax-axis",
        kinds=_SOFT,
        change=_axis,
        what="the softmax runs over {axis}, not over the keys",
        symptom="wrong from position 0 or 1 on",
        fix="normalise over the keys of each query and head",
        seen="an axis number taken from another layout",
        parameters={"axis": ("queries", "heads", "nothing")},
        whole=True,
    ),
    Fault(
        name="softmax-f16-overflow",
        kinds=_SOFT,
        change=_overflow,
        what="the softmax exponentiates in F16 without subtracting the maximum",
        symptom="NaN or single heads wrong where a score is above 11",
        fix="subtract the row's maximum first, accumulate in F32",
        seen="half-precision attention kernels",
        whole=True,  # what overflows in one row is NaN, which a mask of zeros does not keep from the rows before
    ),
    Fault(
        name="v-layout",
        kinds=("v_read", "kqv_out"),
        change=value_layout,
        what="the value cache is read in a layout other than it was written in ({layout})",
        symptom="position 0 is right or nearly so; later ones mix positions",
        fix="read V in the layout in which it was written: [position, head, d] or transposed",
        seen="V stored transposed for one kernel, read by another",
        parameters={"layout": ("transposed", "head by head")},
        whole=True,
    ),
    Fault(
        name="cache-shifted",
        kinds=("k_read", "v_read"),
        change=_cache_shifted,
        what="attention reads the cache's rows at an offset of {by} positions, at {at}",
        symptom="position 0 is right or nearly so; later ones mix the wrong positions",
        fix="key and value of position s are row s of the cache",
        seen="caches whose write index is advanced before the write, or for keys alone",
        parameters={"by": (-1, 1), AT: (("v_read",), ("k_read",), ("k_read", "v_read"))},
        whole=True,
    ),
    Fault(
        name="cache-of-other",
        kinds=("k_read", "v_read"),
        change=_other_cache,
        what="attention reads another cache: {read}",
        symptom="wrong from position 0 or 1 on, of plausible size",
        fix="keys and values have separate caches: two pointers, two offsets",
        seen="one buffer for both caches; an offset of half the buffer that is missing",
        parameters={"read": (("v_read", "k_rope"), ("v_read", "k"), ("k_read", "v"))},
        says={
            ("v_read", "k_rope"): "what is read as V is the cache of K",
            ("v_read", "k"): "what is read as V is the cache of K, before RoPE",
            ("k_read", "v"): "what is read as K is the cache of V",
        },
    ),
    Fault(
        name="head-order",
        kinds=("kqv_out",),
        change=_concatenate,
        what="the heads are put side by side in the wrong order ({order})",
        symptom="wrong from position 0 on",
        fix="[T, H, d] -> [T, H · d], head 0 first",
        seen="a missing transpose before the output projection",
        parameters={"order": ("interleaved", "reversed", "head-major", "by group")},
        whole=True,
    ),
)
