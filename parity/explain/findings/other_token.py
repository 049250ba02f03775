"""Embeddings that are rows of this file's table, but of other tokens than the dump's."""

from collections.abc import Sequence

import numpy as np

from engine.backend import Array

from ..case import Case
from ..records.records import Expected, Floats, Ints
from ..search.state import SearchState
from .table import ELEMENTS, TOGETHER, columns_of, table_of

_SAID = 4  # positions that a sentence names


def of_other_tokens(case: Case, state: SearchState, entry: Expected, errors: Floats) -> str:
    """The sentence that wrong embeddings are those of other tokens; "" if any of them is not."""
    weight, columns = table_of(case, state), columns_of(entry)
    wrong = np.flatnonzero(errors > entry.limit)
    known = entry.present & np.isfinite(entry.values)
    if not weight or columns is None or not len(wrong) or int(known[wrong].sum(axis=1).min()) < ELEMENTS:
        return ""
    right = case.replay.on_host[entry.point]
    factor = _factor(case, right, weight)
    ids = _nearest(case, entry, wrong, weight, factor)
    rows = entry.rows[wrong]
    read = right.copy()
    read[rows] = case.transformer.model.load_rows(weight, ids) * np.float32(factor)
    if not (entry.nmse(read, case.positions)[wrong] <= entry.limit[wrong]).all():
        return ""
    return _sentence(case.positions[rows].tolist(), ids.tolist(), [case.tokens[row] for row in rows.tolist()])


def _factor(case: Case, right: Array, weight: str) -> float:
    """The number by which the model multiplies rows of the table; 0 if those of the dump's tokens are all zeros, which show none."""
    table = case.transformer.model.load_rows(weight, np.asarray(case.tokens)).astype(np.float64)
    energy = float(np.square(table).sum())
    return float((table * right).sum()) / energy if energy else 0.0


def _nearest(case: Case, entry: Expected, wrong: Ints, weight: str, factor: float) -> Ints:
    """The token whose row of the table, times a factor, is nearest to each of these records: [W]."""
    known = (entry.present & np.isfinite(entry.values))[wrong].astype(np.float64)
    values = np.where(known > 0, entry.values[wrong], 0.0)
    columns = columns_of(entry)
    count = int(case.transformer.model.tensors[weight].shape[0])
    best, ids = np.full(len(wrong), np.inf), np.zeros(len(wrong), np.int64)
    for begin in range(0, count, TOGETHER):
        rows = case.transformer.model.load_rows(weight, np.arange(begin, min(begin + TOGETHER, count)))
        part = rows[:, columns].astype(np.float64) * factor
        apart = np.square(part) @ known.T - 2 * part @ values.T  # but for the records' own lengths
        least = apart.argmin(axis=0)
        smallest = apart[least, np.arange(len(wrong))]
        ids, best = np.where(smallest < best, begin + least, ids), np.minimum(smallest, best)
    return ids


def _sentence(positions: Sequence[int], ids: Sequence[int], tokens: Sequence[int]) -> str:
    """What is said of these positions, where rows of these ids stand in place of those of the dump's tokens."""
    places = ", ".join(
        f"position {position} has the row of token {other} instead of {token}"
        for position, other, token in list(zip(positions, ids, tokens, strict=True))[:_SAID]
    )
    more = f", and {len(ids) - _SAID} more positions those of others" if len(ids) > _SAID else ""
    return f"{places}{more}: another id was looked up, or the table has another row in that place"
