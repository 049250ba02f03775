"""Faults of norms that not every model has: of single heads, behind a branch, with a bias."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from .. import ops
from ..backend import Array, module_of
from ..graph import Step
from ..inapplicable import NotApplicable
from .base import AT, Fault, Parameters, Steps, kind_of, read_of, sibling, subsets, with_parameters
from .edits import only

_HEADS = ("q_norm", "k_norm")
_BEHIND = ("attn_post_norm", "ffn_post_norm")
_CENTRED = ("attn_norm", "ffn_norm", "output_norm")


def _missing(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    return only(step, read_of(step, 0))


def _whole(x: Array, weight: Array, *, eps: float, heads: int) -> Array:
    """All heads by one root mean square, each with the weight of a head."""
    return ops.rms_norm(x, module_of(x).tile(weight, heads), eps=eps)


def _whole_width(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    if step.op is not ops.rms_norm or step.params.get("heads", 1) == 1:
        raise NotApplicable(f"{step.makes} does not normalise heads")
    return replace(step, op=_whole)


def _plus_one(x: Array, weight: Array, *, eps: float, heads: int = 1) -> Array:
    return ops.rms_norm(x, weight + np.float32(1), eps=eps, heads=heads)


def _one_more(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    if step.op is not ops.rms_norm:
        raise NotApplicable(f"{step.makes} is no RMS norm")
    return replace(step, op=_plus_one)


def _rope_then_norm(
    x: Array, positions: Array, factors: Array | None, weight: Array, *, eps: float, normed: int, **rope: Any
) -> Array:
    return ops.rms_norm(ops.rope(x, positions, factors, **rope), weight, eps=eps, heads=normed)


def _after_rope(step: Step, right: Steps, _parameters: Parameters) -> Step:
    norm = sibling(step, right, kind_of(step).replace("_rope", "_norm"))
    if step.op is not ops.rope or norm.op is not ops.rms_norm or read_of(step, 0) != norm.makes:
        raise NotApplicable(f"{step.makes} does not rotate what a norm made")
    params = {**step.params, "eps": norm.params["eps"], "normed": norm.params.get("heads", 1)}
    reads, weights = (read_of(norm, 0), *step.reads[1:]), (step.weights[0] if step.weights else None, norm.weights[0])
    return replace(step, op=_rope_then_norm, reads=reads, weights=weights, params=params)


def _without_bias(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    if step.op is not ops.layer_norm or len(step.weights) < 2 or step.weights[1] is None:
        raise NotApplicable(f"{step.makes} has no bias")
    return replace(step, weights=(step.weights[0], None))


def _uncentred(x: Array, weight: Array, bias: Array | None = None, *, eps: float, heads: int = 1) -> Array:
    made = ops.rms_norm(x, weight, eps=eps, heads=heads)
    return made if bias is None else made + bias


def _root_mean_square(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    if step.op is not ops.layer_norm:
        raise NotApplicable(f"{step.makes} is no LayerNorm")
    return replace(step, op=_uncentred)


def _epsilon(step: Step, _right: Steps, parameters: Parameters) -> Step:
    return with_parameters(step, eps=parameters["eps"])


_LATENTS = ("kv_cmpr", "kv_compressed", "attn_q_a_norm")
_SCANNED = ("ssm_norm",)
_OTHERS = (*_HEADS, *_BEHIND, *_LATENTS, *_SCANNED)
_GROUPS: dict[str, Any] = {AT: (_OTHERS, _HEADS, _BEHIND, _LATENTS, *((kind,) for kind in _OTHERS))}


def _at(kinds: tuple[str, ...]) -> dict[str, Any]:
    return {AT: subsets(*kinds)}


def _new(name: str, kinds: tuple[str, ...], change: Callable[[Step, Steps, Parameters], Step], *said: str) -> Fault:
    what, symptom, fix, seen = said
    where = _GROUPS if kinds == _OTHERS else _at(kinds)
    return Fault(name=name, kinds=kinds, change=change, what=what, symptom=symptom, fix=fix, seen=seen, parameters=where)


FAULTS = (
    _new(
        "head-norm-missing", _HEADS, _missing,
        "queries or keys are not normalised, in {at}", "position 0 is right, all later ones are wrong",
        "normalise each head before RoPE: attn_q_norm, attn_k_norm", "Qwen2 code that loads Qwen3, Gemma 2 code that loads Gemma 3",
    ),
    _new(
        "head-norm-whole-width", _HEADS, _whole_width,
        "all heads are normalised together, not each by itself, in {at}", "position 0 is right, later ones are slightly wrong",
        "reshape to [T, heads, head size] before the norm", "norm kernels that are given [T, width]",
    ),
    _new(
        "head-norm-after-rope", ("q_rope", "k_rope"), _after_rope,
        "heads are normalised after RoPE, not before, in {at}", "right if the norm's weight is constant, else wrong from position 1 on",
        "apply q_norm and k_norm before RoPE", "Llama 4, which normalises after RoPE",
    ),
    _new(
        "post-norm-missing", _BEHIND, _missing,
        "a branch's result is not normalised before it is added, in {at}", "residuals of the wrong size from layer 0 on",
        "normalise attention's and feed-forward's result before the sum", "pre-norm code that loads Gemma 2, Gemma 3 or OLMo 2",
    ),
    _new(
        "post-norm-one-plus-weight", _OTHERS, _one_more,
        "the norm multiplies by 1 + weight, in {at}", "values about twice too large",
        "GGUF stores the whole weight, also for Gemma: multiply by it as it is", "ports of Gemma code",
    ),
    _new(
        "norm-bias-missing", _CENTRED, _without_bias,
        "the norm's bias is not added, in {at}", "wrong from position 0 on, of plausible size",
        "LayerNorm is x̂ · weight + bias", "RMS-norm kernels used for GPT-2, Falcon, Phi-2 or StarCoder 2",
    ),
    _new(
        "norm-not-centred", _CENTRED, _root_mean_square,
        "the mean is not subtracted: an RMS norm where this model wants LayerNorm, in {at}", "a small difference from position 0 on",
        "subtract the row's mean first", "Llama code that loads a model with LayerNorm",
    ),
)  # fmt: skip
