"""Which of many small changes of a model a point's errors may follow, judged by the first rows alone, for all changes together.

A change that explains nearly all of the errors also explains those of the first rows, and moves no row before them. A change in another
direction does not. Seeing that takes one pass over few rows for all changes together, instead of one pass over all rows for each.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engine.graph import Step, sees_later
from engine.replay.replay import Edits

from ..budget import Budget
from ..case import Case
from ..records.records import Expected, Floats

# The errors that the first rows hold, as a multiple of what a change may leave in all rows: of a change of another direction they show
# twice as much as that, of which sixteen random elements lie half along it once in 700 times.
_SHOWN = 2.0
_ROWS = 1024  # rows computed at once: a bound on the memory


def may_follow(
    case: Case,
    entry: Expected,
    wanted: Floats,
    known: NDArray[np.bool_],
    changed: Sequence[Sequence[Step]],
    budget: Budget,
    left: float,
) -> list[bool]:
    """Whether the errors of a point may follow each of these changes, as far as its first rows say.

    Args:
        wanted: [R, k], the errors of the recorded elements in proportion to their record's size, 0 where they are not `known`.
        changed: lists of steps up to the point that have the names of the right ones.
        left: the share of the errors' energy that a change may leave in all rows: one that leaves more in the first ones is none.
    """
    energy = (wanted * wanted).sum(axis=1)
    most = left * float(energy.sum())
    rows = _rows_with(entry, energy, _SHOWN * most)
    if 2 * rows > len(case.positions) or sees_later(case.transformer.steps) or not changed:
        return [True] * len(changed)
    steps = case.transformer.steps[: len(changed[0])]
    here = entry.rows < rows
    replay = case.make(steps, rows, case.replay)
    right = entry.taken(replay.on_host[entry.point], case.positions[:rows])
    backend, positions, size = case.transformer.backend, case.positions[:rows], np.sqrt(entry.energy[here])[:, None]
    may: list[bool] = []
    together = max(1, _ROWS // rows)
    for begin in range(0, len(changed), together):
        edits = [_edits(steps, version) for version in changed[begin : begin + together]]
        run = replay.run_batch(edits, len(steps), frozenset(), lambda _name, _value: (), budget.over)
        for values in run:
            value = None if values is None else values.get(entry.point)
            if values is None or value is None:
                may.append(values is None)  # not known; or nothing moves here, where the errors begin
                continue
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                moved = (entry.taken(backend.to_host(value), positions) - right) / size
            may.append(not _unexplained(np.where(known[here], moved, 0.0), wanted[here]) > most)
    return may


def _rows_with(entry: Expected, energy: Floats, wanted: float) -> int:
    """How many first rows hold that much of the errors' energy: [R]."""
    order = np.argsort(entry.rows, kind="stable")
    held = np.cumsum(energy[order]) >= wanted
    return int(entry.rows[order][np.argmax(held)]) + 1


def _edits(steps: Sequence[Step], changed: Sequence[Step]) -> Edits:
    """The steps of a changed list that are not the right one's."""
    pairs = enumerate(zip(steps, changed, strict=True))
    return {number: (other,) for number, (step, other) in pairs if other is not step}


def _unexplained(moved: Floats, wanted: Floats) -> float:
    """The wanted energy that does not lie along a move; NaN where that is no number, and decides nothing."""
    total, size = float((wanted * wanted).sum()), float((moved * moved).sum())
    return total - float((moved * wanted).sum()) ** 2 / size if size > 0 else total
