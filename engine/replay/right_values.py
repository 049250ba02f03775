"""The values of a replay's own run, each computed when it is first asked for: the right run's, or those of a run with faults in it."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ..backend import Array
from ..graph import TOKENS, Step, WeightSource, compute, inputs_of
from ..inapplicable import NotApplicable
from ..lift.node import GgmlOperation

if TYPE_CHECKING:
    from .replay import Replay

Values = dict[str, Array]

quiet = partial(np.errstate, over="ignore", invalid="ignore", divide="ignore")  # faults may overflow
_CHOICES = frozenset({"TOP_K", "ARGSORT"})


class RightValues(Mapping[str, Array]):
    """The values of the right run; each is computed, with all before it, when it is first asked for.

    `longer` is a run over the same tokens and perhaps more: the values of its first steps, if they are the same, are taken
    from there. No row of them may depend on a later one. From the first step on that is not one of `sure`, faults are planted.

    Raises:
        NotApplicable: faults are planted in the right run's own steps, and the model's shapes do not allow them.
    """

    def __init__(
        self, steps: Sequence[Step], given: Values, weights: WeightSource, longer: "Replay | None", sure: Sequence[Step]
    ) -> None:
        self._computed = given
        self._names = (*given, *(step.makes for step in steps))
        self._known = frozenset(self._names)
        self._steps = tuple(steps)
        self._by_name = {step.makes: step for step in steps}
        self._next = 0 if longer is None else same_start(steps, longer.steps)
        self._longer = longer
        self._sure = same_start(steps, sure)
        self._same = frozenset(step.makes for step in steps[: self._next])
        self._taken = _by_rows(steps[: self._next])
        self._weights = weights

    def __getitem__(self, name: str) -> Array:
        if name not in self._known:
            raise KeyError(name)
        if name not in self._computed and self._longer is not None and name in self._same:
            if name in self._taken:
                self._computed[name] = _first_rows(self._longer.values[name], len(self._computed[TOKENS]))
            else:
                step = self._by_name[name]
                with quiet():
                    self._computed[name] = compute(step, inputs_of(step, self.__getitem__, self._weights), self._weights)
        while name not in self._computed:
            step = self._steps[self._next]
            planted = self._next >= self._sure
            with quiet():
                inputs = inputs_of(step, self.__getitem__, self._weights)
                value = compute_planted(step, inputs, self._weights) if planted else compute(step, inputs, self._weights)
            if planted:
                self._check(step.makes, value)
            self._computed[step.makes] = value
            self._next += 1
        return self._computed[name]

    def _check(self, name: str, value: Array) -> None:
        """Raise NotApplicable if the value of a wrong step has another shape than the longer run's over as many tokens."""
        if self._longer is not None and name in self._longer.values and self._longer.rows == len(self._computed[TOKENS]):
            same_shape(name, value, self._longer.values[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def compute_planted(step: Step, inputs: Sequence[Array], weights: WeightSource) -> Array:
    """Run a step in which, or before which, a fault is planted.

    Raises:
        NotApplicable: no such shapes or rows, where the fault does not fit this model, or another one below it.
    """
    try:
        return compute(step, inputs, weights)
    except (ValueError, IndexError) as error:  # NumPy's
        raise NotApplicable(f"{step.makes}: {error}") from error


def same_shape(name: str, value: Array, right: Array) -> None:
    """Raise NotApplicable if a value has another shape than the right one."""
    if value.shape != right.shape:
        raise NotApplicable(f"{name} has shape {value.shape} instead of {right.shape}")


def same_start(steps: Sequence[Step], others: Sequence[Step]) -> int:
    """How many steps at the start of two lists are identical objects."""
    pairs = enumerate(zip(steps, others, strict=False))
    return next((number for number, (step, other) in pairs if step is not other), min(len(steps), len(others)))


def _by_rows(steps: Sequence[Step]) -> frozenset[str]:
    """The values that over fewer tokens are a part of those over more: rows by position, the same whatever follows.

    Others are values without positions, columns for as many keys as there are, and chosen keys, which of a row with few keys may be
    ones after it; and what is made of these and is no point.
    """
    others: set[str] = set()
    for step in steps:
        of_others = step.inner and not others.isdisjoint(step.names)
        if step.axis is None or of_others or (isinstance(step.op, GgmlOperation) and _follows_length(step, step.op.name)):
            others.add(step.makes)
    return frozenset(step.makes for step in steps) - others


def _follows_length(step: Step, operation: str) -> bool:
    """Whether the rows of a ggml operation's value have as many columns as there are keys, or numbers of keys."""
    columns = step.params["result_shape"][1:] if step.axis == 0 else ()
    read = [size for operand in step.params["operands"] if operand is not None for size in operand.whole]
    return any(not size.constant for size in columns) or (operation in _CHOICES and any(size.cached for size in read))


def _first_rows(value: Array, rows: int) -> Array:
    """A value restricted to the first rows: [T, n] -> [rows, n], attention's [H, T, T] -> [H, rows, rows]."""
    return value[:, :rows, :rows] if value.ndim == 3 else value[:rows]
