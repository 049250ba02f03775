"""Which of many small changes of a model may be what a point's errors follow, by the first rows alone and computed together.

A change that explains the errors explains those of the first wrong row, too, and moves no row before it. A change of another direction
does not; to see that costs one pass over few rows for all changes, where each over all rows costs a pass of its own.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engine.graph import Step, sees_later
from engine.replay.replay import Edits

from .budget import Budget
from .case import Case
from .records import Expected, Floats

# The least share of the first rows' errors that lies along a change; of all rows' errors 98 % has to, later. Sixteen random elements
# reach it once in 700 times.
_LEAST = 0.5
_WRONG = 0.1  # share of the mean record's errors from which on a row counts as wrong: five times what may follow no change
_MOST_ROWS = 8  # with more rows all of them are little dearer
_TOGETHER = 64  # changes computed at once: a bound on the memory


def may_follow(
    case: Case, entry: Expected, wanted: Floats, known: NDArray[np.bool_], changed: Sequence[Sequence[Step]], budget: Budget
) -> list[bool]:
    """Whether the errors of a point may follow each of these changes, as far as its first rows say.

    Args:
        wanted: [R, k], the errors of the recorded elements in proportion to their record's size, 0 where they are not `known`.
        changed: lists of steps up to the point that have the names of the right ones.
    """
    energy = (wanted * wanted).sum(axis=1)
    rows = int(entry.rows[energy >= _WRONG * energy.mean()].min()) + 1
    if rows > _MOST_ROWS or 2 * rows > len(case.positions) or sees_later(case.transformer.steps) or not changed:
        return [True] * len(changed)
    steps = case.transformer.steps[: len(changed[0])]
    here = entry.rows < rows
    replay = case.make(steps, rows, case.replay)
    right = entry.taken(replay.on_host[entry.point], case.positions[:rows])
    backend, positions, size = case.transformer.backend, case.positions[:rows], np.sqrt(entry.energy[here])[:, None]
    may: list[bool] = []
    for begin in range(0, len(changed), _TOGETHER):
        edits = [_edits(steps, version) for version in changed[begin : begin + _TOGETHER]]
        run = replay.run_batch(edits, len(steps), frozenset(), lambda _name, _value: (), budget.over)
        for values in run:
            value = None if values is None else values.get(entry.point)
            if values is None or value is None:
                may.append(values is None)  # not known; or nothing moves here, where the errors begin
                continue
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                moved = (entry.taken(backend.to_host(value), positions) - right) / size
            may.append(_share(np.where(known[here], moved, 0.0), wanted[here]) >= _LEAST)
    return may


def _edits(steps: Sequence[Step], changed: Sequence[Step]) -> Edits:
    """The steps of a changed list that are not the right one's."""
    pairs = enumerate(zip(steps, changed, strict=True))
    return {number: (other,) for number, (step, other) in pairs if other is not step}


def _share(moved: Floats, wanted: Floats) -> float:
    """The share of the wanted energy that lies along a move; 1 where that is no number, and decides nothing."""
    product = float((moved * moved).sum() * (wanted * wanted).sum())
    return float((moved * wanted).sum()) ** 2 / product if np.isfinite(product) and product > 0 else 1.0
