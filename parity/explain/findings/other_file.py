"""Embeddings that are no rows of this file's table: most likely the dump is of another model's file."""

import numpy as np

from ..case import Case
from ..records.records import Expected
from ..search.state import SearchState
from .table import ELEMENTS, TOGETHER, columns_of, table_of

OTHER_FILE = (
    "another model's file, a tensor read in a way that no known fault alone has, or another value captured in its place"
)
_SAME = 0.99  # the least cosine of a row with itself as a dump has it: lower arithmetic leaves 0.9999 and more


def of_other_file(case: Case, state: SearchState) -> str:
    """The sentence that the first place shows rows of another file's table; "" if it does not, or that cannot be told."""
    weight = table_of(case, state)
    if not weight or state.first is None:
        return ""
    entry = case.entries[state.first.point]
    none = bool(entry.over.all()) and not _any_row(case, entry, weight)
    return f"no recorded row is a row of {weight} in this file, times any number: {OTHER_FILE}" if none else ""


def _any_row(case: Case, entry: Expected, weight: str) -> bool:
    """Whether any record may be a row of the table."""
    known = entry.present & np.isfinite(entry.values)
    values = np.where(known, entry.values, 0.0)
    sizes = (values**2).sum(axis=1)
    columns = columns_of(entry)
    if (
        columns is None
        or len(values) < 2
        or int(known.sum(axis=1).min()) < ELEMENTS
        or not known[entry.present].all()
        or not sizes.all()
    ):
        return True
    count = int(case.transformer.model.tensors[weight].shape[0])
    for begin in range(0, count, TOGETHER):
        rows = case.transformer.model.load_rows(weight, np.arange(begin, min(begin + TOGETHER, count)))
        part = rows[:, columns].astype(np.float64)
        energies = (part**2) @ known.T.astype(np.float64) * sizes
        if ((part @ values.T) ** 2 >= _SAME**2 * energies)[energies > 0].any():
            return True
    return False
