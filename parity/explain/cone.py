"""The steps in question at a place: from it back to the recorded points that agree."""

from collections.abc import Sequence

import numpy as np
from msgspec import Struct

from checkpoints.dataflow import is_copy
from checkpoints.points import parse
from engine.faults.base import kinds_of

from .records import Expected
from .state import SearchState, rows_enough


class Cone(Struct, frozen=True):
    """The steps that may be wrong at a place.

    Attributes:
        steps: the names of the steps between the place and the recorded points that agree, the place's own included.
        kinds: the names that a fault's `kinds` may use for them.
        agreeing: the points that agree. sure: all of them were seen as whole rows, at every position that acts on the place's.
    """

    steps: frozenset[str]
    kinds: frozenset[str]
    agreeing: tuple[str, ...]
    sure: bool

    @property
    def layers(self) -> range:
        """The layers of the steps; empty if they lie outside all layers."""
        layers = {layer for name in self.steps if (layer := parse(name).layer) is not None}
        return range(min(layers), max(layers) + 1) if layers else range(0)


def of_ggml(name: str) -> bool:
    """Whether a step makes what no other engine has: a copy without a name, a state or an input of llama.cpp's graph."""
    return is_copy(name) or name.startswith(("state.", "input."))


def cone(entries: Sequence[Expected], state: SearchState) -> Cone:
    """The steps in question at a state's first place.

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
        if at is not None and at < state.first.point and name not in state.shown:
            seen = _agrees(entries[at], state, at, last)
            if seen is not None:
                ends[name] = seen
                continue
        steps.add(name)
        waiting += right[name].names
    kinds = frozenset(kind for name in steps for kind in kinds_of(right[name]))
    return Cone(frozenset(steps), kinds, tuple(name for name in number if name in ends), all(ends.values()))


def _agrees(entry: Expected, state: SearchState, at: int, row: int) -> bool | None:
    """Whether an agreeing point was seen whole, at every position up to a row; None if it does not agree or has no such records."""
    here = entry.rows <= row
    if not here.any() or bool((state.nmse[at] > entry.limit)[here].any()):
        return None
    return len(np.unique(entry.rows[here])) > row and entry.whole_rows
