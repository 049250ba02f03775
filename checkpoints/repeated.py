"""Records of one key: do they show the same values?"""

import numpy as np
from numpy.typing import NDArray

from .record import Rows

# Two records of one key count as the same if they differ by no more than two right float32 runs (the limit of exact mode).
_SAME = 1e-10


def same_values(rows: Rows, a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.bool_]:
    """bool [len(a)]: records a[i] and b[i] agree in their values."""
    left, right = rows.values[a].astype(np.float64), rows.values[b].astype(np.float64)
    nonfinite = ~(np.isfinite(left) & np.isfinite(right))
    with np.errstate(invalid="ignore"):
        delta = np.where(nonfinite, 0.0, left - right)
    if rows.quantum is not None:
        delta[np.abs(delta) <= np.maximum(rows.quantum[a], rows.quantum[b])] = 0.0
    equal_odd = np.all(~nonfinite | (left == right) | (np.isnan(left) & np.isnan(right)), axis=1)
    energy = np.sum(np.where(nonfinite, 0.0, right) ** 2, axis=1)
    near = np.sum(delta**2, axis=1) <= _SAME * energy
    equal: NDArray[np.bool_] = (rows.counts[a] == rows.counts[b]) & equal_odd & near
    return equal
