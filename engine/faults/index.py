"""A model's steps by name, with those of each of ggml's operations at hand: a fault may ask for them at every step that it looks at."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property

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
    def numbers_of_weights(self) -> dict[int, int]:
        """The numbers in the names of weights that were asked for, by layer (see `number_of_weights`)."""
        return {}


def of_operation(right: Mapping[str, Step], name: str) -> Sequence[Step]:
    """The steps of an operation of ggml's, in the order of computation."""
    index = right if isinstance(right, StepsByName) else StepsByName(right)
    return index.operations.get(name, ())


def number_of_weights(right: Mapping[str, Step], layer: int) -> int:
    """The number in the names of the weights that most steps of a layer read: another one where layers are repeated.

    Faults may have changed some of these names; it is the layer's own number if none is left.
    """
    known = right.numbers_of_weights if isinstance(right, StepsByName) else {}
    if layer not in known:
        begin = f"blk.{layer}."
        numbers = Counter(number for name, step in right.items() if begin in name for number in _numbers(step))
        known[layer] = numbers.most_common(1)[0][0] if numbers else layer
    return known[layer]


def _numbers(step: Step) -> list[int]:
    return [int(found[1]) for weight in step.weights if (found := _NUMBER.search(weight_name(weight)))]
