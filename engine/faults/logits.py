"""Faults of the logits."""

import numpy as np
from msgspec.structs import replace

from .. import ops
from ..backend import Array, module_of
from ..graph import PASSES, Step
from .base import Fault, Parameters, Steps
from .weights import altered

_LOGARITHMS, _CENTRED = "log-probabilities", "logits without their mean"


def _rows(weight: Array, order: str) -> Array:
    if order == "reversed":
        return weight[::-1]
    if order == "in two halves":
        return np.roll(weight, weight.shape[0] // 2, axis=0)
    return np.roll(weight, {"one row on": -1, "one row back": 1}[order], axis=0)


def _order(step: Step, _right: Steps, parameters: Parameters) -> Step:
    return altered(step, lambda weight: _rows(weight, parameters["order"]))


def _padding(weight: Array, multiple: int) -> Array:
    """The matrix as if it were padded at the front to a multiple of rows and read from the start of the padding."""
    missing = -weight.shape[0] % multiple
    return np.concatenate([weight[:missing] * 0, weight])[: weight.shape[0]]


def _padded(step: Step, _right: Steps, parameters: Parameters) -> Step:
    return altered(step, lambda weight: _padding(weight, parameters["multiple"]))


def _last_of_pass(x: Array, passes: Array, weight: Array, bias: Array | None = None) -> Array:
    last = (passes[None, :] == passes[:, None]) * module_of(x).arange(1, len(passes) + 1)[None, :]
    return ops.linear(x[last.max(axis=1) - 1], weight, bias)


def _last_only(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    return replace(step, op=_last_of_pass, reads=(*step.reads, PASSES))


def _capped(x: Array, weight: Array, bias: Array | None = None, *, cap: float) -> Array:
    return np.float32(cap) * np.tanh(ops.linear(x, weight, bias) / np.float32(cap))


def _softcap(step: Step, _right: Steps, parameters: Parameters) -> Step:
    return replace(step, op=_capped, params={"cap": parameters["cap"]})


def _as_shown(x: Array, weight: Array, bias: Array | None = None, *, shown: str) -> Array:
    logits = ops.linear(x, weight, bias)
    if shown == _CENTRED:
        return logits - logits.mean(axis=1, keepdims=True, dtype=np.float64).astype(logits.dtype)
    shifted = logits - logits.max(axis=1, keepdims=True)
    total = np.exp(shifted).sum(axis=1, keepdims=True, dtype=np.float64)
    return shifted - np.log(total).astype(np.float32) if shown == _LOGARITHMS else np.exp(shifted) / total.astype(np.float32)


def _normalised(step: Step, _right: Steps, parameters: Parameters) -> Step:
    return replace(step, op=_as_shown, params={"shown": parameters["shown"]})


def _scaled(x: Array, weight: Array, bias: Array | None = None) -> Array:
    return ops.linear(x, weight, bias) / np.float32(np.sqrt(x.shape[1]))


def _scale(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    return replace(step, op=_scaled)


FAULTS = (
    Fault(
        name="logits-row-order",
        kinds=("logits",),
        change=_order,
        what="the rows of the output matrix are in another order ({order})",
        symptom="everything but the logits is right; logits are right but at other ids",
        fix="row i of the output matrix is id i",
        seen="vocabularies sorted or sharded by the loader",
        parameters={"order": ("one row on", "one row back", "reversed", "in two halves")},
        once=True,
    ),
    Fault(
        name="logits-padding",
        kinds=("logits",),
        change=_padded,
        what="the padding of the vocabulary to a multiple of {multiple} is read as its first rows",
        symptom="logits at shifted ids, the first ones 0",
        fix="the padding follows the last id: read n_vocab rows from the start",
        seen="matrices padded for tensor cores",
        parameters={"multiple": (64, 128, 256, 512)},
        once=True,
    ),
    Fault(
        name="logits-last-only",
        kinds=("logits",),
        change=_last_only,
        what="each position shows the logits of the last one",
        symptom="the last position is right, the others all equal it",
        fix="compute logits for every position that is asked for, or record the last one only",
        seen="engines that compute logits once per prompt",
        whole=True,
        once=True,
    ),
    Fault(
        name="logits-softcap",
        kinds=("logits",),
        change=_softcap,
        what="logits are capped, {cap} · tanh(x / {cap}), though the model has no cap",
        symptom="large logits are too small",
        fix="only Gemma 2 caps its logits",
        seen="ports of Gemma code",
        parameters={"cap": (30.0, 50.0, 15.0)},
        once=True,
    ),
    Fault(
        name="logits-normalised",
        kinds=("logits",),
        change=_normalised,
        what="the logits are {shown}",
        symptom="logits of the wrong size; their order is right",
        fix="record the output matrix's product, before the softmax, from the matrix of the file",
        seen="samplers that work in place; output matrices that a loader centres",
        parameters={"shown": (_LOGARITHMS, "probabilities", _CENTRED)},
        once=True,
    ),
    Fault(
        name="logits-scaled",
        kinds=("logits",),
        change=_scale,
        what="the logits are divided by the root of the width",
        symptom="logits too small by a constant factor",
        fix="do not scale",
        seen="T5 and muP code",
        once=True,
    ),
)
