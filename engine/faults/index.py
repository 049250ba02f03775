"""A model's steps by name, with those of each of ggml's operations at hand: a fault may ask for them at every step that it looks at."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property

from checkpoints.points import parse

from ..graph import Step, weight_name
from ..lift.node import GgmlOperation

_NUMBER = re.compile(r"\bblk\.(\d+)\.")


class StepsByName(dict[str, Step]):
    """The steps by name."""

    @cached_property
    def operations(self) -> Mapping[str, Sequence[Step]]:
        """The steps of each operation of ggml's."""
        of: dict[str, list[Step]] = {}
        for step in self.values():
            if isinstance(step.op, GgmlOperation):
                of.setdefault(step.op.name, []).append(step)
        return of

    @cached_property
    def numbers_of_weights(self) -> Mapping[int, int]:
        """The number in the names of the weights that most steps of a layer read, by layer: another one where layers are repeated."""
        of: dict[int, Counter[int]] = {}
        for step in self.values():
            layer = parse(step.makes).layer
            if layer is not None:
                of.setdefault(layer, Counter()).update(_numbers(step))
        return {layer: numbers.most_common(1)[0][0] for layer, numbers in of.items() if numbers}


def of_operation(right: Mapping[str, Step], name: str) -> Sequence[Step]:
    """The steps of an operation of ggml's, in the order of computation."""
    index = right if isinstance(right, StepsByName) else StepsByName(right)
    return index.operations.get(name, ())


def number_of_weights(right: Mapping[str, Step], layer: int) -> int:
    """The number in the names of a layer's weights, of which other faults may have changed some; the layer's own if it has none."""
    index = right if isinstance(right, StepsByName) else StepsByName(right)
    return index.numbers_of_weights.get(layer, layer)


def _numbers(step: Step) -> list[int]:
    return [int(found[1]) for weight in step.weights if (found := _NUMBER.search(weight_name(weight)))]
