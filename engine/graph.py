"""A model is a list of steps; this is what a step is and the loop that runs them.

Running, isolating and explaining use the same list: run all steps, run one with given inputs, or run a list in which
one step was replaced.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .backend import Array

TOKENS = "tokens"
POSITIONS = "positions"
PASSES = "passes"  # the number of the forward pass that each position belongs to: 0 for the prompt, then 1, 2, …


@dataclass(frozen=True)
class History:
    """A step reads rows 0…t of a value: those of earlier passes come from the KV cache."""

    of: str


@dataclass(frozen=True)
class RowsOf:
    """A step takes single rows of a weight: it gets a function ids -> rows, so that only those are dequantised."""

    weight: str


@dataclass(frozen=True)
class Altered:
    """A weight that is not read as the file says: `make(source, name)` gives it. Faults are planted with it."""

    weight: str
    make: Callable[["WeightSource", str], Array]


@dataclass(frozen=True)
class Step:
    """One operation: `makes = op(*reads, *weights, **params)`.

    `reads` names values made by earlier steps (or `tokens`, `positions`, `passes`), or their `History`; a weight of None stands
    for an optional one that this model lacks.
    """

    makes: str
    op: Callable[..., Array]
    reads: tuple[str | History, ...]
    weights: tuple[str | RowsOf | Altered | None, ...] = ()
    params: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the values that it reads, histories included."""
        return tuple([read.of if isinstance(read, History) else read for read in self.reads])


class WeightSource(Protocol):
    """Where steps get their weights from."""

    def raw(self, name: str) -> tuple[NDArray[np.uint8], int, tuple[int, ...]]:
        """The file's own bytes [rows, bytes a row], their ggml type and the weight's shape."""

    def array(self, host: NDArray[Any]) -> Array:
        """A host array on the side where the steps compute."""

    def get(self, name: str) -> Array:
        """The whole weight, float32."""

    def rows(self, name: str, ids: Array) -> Array:
        """The given rows of it, float32."""


class Cache(Protocol):
    """What `History` is read from."""

    def append(self, name: str, rows: Array) -> None:
        """Add the rows of this pass."""

    def read(self, name: str) -> Array:
        """Rows 0…t."""


Tap = Callable[[str, Array], None]


def compute(step: Step, inputs: Sequence[Array], weights: WeightSource) -> Array:
    """Run one step on given inputs, in the order of `step.reads`."""
    arguments = [_weight(weight, weights) for weight in step.weights]
    return step.op(*inputs, *arguments, **step.params)


def _weight(weight: str | RowsOf | Altered | None, source: WeightSource) -> Any:
    if isinstance(weight, Altered):
        return weight.make(source, weight.weight)
    if isinstance(weight, RowsOf):
        return lambda ids: source.rows(weight.weight, ids)
    return None if weight is None else source.get(weight)


def run(
    steps: Sequence[Step], values: dict[str, Array], weights: WeightSource, cache: Cache, tap: Tap, keep: Iterable[str] = ()
) -> dict[str, Array]:
    """Compute every step, hand each result to the tap, drop what nobody reads any more.

    Args:
        values: what is given: `tokens`, `positions` and `passes`, or the last value that is known when a run starts in the middle.
        keep: names to return beside the last step's.

    Returns:
        The last step's value and the kept ones, by name.
    """
    last_use = {name: index for index, step in enumerate(steps) for name in step.names}
    remembered = {read.of for step in steps for read in step.reads if isinstance(read, History)}
    wanted = {*keep, steps[-1].makes} if steps else set(keep)
    live = dict(values)
    for name in remembered & live.keys():
        cache.append(name, live[name])
    for index, step in enumerate(steps):
        inputs = [cache.read(read.of) if isinstance(read, History) else live[read] for read in step.reads]
        made = compute(step, inputs, weights)
        tap(step.makes, made)
        live[step.makes] = made
        if step.makes in remembered:
            cache.append(step.makes, made)
        for name in (*step.names, step.makes):
            if last_use.get(name, -1) <= index and name not in wanted:
                live.pop(name, None)
    return {name: live[name] for name in wanted if name in live}
