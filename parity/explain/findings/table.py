"""The table of embeddings at a state's first place, and how records are held beside its rows."""

import numpy as np
from numpy.typing import NDArray

from engine import ops
from engine.faults.edits import ggml
from engine.graph import RowsOf

from ..case import Case
from ..records.records import Expected
from ..search.state import SearchState

# That one of 150,000 random rows has the direction of a record, to a cosine of 0.99, has a chance of 1e-7 in 16 elements, and of more than
# a tenth in fewer than 8.
ELEMENTS = 8
TOGETHER = 8192  # rows of the table


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


def columns_of(entry: Expected) -> slice | NDArray[np.int64] | None:
    """Which elements of a row records have; None if each has others."""
    if entry.index is None:
        return slice(0, entry.values.shape[1])
    return entry.index[0] if len(entry.index) and (entry.index == entry.index[0]).all() and entry.present.all() else None
