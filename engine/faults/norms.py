"""Faults of the norms."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from .. import ops
from ..backend import Array
from ..graph import Step
from ..inapplicable import NotApplicable
from .base import AT, Fault, Parameters, Steps, Values, kind_of, sibling, subsets, with_parameters
from .edits import HandsOn, ggml, number, with_values
from .index import once
from .recurrent_state import row_norms_of_scans

_NORMS = ("attn_norm", "ffn_norm", "output_norm")
_ANY_NORM = {AT: (*subsets(*_NORMS), ("attn_norm", "ffn_norm"))}
_OPERATIONS = ("RMS_NORM", "NORM")
_WITH_EPSILON = (*_OPERATIONS, "L2_NORM")  # operations of ggml's whose first parameter is ε


def _others(right: Steps) -> tuple[str, ...]:
    """The kinds of norms with a weight that only some models have: of heads, of latents, after a branch."""
    kinds = {kind_of(step): None for step in right.values() if step.op in (ops.rms_norm, ops.layer_norm)}
    return tuple(kind for kind in kinds if kind not in _NORMS)


def epsilon_of(step: Step) -> float | None:
    """The ε of a norm; None if the step is not a norm."""
    if "eps" in step.params:
        return float(step.params["eps"])
    return number(step, 0) if ggml(step, *_WITH_EPSILON) else None


@once
def kinds_with_epsilon(right: Steps) -> Mapping[str, float]:
    """The kinds of a model's norms, with the ε of the first of each."""
    kinds: dict[str, float] = {}
    for step in right.values():
        eps = epsilon_of(step)
        if eps is not None:
            kinds.setdefault(kind_of(step), eps)
    return kinds


def _everywhere(right: Steps) -> Values:
    """All norms of a model together if it has others than the usual ones, those of one ε, then the usual ones."""
    kinds = kinds_with_epsilon(right)
    alike = (tuple(kind for kind in kinds if kinds[kind] == eps) for eps in dict.fromkeys(kinds.values()))
    groups = (group for group in alike if 1 < len(group) < len(kinds))
    every = (_OPERATIONS,) if kinds.keys() - set(_NORMS) else ()
    return tuple(dict.fromkeys((*every, *groups, *_ANY_NORM[AT])))


def _also_others(right: Steps) -> Values:
    """The usual norms, then the others: all together, and each kind alone."""
    return (*_ANY_NORM[AT], *(subsets(*others) if (others := _others(right)) else ()))


def _all_together(right: Steps) -> Values:
    """The usual norms, and all with a weight that a model has, together."""
    return tuple(dict.fromkeys((*_ANY_NORM[AT], (*_NORMS, *_others(right)))))


def _skippable(right: Steps) -> Values:
    """The usual norms, those of embeddings and of what a scan makes: those of heads, latents and branches have entries of their own."""
    of_embeddings = (("embd",),) if "embd" in right and right["embd"].op in (ops.rms_norm, ops.layer_norm) else ()
    return (*subsets("attn_norm", "ffn_norm"), *of_embeddings, *((kind,) for kind in row_norms_of_scans(right)))


def with_epsilon(step: Step, eps: float) -> Step:
    """A norm with another ε.

    Raises:
        NotApplicable: the step is no norm.
    """
    if epsilon_of(step) is None:
        raise NotApplicable(f"{step.makes} is not a norm")
    return with_values(step, {0: float(eps)}) if ggml(step, *_WITH_EPSILON) else with_parameters(step, eps=float(eps))


def _epsilon(step: Step, right: Steps, parameters: Parameters) -> Step:
    if parameters.get(AT) != _OPERATIONS or not ggml(step, *_OPERATIONS):
        return with_epsilon(step, parameters["eps"])
    eps = float(parameters["eps"])
    # A norm without a weight may imitate another norm with a proportionally different ε: a length is a root mean square times √d.
    common = next((float(other.params["eps"]) for other in right.values() if other.op in (ops.rms_norm, ops.layer_norm)), 0.0)
    return with_values(step, {0: number(step, 0) * eps / common if common else eps})


def _outside(x: Array, weight: Array, *, eps: float) -> Array:
    """x / (sqrt(mean(x²)) + eps) · weight."""
    root = np.sqrt(np.mean(x.astype(np.float64) ** 2, axis=1)).astype(np.float32) + np.float32(eps)
    return x / root[:, None] * weight


def plus_one(x: Array, weight: Array, *, eps: float, heads: int = 1) -> Array:
    """The RMS norm, times 1 + weight."""
    return ops.rms_norm(x, weight + np.float32(1), eps=eps, heads=heads)


def _no_weight(x: Array, weight: Array, *, eps: float, heads: int = 1) -> Array:
    return ops.rms_norm(x, weight * np.float32(0) + np.float32(1), eps=eps, heads=heads)


def _layer_norm(x: Array, weight: Array, *, eps: float) -> Array:
    """(x − mean) / sqrt(variance + eps) · weight."""
    return ops.rms_norm(x - x.mean(axis=1, keepdims=True, dtype=np.float64).astype(np.float32), weight, eps=eps)


def _skipped(x: Array, _weight: Array, _bias: Array | None = None, *, eps: float) -> Array:
    del eps
    return x + np.float32(0)


def _sum(x: Array, weight: Array, *, eps: float) -> Array:
    """x / sqrt(Σx² + eps) · weight."""
    total = np.sum(x.astype(np.float64) ** 2, axis=1).astype(np.float32) + np.float32(eps)
    return x / np.sqrt(total)[:, None] * weight


def _halves(x: Array, weight: Array, *, eps: float) -> Array:
    """Each half of the row normalised by its own root mean square: a reduction that covers only a part of the row."""
    half = x.shape[1] // 2
    parts = [ops.rms_norm(x[:, part], weight[part], eps=eps) for part in (slice(0, half), slice(half, None))]
    return np.concatenate(parts, axis=1)


def _over_positions(x: Array, weight: Array, *, eps: float) -> Array:
    """Each element normalised by its root mean square over all positions of the pass."""
    mean = np.mean(x.astype(np.float64) ** 2, axis=0).astype(np.float32)
    return x / np.sqrt(mean + np.float32(eps))[None, :] * weight


class _OfCentred(Struct, frozen=True):
    """A changed RMS norm in a LayerNorm: applied to the row without its mean, with the bias added."""

    op: Callable[..., Array]

    def __call__(self, x: Array, weight: Array, bias: Array | None = None, **params: Any) -> Array:
        """[T, n], [n], [n] -> [T, n]."""
        total = x.sum(axis=1, keepdims=True, dtype=np.float64).astype(x.dtype)
        scaled = self.op(x - total / x.shape[1], weight, **params)
        return scaled if bias is None else scaled + bias


_OPS: Mapping[str, Callable[..., Array]] = {
    "norm-over-positions": _over_positions,
    "eps-outside-root": _outside,
    "norm-weight-missing": _no_weight,
    "norm-one-plus-weight": plus_one,
    "layer-norm": _layer_norm,
    "norm-sum": _sum,
    "norm-in-halves": _halves,
    "norm-skipped": _skipped,
}


def _by(name: str) -> Fault:
    summary, symptom, fix, seen = _TEXTS[name]

    def change(step: Step, _right: Steps, _parameters: Parameters) -> Step:
        if step.op is not ops.layer_norm or name == "norm-skipped":
            return replace(step, op=_OPS[name])
        if name == "layer-norm":
            raise NotApplicable(f"{step.makes} is a LayerNorm")
        if step.params.get("heads", 1) != 1:
            raise NotApplicable(f"{step.makes} is a norm of each head")
        return replace(step, op=_OfCentred(_OPS[name]))

    # A skipped final norm has an entry of its own.
    where: Mapping[str, Any] = {AT: _skippable} if name == "norm-skipped" else _ANY_NORM
    if name in ("norm-weight-missing", "norm-in-halves"):
        where = {AT: _also_others}
    if name == "norm-one-plus-weight":
        where = {AT: _all_together}
    return Fault(
        name=name,
        kinds=(*_NORMS, *_OPERATIONS),
        change=change,
        what=summary,
        symptom=symptom,
        fix=fix,
        seen=seen,
        parameters=where,
        whole=name == "norm-over-positions",
    )


_TEXTS = {
    "eps-outside-root": (
        "ε is added outside the square root, in {at}",
        "a difference that looks like rounding",
        "x / sqrt(mean(x²) + ε)",
        "formulas copied from a paper",
    ),
    "norm-weight-missing": (
        "the norm's weight is not applied, in {at}",
        "wrong from position 0 on, of plausible size",
        "multiply by the weight after normalising",
        "kernels that fuse the norm into the next product",
    ),
    "norm-one-plus-weight": (
        "the norm multiplies by 1 + weight, in {at}",
        "values about twice too large",
        "GGUF stores the whole weight, also for Gemma: multiply by it unchanged",
        "ports of Gemma code",
    ),
    "layer-norm": (
        "LayerNorm (mean subtracted) where this model has RMSNorm, in {at}",
        "a small, even difference from position 0 on",
        "do not subtract the mean",
        "GPT-2 code",
    ),
    "norm-sum": (
        "the norm divides by the root of the sum, not of the mean, in {at}",
        "values too small by the root of the width",
        "divide the sum of squares by the width",
        "reductions without the division",
    ),
    "norm-in-halves": (
        "each half of the row is normalised on its own, in {at}",
        "a small difference from position 0 on",
        "reduce over the whole row: across all warps or blocks",
        "reductions that stop at the edge of a thread block",
    ),
    "norm-over-positions": (
        "the norm reduces over the positions, not over the row, in {at}",
        "wrong from position 0 on, and a result that depends on the prompt's length",
        "reduce along the elements of each position's row",
        "matrices whose rows and columns are confused",
    ),
    "norm-skipped": (
        "the norm is skipped, in {at}",
        "values of the wrong size",
        "normalise before the projections",
        "a pre-norm model taken for a post-norm one",
    ),
}


_PAIRS = (("attn_norm", "ffn_norm"), ("q_norm", "k_norm"), ("attn_post_norm", "ffn_post_norm"))


def _pairs(right: Steps) -> Values:
    """The pairs of norms that this model has, each with both norms wrong; the usual ones also with one."""
    known = {kind_of(step) for step in right.values()}
    usual = [kinds for pair in _PAIRS if known.issuperset(pair) for kinds in subsets(*pair)]
    return (*usual, *(pair for pair in _others_alike(right) if pair == tuple(sorted(pair)) and pair not in usual)) or _PAIRS[:1]


def _exchange(step: Step, right: Steps, parameters: Parameters) -> Step:
    at = parameters[AT]
    pair = at if len(at) > 1 else next(pair for pair in _PAIRS if kind_of(step) in pair)
    other = sibling(step, right, pair[pair[0] == kind_of(step)])
    if other.op is not step.op or (other.params.get("heads", 1) == 1) != (step.params.get("heads", 1) == 1):
        raise NotApplicable(f"{step.makes} and {other.makes} are norms of other sizes")
    return _reading_weight_of(other, step)


def _others_alike(right: Steps) -> Values:
    """Pairs of a norm and another one of its layer whose weight it may read instead; those of `_PAIRS` are left to that fault."""
    first: dict[str, Step] = {}
    for step in right.values():
        if step.op in (ops.rms_norm, ops.layer_norm) and step.weights and kind_of(step) != "output_norm":
            first.setdefault(kind_of(step), step)
    known = {*_PAIRS, *(pair[::-1] for pair in _PAIRS)}
    alike = [
        (kind, other)
        for kind, step in first.items()
        for other, theirs in first.items()
        if kind != other and (kind, other) not in known and step.op is theirs.op
        if (step.params.get("heads", 1) == 1) == (theirs.params.get("heads", 1) == 1)
    ]
    return tuple(alike) or (("attn_norm", "ffn_norm"),)


class _WithOther(HandsOn, frozen=True):
    """A norm whose weight must be as wide as what it multiplies."""

    def __call__(self, x: Array, weight: Array, *rest: Array, **params: Any) -> Array:
        """[T, n], [n / heads] -> [T, n]."""
        if weight.size * params.get("heads", 1) != x.shape[1]:
            raise NotApplicable("the other norm's weight has another width")
        return self.op(x, weight, *rest, **params)


def _of_other(step: Step, right: Steps, parameters: Parameters) -> Step:
    kind, other = parameters["norm"]
    if kind_of(step) != kind:
        return step
    return _reading_weight_of(sibling(step, right, other), step)


def _reading_weight_of(other: Step, step: Step) -> Step:
    if not other.weights:  # another fault may have taken it away
        raise NotApplicable(f"{other.makes} has no weight")
    return replace(step, op=_WithOther(step.op), weights=other.weights)


FAULTS = (
    Fault(
        name="norm-epsilon",
        kinds=(*_NORMS, *_OPERATIONS),
        change=_epsilon,
        what="the norms' ε is {eps}, which is not this model's, in {at}",
        symptom="a difference of 1e-6 to 1e-3 that looks like rounding",
        fix="read <architecture>.attention.layer_norm_rms_epsilon from the file",
        seen="engines that carry 1e-5 as a constant",
        parameters={"eps": (1e-5, 1e-6, 1e-8, 1e-12, 0.0), AT: _everywhere},
        says={_OPERATIONS: "every norm"},
    ),
    *(_by(name) for name in _TEXTS),
    Fault(
        name="norms-exchanged",
        kinds=tuple(kind for pair in _PAIRS for kind in pair),
        change=_exchange,
        what="the weights of two norms are exchanged, or both are the same, in {at}",
        symptom="wrong from position 0 of layer 0 on",
        fix="attn_norm before Q, K, V; ffn_norm before gate and up; attn_q_norm for queries; post_attention_norm after attention",
        seen="weights loaded by index",
        parameters={AT: _pairs},
    ),
    Fault(
        name="norm-of-other",
        kinds=_OPERATIONS,
        change=_of_other,
        what="a norm multiplies by the weight of another norm of its layer: {norm} (the norm, and whose weight)",
        symptom="wrong from position 0 of layer 0 on, of plausible size",
        fix="attn_norm, post_attention_norm, ffn_norm and post_ffw_norm are different tensors: compare their names",
        seen="post-norms of Gemma and GLM-4 taken for pre-norms; MTP graphs that read attn_post_norm for ffn_norm",
        parameters={"norm": _others_alike},
    ),
    Fault(
        name="no-final-norm",
        kinds=("output_norm",),
        change=lambda step, _right, _parameters: replace(step, op=_skipped),
        what="the final norm is missing",
        symptom="all layers right, logits of the wrong size",
        fix="normalise with output_norm.weight before the output matrix",
        seen="ports of code in which the norm is part of the head",
        once=True,
    ),
)
