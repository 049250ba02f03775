"""Norms too many, applied twice or where the model has none, and norms by a variance that is none of the model's."""

from typing import Any

import numpy as np
from msgspec.structs import replace

from .. import ops
from ..backend import Array
from ..graph import Step
from ..inapplicable import NotApplicable
from .base import AT, Fault, Parameters, Steps, subsets
from .edits import HandsOn, Then
from .norms import kinds_with_epsilon

_NORMS = ("attn_norm", "ffn_norm", "output_norm")
_RESULTS = ("embd", "attn_out", "ffn_out", "q", "k", "v")
_USUAL = 1e-6  # ε of a model without a norm of its own
_ROOT, _DEVIATION = "√(variance + ε)", "standard deviation + ε"


class _Twice(HandsOn, frozen=True):
    """A norm applied to its own result."""

    def __call__(self, x: Array, *weights: Array, **params: Any) -> Array:
        """[T, n] -> [T, n]."""
        return self.op(self.op(x, *weights, **params), *weights, **params)


def _twice(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    if step.op not in (ops.rms_norm, ops.layer_norm):
        raise NotApplicable(f"{step.makes} is not a norm")
    return replace(step, op=_Twice(step.op))


def _added(step: Step, right: Steps, _parameters: Parameters) -> Step:
    eps = next(iter(kinds_with_epsilon(right).values()), _USUAL)

    def norm(value: Array) -> Array:
        scale = 1 / np.sqrt((value * value).mean(axis=-1, keepdims=True, dtype=np.float64) + eps)
        return value * scale.astype(value.dtype)

    return replace(step, op=Then(step.op, norm))


def _unbiased(x: Array, weight: Array, bias: Array | None = None, *, eps: float, heads: int = 1, divides: str = _ROOT) -> Array:
    """The LayerNorm with a variance of n − 1: (x − mean) / sqrt(Σ(x − mean)² / (n − 1) + ε) · weight (+ bias), or ε beside the root."""
    split = x.reshape(x.shape[0] * heads, -1).astype(np.float64)
    if split.shape[1] < 2:
        raise NotApplicable("a row of one element has no variance")
    centred = split - split.mean(axis=1, keepdims=True)
    variance = (centred**2).sum(axis=1, keepdims=True) / (split.shape[1] - 1)
    root = np.sqrt(variance + eps) if divides == _ROOT else np.sqrt(variance) + eps
    scaled = (centred / root).astype(x.dtype) * weight
    return (scaled if bias is None else scaled + bias).reshape(x.shape[0], -1)


def _variance(step: Step, _right: Steps, parameters: Parameters) -> Step:
    if step.op is not ops.layer_norm:
        raise NotApplicable(f"{step.makes} is no LayerNorm")
    return replace(step, op=_unbiased, params={**step.params, "divides": parameters["divides"]})


FAULTS = (
    Fault(
        name="norm-twice",
        kinds=_NORMS,
        change=_twice,
        what="the norm is applied twice, with its weight each time, in {at}",
        symptom="values whose large elements are too large, from position 0 on",
        fix="normalise once: hand on either the hidden state or what the norm makes of it",
        seen="a hidden state that was normalised already, given to a head or a block for further tokens (MTP)",
        parameters={AT: (*subsets(*_NORMS), ("attn_norm", "ffn_norm"))},
    ),
    Fault(
        name="norm-added",
        kinds=_RESULTS,
        change=_added,
        what="a norm without a weight that this model does not have is applied to {at}",
        symptom="values of length √n, from position 0 on",
        fix="leave the norm out: other models of the family have it",
        seen="code for models with norms of embeddings, of heads, or after a branch",
        parameters={AT: tuple((kind,) for kind in _RESULTS)},
    ),
    Fault(
        name="norm-unbiased",
        kinds=("NORM", *_NORMS),
        change=_variance,
        what="the variance is divided by n − 1, not by n (the norm divides by {divides}), in {at}",
        symptom="values too small by one part in 2 · n, from position 0 on",
        fix="divide the sum of squares by the row's length: unbiased=False, correction=0",
        seen="torch.std and torch.var, whose default is n − 1, in norms written by hand",
        parameters={"divides": (_ROOT, _DEVIATION), AT: (("NORM",), *((kind,) for kind in _NORMS))},
        says={("NORM",): "every LayerNorm"},
        near_one=True,
    ),
)
