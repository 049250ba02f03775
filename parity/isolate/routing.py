"""Choices of experts (and of keys, in sparse attention) compared as sets: their order is of no importance, and ties may fall either way."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.graph import Step, View, name_of

_ORDERS = ("ARGSORT", "TOP_K")
# The share of the last chosen value within which another choice is a near tie: some rounding steps of float32.
NEAR_TIE = 1e-6


@dataclass(frozen=True)
class Routing:
    """A step that orders values: how many of the places are used afterwards."""

    used: int


def routings(steps: Sequence[Step]) -> Mapping[str, Routing]:
    """The steps that choose, by what they make."""
    found: dict[str, Routing] = {}
    for step in steps:
        if getattr(step.op, "name", "") in _ORDERS:
            found[step.makes] = Routing(_used(step, steps))
    return found


def _used(step: Step, steps: Sequence[Step]) -> int:
    """How many of the chosen places other steps read: the longest row of their views."""
    width = 0
    for other in steps:
        for read in other.reads:
            if isinstance(read, View) and name_of(read) == step.makes:
                width = max(width, read.shape[-1].fixed)
            elif read == step.makes:
                return 0
    return width


def routing_error(
    routing: Routing, values: NDArray[np.float32], ours: NDArray[Any], theirs: NDArray[np.float32]
) -> tuple[NDArray[np.float64], str]:
    """0 for each row whose choice is right, infinite for others, and what is to say.

    Args:
        values: what was ordered, with one row a position (float32 [T, E], or any shape of that many elements).
        ours, theirs: the places in order, [T, E] or [T, k].
    """
    rows = len(theirs)
    ordered = theirs.reshape(rows, -1).astype(np.int64)
    values = values.reshape(rows, -1)
    right = np.asarray(ours).reshape(rows, -1).astype(np.int64)
    count = min(routing.used or right.shape[1], right.shape[1])
    if ordered.shape[1] < count:
        return np.full(rows, np.inf), f"{ordered.shape[1]} were chosen instead of {count}"
    errors = np.zeros(rows)
    ties = 0
    for row in range(rows):
        chosen, wanted = set(ordered[row, :count].tolist()), set(right[row, :count].tolist())
        if chosen == wanted:
            continue
        if not all(0 <= place < values.shape[1] for place in chosen) or len(chosen) != count:
            errors[row] = np.inf
            continue
        last = float(values[row, right[row, count - 1]])
        apart = max((abs(float(values[row, place]) - last) for place in chosen ^ wanted), default=0.0)
        if apart <= NEAR_TIE * max(abs(last), 1e-30):
            ties += 1
        else:
            errors[row] = np.inf
    if np.isinf(errors).any():
        return errors, "others were chosen than those with the largest values"
    return errors, f"{ties} near ties fell the other way" if ties else ""
