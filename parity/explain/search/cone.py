"""The steps in question at a place: from it back to the recorded points that agree."""

from collections.abc import Sequence

import numpy as np
from msgspec import Struct

from checkpoints.dataflow import is_copy
from checkpoints.points import parse
from engine.faults.base import kinds_of
from engine.graph import Step, WeightSource

from ...diff.readings.readings import CLEAR, TELLING
from ..records.beside import Values, beside
from ..records.records import Expected, Floats, Ints
from .state import SearchState, rows_enough


class Cone(Struct, frozen=True):
    """The steps that may be wrong at a place.

    Attributes:
        steps: the names of the steps between the place and the recorded points that agree, the place's own included.
        kinds: the names that a fault's `kinds` may use for them.
        behind: the place is a product that is wrong only in elements that were not recorded (`behind`).
        agreeing: the points that agree. sure: all of them were seen as whole rows, at every position that acts on the place's.
    """

    steps: frozenset[str]
    kinds: frozenset[str]
    agreeing: tuple[str, ...]
    sure: bool
    behind: bool = False

    @property
    def layers(self) -> range:
        """The layers of the steps; empty if they lie outside all layers."""
        layers = {layer for name in self.steps if (layer := parse(name).layer) is not None}
        return range(min(layers), max(layers) + 1) if layers else range(0)


def of_ggml(name: str) -> bool:
    """Whether a step makes what no other engine has: a copy without a name, a state or an input of llama.cpp's graph."""
    return is_copy(name) or name.startswith(("state.", "input."))


def cone(entries: Sequence[Expected], state: SearchState, *, alone: bool = False) -> Cone:
    """The steps in question at a state's first place.

    Args:
        alone: what goes into the place is known to be right (`behind`).

    Raises:
        ValueError: the state has no place that differs.
    """
    if state.first is None:
        raise ValueError("nothing is left to explain")
    # Of an encoder every row of what goes into a place acts there.
    last = rows_enough(state.steps, state.first.row + 1, 1 + max(int(entry.rows.max()) for entry in entries)) - 1
    number = {entry.point: at for at, entry in enumerate(entries)}
    right = state.planting.right
    steps: set[str] = set()
    ends: dict[str, bool] = {}
    waiting = [entries[state.first.point].point]
    while waiting:
        name = waiting.pop()
        if name in steps or name not in right:  # given values: tokens, positions
            continue
        at = number.get(name)
        if alone and steps:
            if at is not None:
                ends[name] = True
            continue
        if at is not None and at < state.first.point and name not in state.shown:
            seen = _agrees(entries[at], state, at, last)
            if seen is not None:
                ends[name] = seen
                continue
        steps.add(name)
        waiting += right[name].names
    kinds = frozenset(kind for name in steps for kind in kinds_of(right[name]))
    return Cone(frozenset(steps), kinds, tuple(name for name in number if name in ends), all(ends.values()), alone)


def mixes(step: Step, weights: WeightSource) -> bool:
    """Whether a step is a product with a matrix, each element of which is made from the whole row that goes in.

    A weight of several matrices, one for each head, makes a head's elements from that head alone.
    """
    matrix = step.weights[0] if step.weights else None
    return "MUL_MAT" in kinds_of(step) and isinstance(matrix, str) and len(weights.raw(matrix)[2]) == 2


def behind(entry: Expected, errors: Floats, values: Values, positions: Ints) -> bool:
    """Whether a point is wrong only in elements that were not recorded, at every record whose error, [R], is over its limit.

    Where a step `mixes`, right elements show the row that goes in to be right: nothing before the product is in question. `values` are the
    state's, by point.
    """
    compared = beside(entry, errors, values, positions)
    if compared is None or compared.dumped.shape[1] < TELLING:
        return False
    wrong = errors > entry.limit
    with np.errstate(over="ignore", invalid="ignore"):
        seen = np.square(compared.dumped - compared.right).sum(axis=1) / entry.energy[wrong]
    return bool(((seen <= entry.limit[wrong]) & (seen * CLEAR <= errors[wrong])).all())


def _agrees(entry: Expected, state: SearchState, at: int, row: int) -> bool | None:
    """Whether an agreeing point was seen whole, at every position up to a row; None if it does not agree or has no such records."""
    here = entry.rows <= row
    if not here.any() or bool((state.nmse[at] > entry.limit)[here].any()):
        return None
    return len(np.unique(entry.rows[here])) > row and entry.whole_rows
