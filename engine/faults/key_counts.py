"""Faults of how many keys attention counts: the first ones only, or keys of zeros after the last one, too."""

from typing import Any

import numpy as np
from msgspec.structs import replace

from .. import ops
from ..backend import Array, module_of
from ..graph import Step
from ..inapplicable import NotApplicable
from .base import Fault, Parameters, Steps

_FIRST = (8, 16, 32, 64, 128, 256, 512, 1024)
_MULTIPLES = (4, 8, 16, 32, 64, 128, 256)


def _plain(step: Step) -> Step:
    """The step, if it is a soft max whose scores are scaled products.

    Raises:
        NotApplicable: it is another operation, or has linear biases.
    """
    if step.op is not ops.causal_soft_max or "max_bias" in step.params:
        raise NotApplicable(f"{step.makes} is no soft max of scaled scores")
    return step


def _of_first(scores: Array, positions: Array, keys: Array, *sinks: Array, first: int, **params: Any) -> Array:
    """softmax over the keys before number `first`: [H, T, S]."""
    seen = np.where(keys[None, None, :] < first, scores, np.float32(-np.inf))
    return ops.causal_soft_max(seen, positions, keys, *sinks, **params)


def _sum_of_first(weights: Array, v: Array, *, first: int, **params: Any) -> Array:
    """The values of the keys before number `first`, weighted: [H, T, S], [S, n] -> [T, H · d]."""
    kept = weights.copy()
    kept[:, :, first:] = 0
    return ops.weighted_values(kept, v, **params)


def _cut_off(step: Step, _right: Steps, parameters: Parameters) -> Step:
    op, counted = (_sum_of_first, "by the sum") if step.op is ops.weighted_values else (_of_first, "by the soft max")
    if step.op not in (ops.weighted_values, ops.causal_soft_max) or parameters["counted"] != counted:
        return step
    return replace(step, op=op, params={**step.params, "first": parameters["first"]})


def _padded(scores: Array, positions: Array, keys: Array, *sinks: Array, multiple: int, scale: float, **params: Any) -> Array:
    """softmax with a score of 0 for each key that is missing to a multiple of so many keys, whose weight is dropped: [H, T, S]."""
    xp = module_of(scores)
    weights = ops.causal_soft_max(scores, positions, keys, *sinks, scale=scale, **params)
    largest = weights.argmax(axis=-1)[..., None]
    one = xp.take_along_axis(weights, largest, axis=-1).astype(np.float64)
    # The sum that a weight was divided by is the exponential of its score over the weight.
    part = one * xp.exp(-xp.take_along_axis(scores, largest, axis=-1).astype(np.float64) * scale)
    missing = -((keys[None, :] <= positions[:, None]).sum(axis=-1)) % multiple
    shrunk: Array = (weights / (1 + missing[None, :, None] * part)).astype(weights.dtype)
    return shrunk


def _with_zeros(step: Step, _right: Steps, parameters: Parameters) -> Step:
    return replace(_plain(step), op=_padded, params={**step.params, "multiple": parameters["multiple"]})


FAULTS = (
    Fault(
        name="keys-cut-off",
        kinds=("kq_soft_max", "kqv_out"),
        change=_cut_off,
        what="only the first {first} keys are counted {counted} of attention",
        symptom="right up to that position, then wrong: what comes after those keys is not seen",
        fix="loop over all keys up to the query's own position, whatever the size of a tile",
        seen="buffers of scores with a fixed size; loops over one tile of keys",
        parameters={"first": _FIRST, "counted": ("by the soft max", "by the sum")},
    ),
    Fault(
        name="keys-padded",
        kinds=("kq_soft_max",),
        change=_with_zeros,
        what="keys of zeros up to a multiple of {multiple} take part in attention's soft max",
        symptom="right where the number of keys is such a multiple, else attention too weak",
        fix="scores of keys after the last one are −∞, not 0, before the soft max",
        seen="the last tile of keys, filled with zeros (flashinfer-ai/flashinfer#5090)",
        parameters={"multiple": _MULTIPLES},
    ),
)
