"""Choices of experts (and of keys, in sparse attention), compared as sets: their order does not matter, and ties may fall either way."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from checkpoints.points import parse
from engine import ops
from engine.graph import Step, View, name_of

_ORDERS = ("ARGSORT", "TOP_K")
# The share of the last chosen value within which another choice is a near tie: some rounding steps of float32.
NEAR_TIE = 1e-6


class Routing(Struct, frozen=True):
    """A choice: the step that sorts values, and how many of the resulting indices are used afterwards (0: all)."""

    ordering: Step
    used: int


def routings(steps: Sequence[Step]) -> Mapping[str, Routing]:
    """The choices among a model's steps, by the name of their indices: those of a sorting step, or of the view that cuts them off."""
    ordering = {step.makes: step for step in steps if getattr(step.op, "name", "") in _ORDERS}
    by_layer: dict[str, Routing] = {}
    for step in steps:
        if step.makes in ordering:
            by_layer[step.makes] = Routing(step, _used(step, steps))
        elif step.op is ops.part and name_of(step.reads[0]) in ordering and isinstance(step.reads[0], View):
            by_layer[step.makes] = Routing(ordering[name_of(step.reads[0])], step.reads[0].shape[-1].fixed)
    return by_layer


def choice_in_layer(choices: Collection[str], step: Step) -> str:
    """The first of these choices in a step's layer, "" without one: fewer or more experts give what follows other shapes."""
    layer = parse(step.makes).layer
    return next((name for name in sorted(choices) if parse(name).layer == layer), "")


def _used(step: Step, steps: Sequence[Step]) -> int:
    """How many of the sorted indices other steps read: the longest row of their views."""
    width = 0
    for other in steps:
        for read in other.reads:
            if isinstance(read, View) and name_of(read) == step.makes:
                width = max(width, read.shape[-1].fixed)
            elif read == step.makes:
                return 0
    return width


def routing_error(
    used: int, values: NDArray[np.float32], ours: NDArray[Any], dumped: NDArray[np.float32]
) -> tuple[NDArray[np.float64], str]:
    """0 for each row whose choice is right, infinite for others, and a remark.

    Args:
        used: how many of the first indices are the choice; 0 for all.
        values: the sorted values, one row per position (float32 [T, E], or any shape with that many elements).
        ours, dumped: the indices in order, [T, E] or [T, k].
    """
    rows = len(dumped)
    # What is not finite is no place.
    ordered = np.where(np.isfinite(dumped), dumped, -1).reshape(rows, -1).astype(np.int64)
    values = values.reshape(rows, -1)
    right = np.asarray(ours).reshape(rows, -1).astype(np.int64)
    count = min(used or right.shape[1], right.shape[1])
    if ordered.shape[1] < count:
        return np.full(rows, np.inf), f"{ordered.shape[1]} were chosen instead of {count}"
    errors = np.zeros(rows)
    ties: list[float] = []
    reason = ""
    for row in range(rows):
        chosen, wanted = set(ordered[row, :count].tolist()), set(right[row, :count].tolist())
        if chosen == wanted:
            continue
        if len(chosen) != count or not all(0 <= place < values.shape[1] for place in chosen):
            errors[row], reason = np.inf, reason or f"it chose {', '.join(str(place) for place in ordered[row, :count])}"
            continue
        best = max(wanted - chosen, key=lambda place: values[row, place])
        least = min(chosen - wanted, key=lambda place: values[row, place])
        margin = abs(float(values[row, best]) - float(values[row, least]))
        if margin <= NEAR_TIE * max(abs(float(values[row, best])), 1e-30):
            ties.append(margin)
        else:
            errors[row] = np.inf
            reason = reason or f"it chose {least} ({values[row, least]:.3g}) and not {best} ({values[row, best]:.3g})"
    if reason or not ties:
        return errors, reason
    return errors, f"{len(ties)} near ties fell the other way (margin {max(ties):.1g})"


def other_order(used: int, ours: NDArray[Any], dumped: NDArray[np.float32]) -> NDArray[np.float32]:
    """A right choice in another order than the recorded one, in which its readers may have had it: in our order or, if that is the
    recorded one, in reverse. Arguments as in `routing_error`; shaped like `dumped`.
    """
    rows = len(dumped)
    ordered, right = dumped.reshape(rows, -1), np.asarray(ours).reshape(rows, -1)
    count = min(used or right.shape[1], right.shape[1])
    other = ordered.copy()
    for row in range(rows):
        if np.array_equal(ordered[row, :count], right[row, :count]):
            other[row, :count] = ordered[row, :count][::-1]
        elif set(ordered[row, :count].tolist()) == set(right[row, :count].tolist()):
            other[row, :count] = right[row, :count]
    return other.reshape(dumped.shape)
