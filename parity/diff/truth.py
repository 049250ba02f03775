"""The limit of a record where the truth is known: a multiple of the reference's own distance from it."""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from checkpoints.record import Rows

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Truth(Protocol):
    """Who knows what the model's steps give in float64 (`parity.arbiter` does)."""

    def distances(self, points: Mapping[str, Rows]) -> dict[str, Floats]:
        """How far records are from the truth: their NMSE, float64 [R] for each point; NaN where it is not known."""


# How far a right float32 engine may be from the reference, in proportion to the reference's own distance from the truth: the worst
# of that position up to that point, since rounding is amplified from layer to layer, and a single record may be near the truth by
# luck. Measured (benchmarks/noise.py --truth -n 10 --tokens 300: NumPy's products and products summed in another order, 156,000
# records, those with an NMSE above 1e-12): at most 48 times; this is twice that.
MULTIPLE = 100.0


# What rounding alone reaches is no more than this (benchmarks/noise.py: 2e-10). A reference that is further from the truth computes
# coarsely there: GELU from ggml's table of F16 is 2e-7 away. A right engine is then as far from it, and not a hundred times as far.
ROUNDING = 1e-8
COARSE = 4.0


def raised(limit: Floats, distance: Floats, point: Ints, seq: Ints, token_idx: Ints, rounding: float = ROUNDING) -> Floats:
    """Every record's limit [R], raised where the reference itself is far from the truth; never lowered.

    Args:
        limit: of each record by the table. distance: NMSE of the reference's record from the truth; NaN where that is not known.
        point, seq, token_idx: int64 [R]; the number of each record's point in dataflow order, its sequence and position.
        rounding: NMSE up to which `MULTIPLE` times the distance is rounding; beyond it is `COARSE` times.
    """
    order = np.lexsort((point, token_idx, seq))
    known = np.where(np.isfinite(distance), distance, 0.0)[order]
    borders = (np.diff(seq[order]) != 0) | (np.diff(token_idx[order]) != 0)
    starts = [0, *(np.flatnonzero(borders) + 1).tolist()]
    worst = np.empty_like(known)
    for begin, end in zip(starts, [*starts[1:], len(order)], strict=True):
        worst[begin:end] = np.maximum.accumulate(known[begin:end])
    made = np.empty_like(known)
    made[order] = np.maximum(np.minimum(MULTIPLE * worst, rounding), COARSE * worst)
    return np.maximum(limit, made)
