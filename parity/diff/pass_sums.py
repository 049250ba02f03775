"""Sums over all values of a pass, as llama.cpp's eval-callback prints them, held against the other side's statistics.

A log prints few values of a tensor, and the sum of all: of every position of the pass. It stands on the pass's last record
(`pass_sum`, over `pass_rows` positions).
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from checkpoints.record import Dump, Rows

from .align import Pair
from .metrics import Measures, sizes

Floats = NDArray[np.float64]

_PRINTED = 0.5e-6  # half of the last digit of %f
# What summing in float32, value after value, costs, in u·√n·(l2 + |sum|), u = 2^-24. Measured on a real log of the embedded
# model's F32 twin, 678 tensors of 64 to 4,096 values against float64 sums: at most 0.91.
_ROUNDING = 4.0


def with_pass_sums(measures: Measures, pairs: Sequence[Pair], ours: Dump, ref: Dump) -> Measures:
    """The measures, where a printed sum shows an NMSE of the pass: |Σa−Σb| ≤ √n‖a−b‖ gives a lower bound of it.

    It counts as the NMSE of the pass's last record, since it says nothing of a single one.
    """
    if not any("pass_sum" in side.stats for pair in pairs for side in (pair.ours, pair.ref)):
        return measures
    found = np.concatenate(
        [
            np.fmax(_lower_bound(pair.ours, ref.points[pair.point]), _lower_bound(pair.ref, ours.points[pair.point]))
            for pair in pairs
        ]
    )
    return replace(
        measures,
        nmse=np.fmax(measures.nmse, found),
        nmse_row=np.fmax(measures.nmse_row, found),
        bound=measures.bound | (~np.isnan(found) & np.isnan(measures.nmse_row)),
    )


def _lower_bound(printed: Rows, other: Rows) -> Floats:
    """float64 [R], what the sums of one side say against all rows that the other side has of the point; NaN: nothing."""
    nothing = np.full(len(printed), np.nan)
    total, count = printed.stats.get("pass_sum"), printed.stats.get("pass_rows")
    if total is None or count is None or not {"sum", "l2"} <= other.stats.keys() or printed.seq.any() or other.seq.any():
        return nothing
    order = np.argsort(other.token_idx, kind="stable")
    position = other.token_idx[order]
    if (np.diff(position) == 0).any():  # one position twice: which of them the pass had is not known
        return nothing
    first = np.searchsorted(position, printed.token_idx - np.nan_to_num(count).astype(np.int64) + 1)
    last = np.searchsorted(position, printed.token_idx, side="right")

    def over(column: Floats) -> Floats:
        running = np.concatenate([[0.0], np.cumsum(column[order])])
        return np.asarray(running[last] - running[first])

    n, summed, energy = over(sizes(other)), over(other.stats["sum"]), over(other.stats["l2"] ** 2)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        spared = _PRINTED + _ROUNDING * 2.0**-24 * np.sqrt(n) * (np.sqrt(energy) + np.abs(summed))
        bound = np.maximum(np.abs(total - summed) - spared, 0.0) ** 2 / n / energy
    return np.where(last - first == count, bound, np.nan)
