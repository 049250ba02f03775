"""Faults of mixtures of experts: how experts are chosen, weighted, added, and what each of them computes."""

from collections.abc import Callable
from typing import Any

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from .. import ops
from ..backend import Array, module_of
from ..ggml_ops.activations import sigmoid
from ..graph import Step, name_of
from ..inapplicable import NotApplicable
from .base import Fault, Parameters, Steps, kind_of, read_of, sibling
from .edits import Then, WithInput, ggml, maker, only, require
from .expert_counts import OTHER_COUNTS
from .index import of_operation

_WEIGHTS = ("ffn_moe_weights",)


def _not_normalised(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    return only(require(step, "DIV"), read_of(step, 0))


def _rows_to_one(weights: Array) -> Array:
    rows = weights.reshape(weights.shape[0], -1)
    return (rows / rows.sum(axis=1, keepdims=True)).reshape(weights.shape)


def _normalised(step: Step, right: Steps, _parameters: Parameters) -> Step:
    if step.makes.replace("ffn_moe_weights", "ffn_moe_weights_norm") in right:
        raise NotApplicable(f"{step.makes} is normalised anyway")
    return replace(require(step, "GET_ROWS"), op=Then(step.op, _rows_to_one))


def _by_all(weights: Array, probabilities: Array) -> Array:
    """The chosen experts' weights divided by the sum over all experts: [T, k], [T, E]."""
    total = probabilities.reshape(weights.shape[0], -1).sum(axis=1, keepdims=True)
    divided: Array = (weights.reshape(weights.shape[0], -1) / total).reshape(weights.shape)
    return divided


def _normalised_by_all(step: Step, right: Steps, _parameters: Parameters) -> Step:
    taken = require(maker(require(step, "DIV"), right), "GET_ROWS")
    return replace(step, op=_by_all, reads=(taken.makes, taken.reads[0]), params={})


def _unscaled(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    return only(require(step, "SCALE"), read_of(step, 0))


def _soft_max(scores: Array) -> Array:
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def _soft_max_of_rows(weights: Array) -> Array:
    return _soft_max(weights.reshape(weights.shape[0], -1)).reshape(weights.shape)


def _gating(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    op = sigmoid if ggml(require(step, "SOFT_MAX", "UNARY"), "SOFT_MAX") else _soft_max
    return replace(step, op=op, params={})


def _biased_weights(step: Step, right: Steps, _parameters: Parameters) -> Step:
    biased = sibling(step, right, "ffn_moe_probs_biased")
    return replace(require(step, "GET_ROWS"), reads=(biased.makes, *step.reads[1:]))


def _raw_scores(step: Step, right: Steps, _parameters: Parameters) -> Step:
    before = right.get(step.names[0])
    if before is None:
        return step
    if kind_of(step) in _WEIGHTS and ggml(before, "SOFT_MAX", "UNARY"):
        return replace(require(step, "GET_ROWS"), reads=(read_of(before, 0), *step.reads[1:]))
    after_choice = ggml(step, "SOFT_MAX") and kind_of(before) in _WEIGHTS  # others are attention's, or over all experts
    return only(step, read_of(step, 0)) if after_choice else step


def _unbiased(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    return only(require(step, "ADD"), read_of(step, 0))


class _WithoutLast(Struct, frozen=True):
    """Weights without the last ones: they become 0, or −∞ where a soft max follows."""

    nothing: float
    count: int

    def __call__(self, weights: Array) -> Array:
        rows = weights.reshape(weights.shape[0], -1).copy()
        if rows.shape[1] <= self.count:
            raise NotApplicable(f"no more than {self.count} experts are chosen")
        rows[:, -self.count :] = self.nothing
        return rows.reshape(weights.shape)


def _fewer(step: Step, right: Steps, parameters: Parameters) -> Step:
    chosen = require(step, "GET_ROWS")
    prefix = step.makes.rpartition(".")[0]
    soft = any(
        ggml(other, "SOFT_MAX") and step.makes in other.names for name, other in right.items() if name.startswith(prefix)
    )
    return replace(chosen, op=Then(chosen.op, _WithoutLast(-np.inf if soft else 0.0, parameters["count"])))


def _of_all(scores: Array, chosen: Array) -> Array:
    """The chosen experts' weights [T, k] of a soft max over all of them: scores [T, E], ids [T, k]."""
    rows = scores.reshape(chosen.shape[0], -1)
    taken: Array = module_of(rows).take_along_axis(_soft_max(rows), chosen.reshape(len(rows), -1).astype(np.int64), axis=1)
    return taken


def _each_alone(scores: Array, chosen: Array) -> Array:
    """The chosen experts' weights [T, k], each the sigmoid of its score."""
    rows = scores.reshape(chosen.shape[0], -1)
    taken: Array = module_of(rows).take_along_axis(sigmoid(rows), chosen.reshape(len(rows), -1).astype(np.int64), axis=1)
    return taken


_BEFORE_CHOICE = {"a softmax over all experts, before the choice": _of_all, "the sigmoid of each score": _each_alone}


def _weighted_before(step: Step, right: Steps, parameters: Parameters) -> Step:
    taken = right.get(step.names[0]) if ggml(step, "SOFT_MAX") else None
    if taken is None or kind_of(taken) not in _WEIGHTS or not ggml(taken, "GET_ROWS") or len(taken.reads) != 2:
        return step  # attention's, or one over all experts
    return replace(step, op=_BEFORE_CHOICE[parameters["by"]], reads=taken.reads, params={})


def _reversed(weights: Array) -> Array:
    return weights.reshape(weights.shape[0], -1)[:, ::-1].reshape(weights.shape)


def _mean(weights: Array) -> Array:
    return np.full_like(weights, 1 / weights.reshape(weights.shape[0], -1).shape[1])


def _sum(weights: Array) -> Array:
    return np.ones_like(weights)


_ALIKE = {"averaged": _mean, "added up": _sum}


def _alike(step: Step, _right: Steps, parameters: Parameters) -> Step:
    if len(require(step, "MUL").reads) < 2:
        raise NotApplicable(f"{step.makes} weights no experts")
    return replace(step, op=WithInput(step.op, 1, _ALIKE[parameters["are"]]))


def _on_weights(change: Callable[[Array], Array]) -> Callable[[Step, Steps, Parameters], Step]:
    def planted(step: Step, _right: Steps, _parameters: Parameters) -> Step:
        return replace(require(step, "GET_ROWS"), op=Then(step.op, change))

    return planted


def _weighted(value: Array, weights: Array) -> Array:
    """Values of chosen experts [T, k, n] or [T, k · n], each times its expert's weight [T, k]."""
    factors = weights.reshape(weights.shape[0], -1)
    shaped = value.reshape(*factors.shape, -1)
    product: Array = (shaped * factors[:, :, None]).reshape(value.shape)
    return product


class _ThenWeighted(Struct, frozen=True):
    """An operation whose result is multiplied by the experts' weights, its input number `at`."""

    op: Callable[..., Array]
    at: int

    def __call__(self, *inputs: Any, **params: Any) -> Array:
        own = [value for number, value in enumerate(inputs) if number != self.at]
        return _weighted(self.op(*own, **params), inputs[self.at])


def _other_side(step: Step, right: Steps, parameters: Parameters) -> Step:
    """Experts' weights applied to their results where the model applies them to their input, to both, or the other way round."""
    prefix, _, kind = step.makes.rpartition(".")
    weighted = right.get(f"{prefix}.ffn_moe_weighted")
    if weighted is None or not ggml(weighted, "MUL") or len(weighted.reads) < 2:
        raise NotApplicable(f"{step.makes}: no step weights experts")
    weights = name_of(weighted.reads[1])
    before = any(weighted.makes in other.names for other in of_operation(right, "MUL_MAT_ID"))
    both = parameters["weights"] == "both"
    if kind == "ffn_moe_weighted":
        return step if both else only(step, read_of(step, 0))
    if (kind in _INTO) == before:
        return step
    return replace(step, op=_ThenWeighted(step.op, len(step.reads)), reads=(*step.reads, weights))


_INTO = ("ffn_moe_gate", "ffn_moe_up", "ffn_moe_gate_up")  # products with an expert's input: a factor of it is one of theirs


def _reads_shared(step: Step, right: Steps) -> int | None:
    """The number of the operand that is the shared expert's output, or a factor of it; None if there is none."""
    return next((number for number in range(len(step.reads)) if "shexp" in maker(step, right, number).makes), None)


def _no_shared(step: Step, right: Steps, _parameters: Parameters) -> Step:
    shared = _reads_shared(step, right) if step.op is ops.add else None
    return step if shared is None else only(step, read_of(step, 1 - shared))  # the first layers may have no experts


def _no_gate(step: Step, right: Steps, _parameters: Parameters) -> Step:
    shared = _reads_shared(step, right)
    if shared is None:
        raise NotApplicable(f"{step.makes} is no product with the shared expert")
    return only(require(step, "MUL"), read_of(step, shared))


def _swapped(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    if len(step.reads) != 2:
        raise NotApplicable(f"{step.makes} reads no gate and up")
    return replace(step, reads=(step.reads[1], step.reads[0]))


def _new(name: str, kinds: tuple[str, ...], change: Callable[[Step, Steps, Parameters], Step], *texts: str) -> Fault:
    summary, symptom, fix, seen = texts
    return Fault(name=name, kinds=kinds, change=change, what=summary, symptom=symptom, fix=fix, seen=seen)


_RIGHT_LOGITS = "the router's scores are right, the experts' combined result is not"
_NORMS: Any = ("ffn_moe_weights_norm",)

FAULTS = (
    _new(
        "experts-not-normalised", _NORMS, _not_normalised,
        "the chosen experts' weights are not divided by their sum", _RIGHT_LOGITS,
        "norm_topk_prob: divide the chosen weights by their sum", "Qwen2-MoE code that loads Qwen3-MoE",
    ),
    _new(
        "experts-normalised", _WEIGHTS, _normalised,
        "the chosen experts' weights are divided by their sum, which this model does not do", _RIGHT_LOGITS,
        "softmax over all experts, then choose, and leave the weights as they are", "Mixtral code that loads Qwen2-MoE or OLMoE",
    ),
    _new(
        "experts-normalised-by-all", _NORMS, _normalised_by_all,
        "the chosen experts' weights are divided by the sum over all experts, not by their own", _RIGHT_LOGITS,
        "choose first, then divide by the sum of the chosen weights", "routers that normalise before top-k, with a sigmoid as well",
    ),
    _new(
        "experts-softmax-again", _WEIGHTS, _on_weights(_soft_max_of_rows),
        "a second softmax runs over the chosen experts' weights", _RIGHT_LOGITS,
        "softmax over all experts, then choose; or choose by logits, then softmax over the chosen: not both",
        "kernels that expect logits, called with probabilities",
    ),
    replace(
        _new(
            "experts-weighted-before-choice", ("SOFT_MAX",), _weighted_before,
            "the chosen experts' weights are {by}, where this model takes the softmax of the chosen ones' scores", _RIGHT_LOGITS,
            "choose by the scores, then softmax over the chosen alone", "Qwen2-MoE, OLMoE or DeepSeek code that loads gpt-oss",
        ),
        parameters={"by": tuple(_BEFORE_CHOICE)},
    ),
    _new(
        "experts-scale-missing", ("ffn_moe_weights_scaled",), _unscaled,
        "the experts' weights are not multiplied by expert_weights_scale", _RIGHT_LOGITS,
        "multiply the chosen weights by <architecture>.expert_weights_scale", "DeepSeek's routed_scaling_factor forgotten",
    ),
    _new(
        "experts-gating", ("ffn_moe_probs",), _gating,
        "the router uses a softmax where this model has a sigmoid, or the other way round",
        "the router's logits are right, its probabilities are not",
        "expert_gating_func says which: 1 softmax, 2 sigmoid", "Mixtral code that loads DeepSeek-V3 or GLM-4.5",
    ),
    _new(
        "experts-bias-as-weight", _WEIGHTS, _biased_weights,
        "the bias for choosing experts is used in their weights as well", _RIGHT_LOGITS,
        "choose by probability + bias, but weight by the probability only", "DeepSeek-V3's exp_probs_b added to the probabilities",
    ),
    _new(
        "experts-raw-scores", (*_WEIGHTS, "SOFT_MAX"), _raw_scores,
        "the chosen experts are weighted by the router's scores as they are, without softmax or sigmoid", _RIGHT_LOGITS,
        "weight by the probabilities: the softmax or sigmoid of the router's scores", "sgl-project/sglang#35160",
    ),
    _new(
        "experts-bias-ignored", ("ffn_moe_probs_biased",), _unbiased,
        "experts are chosen without the bias exp_probs_b", "other experts are chosen at some positions",
        "choose by probability + exp_probs_b", "Mixtral code that loads DeepSeek-V3",
    ),
    replace(
        _new(
            "experts-too-few", _WEIGHTS, _fewer,
            "fewer experts are used than this model asks for, by {count}: the last ones are left out", _RIGHT_LOGITS,
            "use as many experts as <architecture>.expert_used_count says", "a loop that ends one iteration too early",
        ),
        parameters={"count": OTHER_COUNTS},
    ),
    _new(
        "experts-weights-exchanged", _WEIGHTS, _on_weights(_reversed),
        "the chosen experts have each other's weights", _RIGHT_LOGITS,
        "keep ids and weights in the same order", "ids sorted after the weights were taken",
    ),
    replace(
        _new(
            "experts-unweighted", ("ffn_moe_weighted",), _alike,
            "the chosen experts' results are {are}, without the router's weights", _RIGHT_LOGITS,
            "multiply each expert's result by its weight before the sum", "loops over experts that only ask which were chosen",
        ),
        parameters={"are": tuple(_ALIKE)},
    ),
    replace(
        _new(
            "experts-weights-on-other-side", (*_INTO, "ffn_moe_down", "ffn_moe_weighted"), _other_side,
            "the experts' weights are applied on {weights}", _RIGHT_LOGITS,
            "Llama 4 weights what an expert reads, all others what it makes", "apply_router_weight_on_input ignored, or honoured twice",
        ),
        parameters={"weights": ("the other side of the experts", "both")},
        says={"both": "both sides of the experts"},
    ),
    _new(
        "shared-expert-missing", ("ffn_out", "ffn_moe_out_merged"), _no_shared,
        "the shared expert is not added", "wrong from the first layer with experts on",
        "add ffn_*_shexp's result to that of the routed experts", "Mixtral code that loads Qwen2-MoE or DeepSeek",
    ),
    _new(
        "shared-expert-gate-missing", ("ffn_shexp_out", "ffn_shexp_gated"), _no_gate,
        "the shared expert's gate is missing", "wrong from the first layer with experts on",
        "multiply by sigmoid(ffn_gate_inp_shexp · x)", "DeepSeek code that loads Qwen2-MoE",
    ),
    _new(
        "experts-gate-up-swapped", ("ffn_moe_swiglu", "ffn_moe_geglu", "ffn_moe_swiglu_oai"), _swapped,
        "gate and up of the experts are exchanged", "wrong from the first layer with experts on",
        "in a fused tensor the gate's rows come first", "fused gate_up weights split in the wrong order",
    ),
)  # fmt: skip
