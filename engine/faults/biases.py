"""Faults of the biases: of Q, K and V, of other products, of experts."""

from collections.abc import Callable
from typing import Any

import numpy as np
from msgspec.structs import replace

from .. import ops
from ..backend import Array
from ..graph import Altered, Step, WeightSource
from ..inapplicable import NotApplicable
from .base import AT, Fault, Parameters, Steps, Values, kind_of, read_of, sibling, subsets, weight_of
from .edits import HandsOn, WithInput, ggml, maker, only, require

_QKV = ("q", "k", "v")
# Other products that may have a bias; the router's scores are called by what is made of them where no other step is between.
_PRODUCTS = ("wqkv", "wqkv_b", "attn_out", "ffn_gate", "ffn_up", "ffn_out", "ffn_moe_logits", "ffn_moe_probs")
_EXPERTS = ("ffn_moe_gate_biased", "ffn_moe_up_biased", "ffn_moe_down_biased")
_OTHERS = (*_PRODUCTS, *_EXPERTS)
_ANY = ("MUL_MAT", "ADD", "ADD_ID")


def _biased(right: Steps) -> Values:
    """The kinds of other products with a bias in this model: all together, those of the feed-forward, and each alone."""
    biased = {kind_of(step): None for step in right.values() if _number_of_bias(step) is not None and not step.inner}
    kinds = [kind for kind in biased if kind not in _QKV]
    if not kinds:
        return (_OTHERS,)
    groups = (tuple(kinds), tuple(kind for kind in kinds if kind.startswith("ffn")), *((kind,) for kind in kinds))
    return tuple(dict.fromkeys(group for group in groups if group))


def _number_of_bias(step: Step) -> int | None:
    """Which of a step's weights is its bias; None if it has none."""
    number = 0 if ggml(step, "ADD_ID", "ADD") else 1 if step.op is ops.linear else None
    return None if number is None or not isinstance(weight_of(step, number), str) else number


def _missing(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    number = _number_of_bias(step)
    if number is None:
        raise NotApplicable(f"{step.makes} has no bias")
    return only(step, read_of(step, 0)) if number == 0 else replace(step, weights=(weight_of(step, 0), None))


def _twice(source: WeightSource, name: str) -> Array:
    return source.get(name) * np.float32(2)


def _no_bias(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    return step if weight_of(step, 1) is None else replace(step, weights=(weight_of(step, 0), None))


def _bias_twice(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    number = _number_of_bias(step)
    bias = None if number is None else weight_of(step, number)
    if number is None or not isinstance(bias, str):
        return step
    return replace(step, weights=(*step.weights[:number], Altered(bias, _twice)))


def _bias_sign(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    bias = weight_of(step, 1)
    if not isinstance(bias, str):
        return step
    return replace(step, weights=(weight_of(step, 0), Altered(bias, lambda source, name: -source.get(name))))


def _bias_of(step: Step, right: Steps, parameters: Parameters) -> Step:
    """The step with another projection's bias: a longer one is cut, a shorter one repeated."""
    own, other = weight_of(step, 1), weight_of(sibling(step, right, parameters["of"]), 1)
    if not isinstance(own, str) or not isinstance(other, str):
        return step
    repeated = Altered(own, lambda source, name: np.resize(source.get(other), source.get(name).shape))
    return replace(step, weights=(weight_of(step, 0), repeated))


_EXPERT: dict[str, Callable[[Array], Array]] = {
    "expert 0": lambda chosen: chosen * 0,
    "the expert that was chosen first": lambda chosen: chosen * 0 + chosen[..., :1],
    "the expert that was chosen last": lambda chosen: chosen * 0 + chosen[..., -1:],
}


def _of_one_expert(step: Step, _right: Steps, parameters: Parameters) -> Step:
    if not ggml(step, "ADD_ID") or len(step.reads) != 2:
        raise NotApplicable(f"{step.makes} adds no biases of experts")
    return replace(step, op=WithInput(step.op, 1, _EXPERT[parameters["expert"]]))


class _BiasBeside(HandsOn, frozen=True):
    """Experts' results times their weights, to which the biases are added as they are; the last input is the results without biases."""

    def __call__(self, biased: Array, weights: Array, plain: Array, **params: Any) -> Array:
        """[T, k, n] (or flat), [T, k], [T, k, n] -> [T, k · n]."""
        weighted: Array = self.op(plain, weights, **params)
        return weighted + (biased - plain).reshape(weighted.shape)


def _unweighted(step: Step, right: Steps, _parameters: Parameters) -> Step:
    biased = maker(require(step, "MUL"), right)
    if not ggml(biased, "ADD_ID") or len(step.reads) != 2 or not isinstance(read_of(step, 0), str):
        raise NotApplicable(f"{step.makes} weights no biased experts")
    return replace(step, op=_BiasBeside(step.op), reads=(*step.reads, read_of(biased, 0)))


def _of_experts(right: Steps) -> Values:
    """The kinds of sums with an expert's bias: all together, then each alone."""
    kinds = tuple(dict.fromkeys(kind_of(step) for step in right.values() if ggml(step, "ADD_ID")))
    return subsets(*(kinds or _EXPERTS))


FAULTS = (
    Fault(
        name="no-qkv-bias",
        kinds=_QKV,
        change=_no_bias,
        what="the bias of {at} is not added",
        symptom="wrong from the first layer and position on",
        fix="add blk.N.attn_{q,k,v}.bias",
        seen="Qwen2 ports of Llama code",
        parameters={AT: (*subsets(*_QKV), ("q", "k"), ("q", "v"), ("k", "v"))},
    ),
    Fault(
        name="bias-missing",
        kinds=(*_OTHERS, *_ANY),
        change=_missing,
        what="the bias of {at} is not added",
        symptom="wrong from the first layer and position on, of plausible size",
        fix="add the bias of every product that has one: `parity model` lists the tensors",
        seen="Llama code that loads GPT-2, StarCoder 2 or gpt-oss",
        parameters={AT: _biased},
    ),
    Fault(
        name="bias-twice",
        kinds=(*_QKV, *_OTHERS, *_ANY),
        change=_bias_twice,
        what="the bias of {at} is added twice",
        symptom="wrong from the first layer and position on",
        fix="add it once",
        seen="a bias in the product's epilogue, and an add beside it",
        parameters={AT: lambda right: (*subsets(*_QKV), *_biased(right))},
    ),
    Fault(
        name="bias-sign",
        kinds=_QKV,
        change=_bias_sign,
        what="the bias of {at} is subtracted",
        symptom="wrong from the first layer and position on",
        fix="add it",
        seen="beta = −1 in a product's epilogue",
        parameters={AT: subsets(*_QKV)},
    ),
    Fault(
        name="bias-of-other",
        kinds=_QKV,
        change=_bias_of,
        what="{at} takes the bias of {of}",
        symptom="wrong from the first layer and position on",
        fix="each projection has its own bias",
        seen="one offset for a fused bias",
        parameters={"of": ("k", "v", "q"), AT: (("q",), ("k",), ("v",), _QKV)},
    ),
    Fault(
        name="bias-of-other-expert",
        kinds=(*_EXPERTS, "ADD_ID"),
        change=_of_one_expert,
        what="all chosen experts take the bias of {expert}, in {at}",
        symptom="the experts' combined result is wrong, the router's scores are right",
        fix="each chosen expert has its own row of ffn_*_exps.bias",
        seen="biases that a kernel adds without the expert's offset; one row for a whole group of tokens",
        parameters={"expert": tuple(_EXPERT), AT: _of_experts},
    ),
    Fault(
        name="bias-of-expert-unweighted",
        kinds=("ffn_moe_weighted", "MUL"),
        change=_unweighted,
        what="the biases of the experts' last product are added without the router's weights",
        symptom="the experts' combined result is wrong, the router's scores are right",
        fix="weight · (product + bias) for each expert, then the sum",
        seen="biases that are added after the experts' results were combined",
        parameters={AT: (("ffn_moe_weighted",),)},
    ),
)
