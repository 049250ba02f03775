"""Garbage at single rows of the logits: a fault that cannot be planted, but that the numbers name by themselves."""

from collections.abc import Mapping, Sequence

import numpy as np

from checkpoints.answers.explain import Cause, Named
from checkpoints.points import LOGITS
from engine.backend import Array

from ..records.records import Expected, Ints
from ..search.state import SearchState

NAME = "logits-garbage"
_SHOWN = 8  # ids that a sentence lists


def garbage(
    entries: Sequence[Expected], state: SearchState, values: Mapping[str, Array], positions: Ints, differing: int
) -> Cause | None:
    """The cause "these ids' logits are garbage", if it is all that a state leaves unexplained.

    What is left must be at the logits, at the same minority of the recorded ids in every wrong record, and every
    other recorded id must agree there within the limit of its record.
    """
    if state.first is None or entries[state.first.point].point != LOGITS:
        return None
    entry = entries[state.first.point]
    wrong = state.nmse[state.first.point] > entry.limit
    dumped, right = entry.values[wrong], entry.taken(values[LOGITS], positions)[wrong]
    delta = np.where(entry.present[wrong], np.nan_to_num(dumped - right, nan=np.inf), 0.0)
    ids = np.arange(dumped.shape[1])[None, :].repeat(len(dumped), axis=0) if entry.index is None else entry.index[wrong]
    with np.errstate(over="ignore"):
        bad = delta**2 > (entry.limit * entry.energy)[wrong][:, None]  # alone a larger error than the whole record may have
    rest = (np.where(bad, 0.0, delta) ** 2).sum(axis=1) > (entry.limit * entry.energy)[wrong]
    each = [frozenset(ids[row, bad[row]].tolist()) for row in range(len(ids))]
    if rest.any() or len(set(each)) != 1 or not 0 < 2 * len(each[0]) < entry.present[wrong].sum(axis=1).min():
        return None
    rows = sorted(each[0])
    listed = f"{', '.join(map(str, rows[:_SHOWN]))}{', …' if len(rows) > _SHOWN else ''}"
    sentence = f"the logits of single ids are garbage: {listed}; the other recorded ids agree at the same positions"
    left = np.where(bad, 0.0, delta)
    return Cause(
        named=Named(NAME, {"ids": rows}, None, sentence),
        explained=1.0,
        records=differing,
        nmse=float(((left**2).sum(axis=1) / entry.energy[wrong]).max()),
        symptom="everything up to output_norm is right, single logits are not; occasionally a strange token is chosen",
        fix=f"these rows of the output matrix or of its product: `parity isolate --rows {','.join(map(str, rows[:_SHOWN]))}`",
        seen="kernels whose last blocks of rows have a race or read beyond the matrix",
    )
