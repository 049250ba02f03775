"""A model's steps by name and by ggml operation, since a fault may ask for these at every step that it looks at."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, wraps
from typing import Any, TypeVar, cast

from ..graph import Step, View, name_of, weight_name
from ..lift.node import GgmlOperation

Fact = TypeVar("Fact")

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
    def views(self) -> Mapping[str, Sequence[View]]:
        """The views that steps read of each value."""
        of: dict[str, list[View]] = {}
        for step in self.values():
            for read in step.reads:
                if isinstance(read, View):
                    of.setdefault(name_of(read), []).append(read)
        return of

    @cached_property
    def numbers_of_weights(self) -> dict[int, int]:
        """The results of `number_of_weights` so far, by layer."""
        return {}

    @cached_property
    def facts(self) -> dict[Callable[..., Any], Any]:
        """The results of functions that are asked `once` for a model, by function."""
        return {}


def once(fact: Callable[[Mapping[str, Step]], Fact]) -> Callable[[Mapping[str, Step]], Fact]:
    """The same function of all steps of a model, which is computed once for each list: nobody may change what it returns."""

    @wraps(fact)
    def known(right: Mapping[str, Step]) -> Fact:
        if not isinstance(right, StepsByName):
            return fact(right)
        if fact not in right.facts:
            right.facts[fact] = fact(right)
        return cast(Fact, right.facts[fact])

    return known


def of_operation(right: Mapping[str, Step], name: str) -> Sequence[Step]:
    """The steps of an operation of ggml's, in the order of computation."""
    return _index(right).operations.get(name, ())


def views_of(right: Mapping[str, Step], name: str) -> Sequence[View]:
    """The views that steps read of a value."""
    return _index(right).views.get(name, ())


def _index(right: Mapping[str, Step]) -> StepsByName:
    return right if isinstance(right, StepsByName) else StepsByName(right)


def number_of_weights(right: Mapping[str, Step], layer: int) -> int:
    """The layer number in the names of the weights that most steps of a layer read; it differs from the layer's own where layers are
    repeated.
    Faults may have changed some of these names. If none is left, it is the layer's own number.
    """
    known = right.numbers_of_weights if isinstance(right, StepsByName) else {}
    if layer not in known:
        begin = f"blk.{layer}."
        numbers = Counter(number for name, step in right.items() if begin in name for number in _numbers(step))
        known[layer] = numbers.most_common(1)[0][0] if numbers else layer
    return known[layer]


def _numbers(step: Step) -> list[int]:
    return [int(found[1]) for weight in step.weights if (found := _NUMBER.search(weight_name(weight)))]
