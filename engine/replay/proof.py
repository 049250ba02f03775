"""The same steps, accumulated in float64 and rounded where ggml rounds: what one operation of the reference is held to.

A model's own steps are what an engine runs fast. Here each product is replaced by the one of `products`, so that only the
reference's own float32 sums are left as a difference.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .. import ops
from ..backend import Array
from ..graph import Altered, Step
from ..weights.rounding import F16, round_activations
from .products import blocks_of, product


def _scores(q: Array, k: Array, *, kv_kind: int, **heads: Any) -> Array:
    rounded = round_activations(q, kv_kind)
    return ops.attention_scores(rounded.astype(np.float64), k.astype(np.float64), **heads).astype(np.float32)


def _mixed(weights: Array, v: Array, *, kv_kind: int, kv_heads: int) -> Array:
    rounded = round_activations(weights, kv_kind)
    return ops.weighted_values(rounded.astype(np.float64), v.astype(np.float64), kv_heads=kv_heads).astype(np.float32)


def _stored(history: Array, *, kv_kind: int) -> Array:
    return round_activations(history, kv_kind)


def proof_steps(steps: Sequence[Step], *, native: bool, kv_type: str = "f32") -> list[Step]:
    """The steps with each product replaced by the one above; everything else is what it was.

    Args:
        kv_type: "f32" or "f16", what the cache holds. A cache of F16 rounds queries and attention weights, too: they are
            the activations of a product whose weights are the cache.
    """
    kinds = {"kv_kind": F16 if kv_type == "f16" else 0}
    made = []
    for step in steps:
        if step.op is ops.linear and isinstance(step.weights[0], str):
            weights = (Altered(step.weights[0], blocks_of), *step.weights[1:])
            made.append(replace(step, op=product, weights=weights, params={"native": native}))
        elif step.op in _WIDE:
            made.append(replace(step, op=_WIDE[step.op], params={**step.params, **kinds}))
        else:
            made.append(step)
    return made


_WIDE: dict[Callable[..., Array], Callable[..., Array]] = {
    ops.attention_scores: _scores,
    ops.weighted_values: _mixed,
    ops.cached: _stored,
}
