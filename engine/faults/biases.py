"""Faults of the biases of Q, K and V."""

from dataclasses import replace

import numpy as np

from ..graph import Altered, Step
from .base import AT, Fault, Parameters, Steps, sibling, subsets, weight_of

_QKV = ("q", "k", "v")


def _no_bias(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    return replace(step, weights=(weight_of(step, 0), None))


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
    """The bias of another projection; of a longer one its first elements, a shorter one is repeated."""
    own, other = weight_of(step, 1), weight_of(sibling(step, right, parameters["of"]), 1)
    if not isinstance(own, str) or not isinstance(other, str):
        return step
    made = Altered(own, lambda source, name: np.resize(source.get(other), source.get(name).shape))
    return replace(step, weights=(weight_of(step, 0), made))


FAULTS = (
    Fault(
        "no-qkv-bias",
        _QKV,
        _no_bias,
        "the bias of {at} is not added",
        "wrong from the first layer and position on",
        "add blk.N.attn_{q,k,v}.bias",
        "Qwen2 ports of Llama code",
        {AT: (*subsets(*_QKV), ("q", "k"), ("q", "v"), ("k", "v"))},
    ),
    Fault(
        "bias-twice",
        _QKV,
        _bias_twice,
        "the bias of {at} is added twice",
        "wrong from the first layer and position on",
        "add it once",
        "a bias in the product's epilogue, and an add beside it",
        {AT: subsets(*_QKV)},
    ),
    Fault(
        "bias-sign",
        _QKV,
        _bias_sign,
        "the bias of {at} is subtracted",
        "wrong from the first layer and position on",
        "add it",
        "beta = −1 in a product's epilogue",
        {AT: subsets(*_QKV)},
    ),
    Fault(
        "bias-of-other",
        _QKV,
        _bias_of,
        "{at} takes the bias of {of}",
        "wrong from the first layer and position on",
        "each projection has a bias of its own",
        "one offset for a fused bias",
        {"of": ("k", "v", "q"), AT: (("q",), ("k",), ("v",), _QKV)},
    ),
)
