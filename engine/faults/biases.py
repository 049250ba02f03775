"""Faults of the biases of Q, K and V."""

from dataclasses import replace

import numpy as np

from ..graph import Altered, Step
from .base import AT, Fault, Parameters, Steps, sibling, subsets, weight_of

_QKV = ("q", "k", "v")


def _no_bias(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    return step if weight_of(step, 1) is None else replace(step, weights=(weight_of(step, 0), None))


def _bias_twice(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    bias = weight_of(step, 1)
    if not isinstance(bias, str):
        return step
    return replace(step, weights=(weight_of(step, 0), Altered(bias, lambda source, name: source.get(name) * np.float32(2))))


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
        name="bias-twice",
        kinds=_QKV,
        change=_bias_twice,
        what="the bias of {at} is added twice",
        symptom="wrong from the first layer and position on",
        fix="add it once",
        seen="a bias in the product's epilogue, and an add beside it",
        parameters={AT: subsets(*_QKV)},
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
)
