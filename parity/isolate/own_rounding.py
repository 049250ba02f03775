"""What float32 itself costs an operation: where the terms of a sum cancel, what remains is mostly rounding."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.graph import Step
from engine.replay.wide import is_looked_up

from ..diff.tolerances.truth import BOTH, NO_ROUNDING
from .values import row_errors


def within_own_rounding(
    way: Sequence[Step],
    ours: NDArray[np.float32],
    in_float64: Callable[[], NDArray[Any]],
    positions: NDArray[np.int64],
    errors: NDArray[np.float64],
    limit: float,
    least: NDArray[np.float64] | None = None,
) -> NDArray[np.float64]:
    """Errors of rows, float64 [R], scaled down where they are over the limit and `ours` is itself as far from float64.

    A row's limit is then `BOTH` times our own distance, as two right engines may be twice as far from each other as each is from the truth.
    Values looked up in a table of float16 have no such distance, and distances beyond `NO_ROUNDING` are not float32's.

    Args:
        way: the operation and what leads to it from recorded values, its own first.
        in_float64: gives its value computed in float64.
        least: the least energy of each row, by which the errors were divided as well (`row_errors`).
    """
    if not limit < errors.max() < np.inf or any(is_looked_up(step) for step in way):
        return errors
    own = row_errors(way[0].makes, ours, in_float64(), positions, least)
    raised = np.where(own <= NO_ROUNDING, np.fmax(limit, BOTH * own), limit)
    return np.where(errors > limit, errors * (limit / raised), errors)
