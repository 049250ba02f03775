"""Faults of the choice of experts: by the smallest scores, or by scores that are normalised over the wrong axis."""

import numpy as np
from msgspec.structs import replace

from ..backend import Array
from ..graph import PASSES, Step
from .base import Fault, Parameters, Steps, kind_of
from .edits import WithInput, ggml, require

_CHOICE = "ffn_moe_topk"


def _negative(scores: Array) -> Array:
    return -scores


def _smallest(step: Step, right: Steps, _parameters: Parameters) -> Step:
    choosing = (other for other in right.values() if step.makes in other.names)
    if not ggml(step, "ARGSORT", "TOP_K") or not any(kind_of(other) == _CHOICE for other in (step, *choosing)):
        return step
    return replace(step, op=WithInput(step.op, 0, _negative))


def _over_positions(scores: Array, passes: Array) -> Array:
    """softmax over the positions of one pass: [T, E], [T] -> [T, E]."""
    weights = np.exp(scores - scores.max(axis=0, keepdims=True))
    same = (passes[:, None] == passes[None, :]).astype(weights.dtype)
    return weights / (same @ weights)


def _other_axis(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    return replace(require(step, "SOFT_MAX"), op=_over_positions, reads=(*step.reads, PASSES), params={})


FAULTS = (
    Fault(
        name="experts-smallest",
        kinds=("ARGSORT", "TOP_K"),
        change=_smallest,
        what="the experts with the smallest scores are chosen, not those with the largest",
        symptom="the router's scores are right, other experts are chosen at all positions",
        fix="sort by descending scores, or take the last ones of an ascending order",
        seen="argsort and topk whose order is ascending",
    ),
    Fault(
        name="router-over-positions",
        kinds=("ffn_moe_probs",),
        change=_other_axis,
        what="the router's softmax runs over the positions, not over the experts",
        symptom="the router's logits are right, its probabilities are not, and depend on the prompt's length",
        fix="normalise over the experts of each position",
        seen="softmax with dim=0, or with the axis of another layout",
        whole=True,
    ),
)
