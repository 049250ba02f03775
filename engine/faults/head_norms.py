"""Faults of norms that not every model has: of single heads, after a branch, with a bias."""

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from .. import ops
from ..backend import Array, module_of
from ..graph import PASSES, Altered, Step, WeightSource, name_of, read_as
from ..inapplicable import NotApplicable
from .base import AT, Fault, Parameters, Steps, Values, kind_of, read_of, sibling, subsets, weight_of
from .edits import only
from .norms import plus_one

_HEADS = ("q_norm", "k_norm")
_BEHIND = ("attn_post_norm", "ffn_post_norm")
_CENTRED = ("attn_norm", "ffn_norm", "output_norm")


def _missing(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    return only(step, read_of(step, 0))


class _FirstPassOnly(Struct, frozen=True):
    """A norm that passes after the first leave out. The numbers of the passes are its second input."""

    op: Callable[..., Array]

    def __call__(self, x: Array, passes: Array, *weights: Array, **params: Any) -> Array:
        """[T, n], [T] -> [T, n]."""
        return module_of(x).where((passes > 0)[:, None], x, self.op(x, *weights, **params))


def _not_in_decode(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    if step.op is not ops.rms_norm or len(step.reads) != 1:
        raise NotApplicable(f"{step.makes} is not a plain norm")
    return replace(step, op=_FirstPassOnly(step.op), reads=(*step.reads, PASSES))


class _Whole(Struct, frozen=True):
    """All heads normalised by one root mean square, each multiplied by the weight of a head, or by none."""

    weighted: bool

    def __call__(self, x: Array, weight: Array, *, eps: float, heads: int) -> Array:
        """[T, H · d], [d] -> [T, H · d]."""
        xp = module_of(x)
        return ops.rms_norm(x, xp.tile(weight if self.weighted else xp.ones_like(weight), heads), eps=eps)


_WEIGHTED, _UNWEIGHTED = "the weight of a head", "no weight"


def _whole_width(step: Step, _right: Steps, parameters: Parameters) -> Step:
    if step.op is not ops.rms_norm or step.params.get("heads", 1) == 1:
        raise NotApplicable(f"{step.makes} does not normalise heads")
    return replace(step, op=_Whole(parameters["weight"] == _WEIGHTED))


def _over_heads(x: Array, weight: Array, *, eps: float, heads: int) -> Array:
    """Each element of a head normalised by its root mean square over all heads."""
    split = x.reshape(x.shape[0], heads, -1)
    mean = np.mean(split.astype(np.float64) ** 2, axis=1, keepdims=True).astype(np.float32)
    return (split / np.sqrt(mean + np.float32(eps)) * weight).reshape(x.shape)


def _across_heads(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    if step.op is not ops.rms_norm or step.params.get("heads", 1) == 1:
        raise NotApplicable(f"{step.makes} does not normalise heads")
    return replace(step, op=_over_heads)


def _one_more(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    if step.op is not ops.rms_norm:
        raise NotApplicable(f"{step.makes} is not an RMS norm")
    return replace(step, op=plus_one)


def _less_one(source: WeightSource, name: str) -> Array:
    return source.get(name) - np.float32(1)


def _one_missing(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    if step.op not in (ops.rms_norm, ops.layer_norm) or not isinstance(weight_of(step, 0), str):
        raise NotApplicable(f"{step.makes} is no norm with a weight")
    return replace(step, weights=(Altered(str(step.weights[0]), _less_one), *step.weights[1:]))


def _all_with_weight(right: Steps) -> Values:
    """All norms with a weight of a model, the usual ones, the others, and each kind alone."""
    kinds = {kind_of(step): None for step in right.values() if step.op in (ops.rms_norm, ops.layer_norm)}
    usual = tuple(kind for kind in kinds if kind in _CENTRED)
    others = tuple(kind for kind in kinds if kind not in _CENTRED)
    groups = (tuple(kinds), usual, usual[:-1], others, *((kind,) for kind in kinds))
    return tuple(dict.fromkeys(group for group in groups if group)) or (_CENTRED,)


def _rope_then_norm(
    x: Array, positions: Array, factors: Array | None, weight: Array, *, eps: float, normed: int, **rope: Any
) -> Array:
    return ops.rms_norm(ops.rope(x, positions, factors, **rope), weight, eps=eps, heads=normed)


# What the points hold in an engine that normalises after RoPE: either name may be the result's.
_RESULT = ("q_rope holds the result", "q_norm holds the result", "both hold the result")
_QUERIES, _KEYS = ("q_norm", "q_rope", "kq"), ("k_norm", "k_rope", "k_read")


def _after_rope(step: Step, right: Steps, parameters: Parameters) -> Step:
    letter, _, kind = kind_of(step).partition("_")
    if kind in ("", "read"):  # the steps that read queries or keys: scores, the cache
        return _reads_norm(step, right, parameters) if parameters["result"] == _RESULT[1] else step
    norm, rope = sibling(step, right, f"{letter}_norm"), sibling(step, right, f"{letter}_rope")
    if rope.op is not ops.rope or norm.op is not ops.rms_norm or read_of(rope, 0) != norm.makes:
        raise NotApplicable(f"{rope.makes} does not rotate the result of a norm")
    if kind == "norm" and parameters["result"] == _RESULT[0]:
        return step
    raw = (read_of(norm, 0), *rope.reads[1:])
    if kind == "rope" and parameters["result"] == _RESULT[1]:
        return replace(rope, reads=raw)
    if kind == "rope" and parameters["result"] == _RESULT[2]:
        return only(rope, norm.makes)
    weights = (rope.weights[0] if rope.weights else None, norm.weights[0])
    params = {**rope.params, "eps": norm.params["eps"], "normed": norm.params.get("heads", 1)}
    return replace(step, op=_rope_then_norm, reads=raw, weights=weights, params=params)


def _reads_norm(step: Step, right: Steps, parameters: Parameters) -> Step:
    kinds = [kind for kind in ("q", "k") if f"{kind}_norm" in parameters[AT]]
    others = {sibling(step, right, f"{kind}_rope").makes: sibling(step, right, f"{kind}_norm").makes for kind in kinds}
    reads = tuple(read_as(read, others[name_of(read)]) if name_of(read) in others else read for read in step.reads)
    return replace(step, reads=reads)


def _without_bias(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    if step.op is not ops.layer_norm or len(step.weights) < 2 or step.weights[1] is None:
        raise NotApplicable(f"{step.makes} has no bias")
    return replace(step, weights=(step.weights[0], None))


def _uncentred(x: Array, weight: Array, bias: Array | None = None, *, eps: float, heads: int = 1) -> Array:
    normed = ops.rms_norm(x, weight, eps=eps, heads=heads)
    return normed if bias is None else normed + bias


def _root_mean_square(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    if step.op is not ops.layer_norm:
        raise NotApplicable(f"{step.makes} is not a LayerNorm")
    return replace(step, op=_uncentred)


_LATENTS = ("kv_cmpr", "kv_compressed", "attn_q_a_norm")
_SCANNED = ("ssm_norm",)
_OTHERS = (*_HEADS, *_BEHIND, *_LATENTS, *_SCANNED)
_GROUPS = (_OTHERS, _HEADS, _BEHIND, _LATENTS, *((kind,) for kind in _OTHERS))
_ANY = "RMS_NORM"


def unlisted(right: Steps, listed: Collection[str] = _OTHERS) -> tuple[str, ...]:
    """The kinds of a model's RMS norms of single heads that are not listed, such as those after RoPE in Hunyuan."""
    norms = (step for step in right.values() if step.op is ops.rms_norm and step.params.get("heads", 1) != 1)
    return tuple(dict.fromkeys(kind for step in norms if (kind := kind_of(step)) not in listed))


def _unlisted_behind(right: Steps) -> tuple[str, ...]:
    """The kinds of a model's norms of a branch, whose result is added to the residual, that have other names than usual (GLM-4, Grok)."""
    added = {name for step in right.values() if step.op is ops.add for name in step.names}
    norms = (step for step in right.values() if step.op is ops.rms_norm and step.weights and step.makes in added)
    return tuple(dict.fromkeys(kind for step in norms if (kind := kind_of(step)) not in _OTHERS))


def _where(kinds: tuple[str, ...]) -> Callable[[Steps], Values]:
    """The places of a fault: these kinds, and, if they include norms of heads or behind a branch, a model's own names for those."""

    def places(right: Steps) -> Values:
        known = _GROUPS if kinds == _OTHERS else subsets(*kinds)
        more = unlisted(right, kinds) if set(_HEADS) <= set(kinds) else ()
        if set(_BEHIND) <= set(kinds):
            more = (*more, *_unlisted_behind(right))
        return tuple(dict.fromkeys((*known, *(subsets(*more) if more else ()))))

    return places


def _new(name: str, kinds: tuple[str, ...], change: Callable[[Step, Steps, Parameters], Step], *texts: str) -> Fault:
    summary, symptom, fix, seen = texts
    parameters = {AT: _where(kinds)}
    every = (*kinds, _ANY)
    return Fault(
        name=name, kinds=every, change=change, what=summary, symptom=symptom, fix=fix, seen=seen, parameters=parameters
    )


FAULTS = (
    _new(
        "head-norm-missing", _HEADS, _missing,
        "heads are not normalised, in {at}", "position 0 is right, all later ones are wrong",
        "attn_q_norm and attn_k_norm before RoPE: of each head, or of the whole row where the weight is as wide",
        "Qwen2 code that loads Qwen3, Gemma 2 code that loads Gemma 3",
    ),
    _new(
        "head-norm-not-in-decode", _HEADS, _not_in_decode,
        "heads are not normalised in the passes after the first, in {at}", "prefill right, decode wrong",
        "attn_q_norm and attn_k_norm before RoPE in decode as well", "a decode path of its own that was written for Qwen2",
    ),
    replace(
        _new(
            "head-norm-whole-width", _HEADS, _whole_width,
            "all heads are normalised together, not each on its own, with {weight}, in {at}",
            "position 0 is right, later ones are slightly wrong",
            "reshape to [T, heads, head size] before the norm", "norm kernels that are given [T, width]; OLMo 2 code that loads Qwen3",
        ),
        parameters={"weight": (_WEIGHTED, _UNWEIGHTED), AT: _where(_HEADS)},
    ),
    _new(
        "head-norm-across-heads", _HEADS, _across_heads,
        "each element is normalised over the heads, not each head over its elements, in {at}",
        "position 0 is right, later ones are wrong", "reduce along the last axis of [T, heads, head size]",
        "layouts [T, head size, heads] read as [T, heads, head size]",
    ),
    replace(
        _new(
            "head-norm-after-rope", (*_QUERIES, *_KEYS), _after_rope,
            "heads are normalised after RoPE, not before ({result}), in {at}",
            "right if the norm's weight is constant, otherwise wrong from position 1 on",
            "apply q_norm and k_norm before RoPE", "Llama 4, which normalises after RoPE",
        ),
        parameters={"result": _RESULT, AT: ((*_QUERIES, *_KEYS), _QUERIES, _KEYS)},
    ),
    _new(
        "post-norm-missing", _BEHIND, _missing,
        "a branch's result is not normalised before it is added, in {at}", "residuals of the wrong size from layer 0 on",
        "normalise attention's and feed-forward's result before the sum", "pre-norm code that loads Gemma 2, Gemma 3 or OLMo 2",
    ),
    _new(
        "post-norm-one-plus-weight", _OTHERS, _one_more,
        "the norm multiplies by 1 + weight, in {at}", "values about twice too large",
        "GGUF stores the whole weight, also for Gemma: multiply by it unchanged", "ports of Gemma code",
    ),
    replace(
        _new(
            "norm-one-missing", (*_CENTRED, *_OTHERS), _one_missing,
            "the norm multiplies by weight − 1, in {at}", "values far too small",
            "GGUF stores the whole weight: the 1 + of Gemma's and Nemotron's code is in it", "converters that copy the weight as it is",
        ),
        parameters={AT: _all_with_weight},
    ),
    _new(
        "norm-bias-missing", _CENTRED, _without_bias,
        "the norm's bias is not added, in {at}", "wrong from position 0 on, of plausible size",
        "LayerNorm is x̂ · weight + bias", "RMS-norm kernels used for GPT-2, Falcon, Phi-2 or StarCoder 2",
    ),
    _new(
        "norm-not-centred", _CENTRED, _root_mean_square,
        "the mean is not subtracted: an RMS norm where this model has LayerNorm, in {at}", "a small difference from position 0 on",
        "subtract the row's mean first", "Llama code that loads a model with LayerNorm",
    ),
)  # fmt: skip
