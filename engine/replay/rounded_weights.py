"""Weights that an engine keeps in a lower type than the file does: norms, biases, an embedding of float32 in BF16 or F16."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from msgspec.structs import replace

from ..backend import Array
from ..graph import Altered, Step, Weight, WeightSource, weight_name, weight_of_step
from .precision import ROUNDINGS


def rounded_weight(weight: Weight, kind: str) -> Altered:
    """A weight rounded to a type of `ROUNDINGS`; rows that are taken from it are rounded as they are taken."""

    def make(source: WeightSource, _name: str) -> Any:
        value = weight_of_step(weight, source)
        return (lambda ids: _rounded(value(ids), kind)) if callable(value) else _rounded(value, kind)

    return Altered(weight_name(weight), make)


def _rounded(value: Array, kind: str) -> Array:
    """A weight, in any precision (the arbiter's float64 too), as an engine that keeps it in this type has it."""
    return ROUNDINGS[kind](value.astype(np.float32)).astype(value.dtype)


def with_rounded_weights(steps: Sequence[Step], kind: str, wanted: Callable[[Step, str], bool]) -> list[Step]:
    """The steps with some of their weights rounded to a type: `wanted` is asked with each step and the weight's name."""
    return [
        replace(step, weights=weights) if weights != step.weights else step
        for step in steps
        for weights in [
            tuple(
                rounded_weight(weight, kind) if weight is not None and wanted(step, weight_name(weight)) else weight
                for weight in step.weights
            )
        ]
    ]
