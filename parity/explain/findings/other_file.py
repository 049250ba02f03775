"""Embeddings that are no rows of this file's table: most likely the dump is of another model's file."""

import numpy as np

from engine import ops
from engine.faults.edits import ggml
from engine.graph import RowsOf

from ..case import Case
from ..records.records import Expected
from ..search.state import SearchState

OTHER_FILE = (
    "another model's file, a tensor read in a way that no known fault alone has, or another value captured in its place"
)
# The least cosine of a row with itself as a dump has it: lower arithmetic leaves 0.9999 and more. That one of 150,000 random rows is so
# near has a chance of 1e-7 in 16 elements, and of more than a tenth in fewer than 8.
_SAME, _ELEMENTS = 0.99, 8
_TOGETHER = 8192  # rows of the table


def table_of(case: Case, state: SearchState) -> str:
    """The table whose rows, times a number, are a state's first place; "" if anything else leads to it."""
    if state.first is None or state.faults:
        return ""
    right, name = state.planting.right, case.entries[state.first.point].point
    while name in right and ggml(right[name], "SCALE") and len(right[name].names) == 1:
        name = right[name].names[0]
    step = right.get(name)
    weight = step.weights[0] if step is not None and step.op is ops.get_rows and step.weights else None
    return weight.weight if isinstance(weight, RowsOf) else ""


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
    if len(values) < 2 or int(known.sum(axis=1).min()) < _ELEMENTS or not known[entry.present].all() or not sizes.all():
        return True
    columns = slice(0, values.shape[1]) if entry.index is None else entry.index
    count = int(case.transformer.model.tensors[weight].shape[0])
    for begin in range(0, count, _TOGETHER):
        rows = case.transformer.model.load_rows(weight, np.arange(begin, min(begin + _TOGETHER, count)))
        part = rows[:, columns].astype(np.float64)
        energies = (part**2) @ known.T.astype(np.float64) * sizes
        if ((part @ values.T) ** 2 >= _SAME**2 * energies)[energies > 0].any():
            return True
    return False
