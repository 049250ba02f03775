"""Faults of reading weights: those of another layer."""

import re
from collections.abc import Callable
from itertools import count

from msgspec.structs import replace

from .. import ops
from ..graph import Step, Weight, weight_name
from .base import AT, Fault, Parameters, Steps, Values, kind_of, layer_near
from .index import number_of_weights
from .weights import MATRICES

# Operations that read weights of a layer.
_WITH_WEIGHTS = ("MUL_MAT", "RMS_NORM", "NORM", "SOFT_MAX", "MUL_MAT_ID", "ADD_ID", "ADD", "MUL", "SSM_CONV", "SSM_SCAN")
_WHOLE_LAYER = (*MATRICES, "attn_norm", "ffn_norm")
_SAYS = {_WITH_WEIGHTS: "each layer", _WHOLE_LAYER: "each layer"}


def _read_from(weight: Weight, name: str) -> Weight:
    """A weight, in whatever form a step takes it, read from the tensor of that name."""
    return name if isinstance(weight, str) else weight and replace(weight, weight=name)


def _of_layer(step: Step, right: Steps, to: Callable[[int], int]) -> Step:
    """The step with another layer's weights; unchanged if that layer has no such step, or its step has other kinds of weights."""
    layer = layer_near(step)
    if layer is None or not step.weights:
        return step
    other_layer = to(layer)
    if other_layer == layer:
        return step
    wanted = _names_in(step, other_layer)
    other_step = right.get(f"blk.{other_layer}.{kind_of(step)}")
    if other_step is None and step.inner:  # a step without a name of its own is identified by its weights
        others = (other for other in right.values() if other.op == step.op and layer_near(other) == other_layer)
        other_step = next((other for other in others if _names_in(other, other_layer) == wanted), None)
    if other_step is None or _names_in(other_step, other_layer) != wanted:
        return step
    # Another fault may have changed which layer's that step reads; and where layers are computed several times, weights have
    # other numbers than steps.
    names = _names_in(step, number_of_weights(right, other_layer))
    return replace(step, weights=tuple(map(_read_from, step.weights, names)))


def _names_in(step: Step, number: int) -> list[str]:
    """The names of a step's weights in the layer of that number; "" for a weight that this model lacks."""
    return [re.sub(r"\bblk\.\d+\.", f"blk.{number}.", weight_name(weight)) for weight in step.weights]


def _n_layers(right: Steps) -> int:
    return next(layer for layer in count() if f"blk.{layer}.l_out" not in right)


def _parts_of_layer(right: Steps) -> Values:
    """Values of `at`: a whole layer, its usual norms, and each point by itself that is made with weights of a layer."""
    usual = (("attn_norm",), ("ffn_norm",), ("attn_norm", "ffn_norm"))
    norms = _kinds(right, lambda step: step.op in (ops.rms_norm, ops.layer_norm))
    every = dict.fromkeys((*norms, *MATRICES, *_kinds(right, lambda _step: True)))
    return (_WITH_WEIGHTS, _WHOLE_LAYER, *usual, *((kind,) for kind in every if (kind,) not in usual))


def _kinds(right: Steps, of: Callable[[Step], bool]) -> list[str]:
    """The kinds of the points of layers that are made with weights."""
    points = (step for step in right.values() if step.makes.startswith("blk.") and any(step.weights))
    return list(dict.fromkeys(kind_of(step) for step in points if of(step)))


def _offsets(right: Steps) -> Values:
    """Every offset from one layer to another, the next ones first."""
    return tuple(offset for by in range(1, _n_layers(right)) for offset in (by, -by))


def _offset(step: Step, right: Steps, parameters: Parameters) -> Step:
    return _of_layer(step, right, lambda layer: layer + parameters["by"])


def _first_of_two(right: Steps) -> Values:
    return tuple(range(_n_layers(right) - 1))


def _swap_layers(step: Step, right: Steps, parameters: Parameters) -> Step:
    both = (parameters["first"], parameters["first"] + 1)
    return _of_layer(step, right, lambda layer: sum(both) - layer if layer in both else layer)


FAULTS = (
    Fault(
        name="layer-offset",
        kinds=(*_WITH_WEIGHTS, *_WHOLE_LAYER),
        change=_offset,
        what="{at}: the weights are taken from the layer at an offset of {by}",
        symptom="wrong from the first layer on that has it, of plausible size",
        fix="layer i reads blk.i.*, from 0",
        seen="loops from 1",
        parameters={"by": _offsets, AT: _parts_of_layer},
        says=_SAYS,
    ),
    Fault(
        name="layers-swapped",
        kinds=(*_WITH_WEIGHTS, *_WHOLE_LAYER),
        change=_swap_layers,
        what="{at}: layer {first} and the next one have each other's weights",
        symptom="wrong from that layer on, of plausible size",
        fix="sort tensors by their layer's number, not by name (blk.10 before blk.2)",
        seen="names sorted as text",
        parameters={"first": _first_of_two, AT: _parts_of_layer},
        says=dict.fromkeys(_SAYS, "everything"),
        once=True,
    ),
)
