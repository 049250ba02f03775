"""Faults of attention's mask: which keys a position sees, of its own pass and of earlier ones."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from msgspec.structs import replace

from checkpoints.rules import visible

from ..backend import Array
from ..graph import PASSES, History, Step
from ..inapplicable import NotApplicable
from .base import Fault, Parameters, Steps

_SOFT = ("kq_soft_max",)

Allowed = Callable[[Array, Array, Array, Array], Array]  # query and key positions, query and key passes -> bool [T, S]

_CHUNKS = (4, 8, 16, 32, 64, 128, 256, 512)

_SCORES = "the scores before the soft max, in which a score of 0 has a weight"


# A row of keys for each query that sees later positions, too: an encoder's.
_BOTH_WAYS = ("all", "symmetric")


def _within(chunk: int) -> Allowed:
    return lambda t, s, _p, _q: s // chunk == t // chunk


_IN_CHUNKS: dict[str, Allowed] = {f"its own chunk of {n}": _within(n) for n in _CHUNKS}
_MASKS: dict[str, Allowed] = {
    "none": lambda _t, _s, p, q: q <= p,  # keys of later passes are not in the cache yet
    "earlier ones and itself": lambda t, s, _p, _q: s <= t,
    "the next one as well": lambda t, s, p, q: (s <= t + 1) & (q <= p),
    "earlier ones, not itself": lambda t, s, _p, _q: (s < t) | ((s == t) & (t == t.min())),
    "itself and later ones": lambda t, s, p, q: (s >= t) & (q <= p),
    "own pass only": lambda t, s, p, q: (s <= t) & (p == q),
    "itself only": lambda t, s, _p, _q: s == t,
    "without the cache's last row": lambda t, s, p, q: (s <= t) & ~((s == t - 1) & (q < p)),
    "without the cache's first row": lambda t, s, p, q: (s <= t) & ~((s == s.min()) & (q < p)),
    "own key missing": lambda t, s, p, _q: (s <= t) & ~((s == t) & (p > p.min())),
    "cache written to one row": lambda t, s, p, q: (s <= t) & ((q == q.min()) | (p == q)),
    **_IN_CHUNKS,
    "prompt only": lambda t, s, p, q: (s <= t) & ((q == q.min()) | (p == q.min())),
}


def _masked(
    scores: Array,
    positions: Array,
    key_positions: Array,
    passes: Array,
    key_passes: Array,
    sinks: Array | None = None,
    *,
    scale: float,
    mask: str,
    window: str = "causal",
    size: int = 0,
) -> Array:
    """softmax with another mask than the model's, which a layer's window still limits; a row that sees no key
    is NaN, as in any engine.
    """
    allowed = _MASKS[mask](positions[:, None], key_positions[None, :], passes[:, None], key_passes[None, :])
    if mask in _IN_CHUNKS:  # the model's own mask, within a chunk
        allowed = allowed & visible(positions, key_positions, window=window, size=size)
    elif window != "causal":
        later = key_positions[None, :] > positions[:, None]
        allowed = allowed & (later | visible(positions, key_positions, window=window, size=size))
    shifted = np.where(allowed, scores * np.float32(scale), np.float32(-np.inf))
    return _soft_max(shifted, sinks)


def _soft_max(scores: Array, sinks: Array | None) -> Array:
    """Weights of scores [H, T, S], −∞ where a key is not seen; a row that sees none is NaN, as in any engine."""
    largest = scores.max(axis=-1, keepdims=True)
    if sinks is not None:
        largest = np.maximum(largest, sinks[:, None, None])
    with np.errstate(invalid="ignore"):
        weights = np.exp(scores - largest)
        total = weights.sum(axis=-1, keepdims=True, dtype=np.float64)
        if sinks is not None:
            total = total + np.exp(sinks[:, None, None] - largest)
        return weights * (1.0 / total).astype(np.float32)


def _by_product(
    scores: Array,
    positions: Array,
    key_positions: Array,
    passes: Array,
    key_passes: Array,
    sinks: Array | None = None,
    *,
    scale: float,
    masked: str,
    window: str = "causal",
    size: int = 0,
) -> Array:
    """softmax whose mask is a factor: of the scores, of which 0 is one like any other, or of the weights, which then sum to less."""
    seen = visible(positions, key_positions, window=window, size=size)[None]
    scaled = scores * np.float32(scale)
    scaled = np.where(seen, scaled, np.float32(0)) if masked == _SCORES else scaled
    scaled = np.where((key_passes[None, :] <= passes[:, None])[None], scaled, np.float32(-np.inf))
    weights = _soft_max(scaled, sinks)
    return weights if masked == _SCORES else np.where(seen, weights, np.float32(0))


def _with_passes(step: Step, op: Any, params: Mapping[str, Any]) -> Step:
    """A soft max by another operation, which also takes the pass of each position and of each key, in front of attention's sinks."""
    if PASSES in step.names:
        raise NotApplicable(f"{step.makes} has another mask already")
    return replace(step, op=op, reads=(*step.reads, PASSES, History(PASSES)), params={**step.params, **params})


def _product(step: Step, _right: Steps, parameters: Parameters) -> Step:
    _require_causal(step)
    return _with_passes(step, _by_product, {"masked": parameters["masked"]})


def _with_mask(step: Step, mask: str) -> Step:
    return _with_passes(step, _masked, {"mask": mask})


def _require_causal(step: Step) -> None:
    """
    Raises:
        NotApplicable: an encoder's attention, which has no cache and no causal mask.
    """
    if step.params.get("window") in _BOTH_WAYS:
        raise NotApplicable(f"{step.makes} sees later positions in a right engine, too")


def _of_cache(step: Step, _right: Steps, parameters: Parameters) -> Step:
    _require_causal(step)
    return _with_mask(step, parameters["mask"])


def _unmasked(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    _require_causal(step)
    return _with_mask(step, "none")


def _made_causal(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    if step.params.get("window") not in _BOTH_WAYS:
        raise NotApplicable(f"{step.makes} sees no later positions in a right engine")
    return _with_mask(step, "earlier ones and itself")


def _in_chunks(step: Step, _right: Steps, parameters: Parameters) -> Step:
    return _with_mask(step, parameters["mask"])


FAULTS = (
    Fault(
        name="no-causal-mask",
        kinds=_SOFT,
        change=_unmasked,
        what="there is no causal mask",
        symptom="prefill wrong everywhere but at the last position; decode right",
        fix="mask scores of later positions with -inf before the softmax",
        seen="batched prefill added to a decode-only engine",
        whole=True,
    ),
    Fault(
        name="causal-mask-added",
        kinds=_SOFT,
        change=_made_causal,
        what="attention has a causal mask, where this model sees later positions as well",
        symptom="wrong everywhere but at the last position of the first layer",
        fix="no mask: every position sees the whole prompt (<architecture>.attention.causal is false)",
        seen="decoder code that loads BERT, an embedding model or a diffusion model",
    ),
    Fault(
        name="mask-by-product",
        kinds=_SOFT,
        change=_product,
        what="the mask multiplies {masked}",
        symptom="prefill wrong everywhere but at the last position, or but at those that see every key; decode right",
        fix="add -inf to the scores of positions that must not be seen, before the soft max",
        seen="scores times torch.tril(ones); weights cut off by tril after the soft max",
        parameters={"masked": (_SCORES, "the weights after the soft max, which then sum to less than 1")},
        whole=True,
    ),
    Fault(
        name="mask-shifted",
        kinds=_SOFT,
        change=_of_cache,
        what="the causal mask is wrong: a position sees {mask}",
        symptom="off by one key: a small error from the second position on",
        fix="position t sees keys 0 to t, itself included",
        seen="< instead of <= in a kernel",
        parameters={"mask": ("the next one as well", "earlier ones, not itself", "itself and later ones")},
        whole=True,
    ),
    Fault(
        name="cache-not-read",
        kinds=_SOFT,
        change=_of_cache,
        what="attention does not read the cache: a position sees {mask}",
        symptom="position 0 is right; each later one ignores those before it",
        fix="attend to rows 0 to t of the cache",
        seen="early versions of a decode loop",
        parameters={"mask": ("itself only", "own pass only")},
        says={"own pass only": "its own pass only"},
    ),
    Fault(
        name="cache-row-missing",
        kinds=_SOFT,
        change=_of_cache,
        what="the cache is read without {mask}",
        symptom="prefill right, decode wrong",
        fix="write the row of position t to slot t before attention reads 0 to t",
        seen="the length counted before or after the write",
        parameters={"mask": ("without the cache's last row", "without the cache's first row", "own key missing")},
        says={
            "without the cache's last row": "its last row",
            "without the cache's first row": "its first row",
            "own key missing": "the position's own row",
        },
    ),
    Fault(
        name="cache-stale",
        kinds=_SOFT,
        change=_of_cache,
        what="the cache does not grow: {mask}",
        symptom="the first decode step is right, the next ones are wrong",
        fix="advance the write position by one each step",
        seen="a decode loop that keeps passing the position of the prompt's end",
        parameters={"mask": ("cache written to one row", "prompt only")},
        says={
            "cache written to one row": "every later position is written to one row",
            "prompt only": "it holds the prompt alone",
        },
    ),
    Fault(
        name="mask-in-chunks",
        kinds=_SOFT,
        change=_in_chunks,
        what="a position sees the keys of {mask} only",
        symptom="right in the first chunk, wrong from a multiple of its length on",
        fix="a chunk of the prompt attends to all chunks before it as well",
        seen="prefill in chunks whose mask is built for each chunk separately",
        parameters={"mask": tuple(f"its own chunk of {n}" for n in _CHUNKS)},
    ),
)
