"""A model's steps by name, with those of each of ggml's operations at hand: a fault may ask for them at every step that it looks at."""

from collections.abc import Mapping, Sequence
from functools import cached_property

from ..graph import Step
from ..lift.node import GgmlOperation


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


def of_operation(right: Mapping[str, Step], name: str) -> Sequence[Step]:
    """The steps of an operation of ggml's, in the order of computation."""
    index = right if isinstance(right, StepsByName) else StepsByName(right)
    return index.operations.get(name, ())
