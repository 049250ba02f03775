"""What a wrong record's values say by themselves: what a norm after them removes, how large the row is."""

import numpy as np
from numpy.typing import NDArray

from .align import Pair
from .measure import Measured

Floats = NDArray[np.float64]

# If at least this share of an error's energy is neither a factor nor a constant, or far more than a norm that agrees may be off, a norm
# after it still shows it. The share is a choice: a scaled row leaves only rounding, while a fit of two numbers to noise in ten values
# leaves four fifths of it.
_LEFT = 0.25


def removed_by_a_norm(pair: Pair, row: int, seen: float) -> bool:
    """Whether a row is off by a factor and a constant only: a norm after it removes those, so that its agreement says nothing.

    Args:
        seen: an NMSE that an agreeing norm would certainly show.
    """
    count = int(min(pair.ours.counts[row], pair.ref.counts[row]))
    values = pair.ref.values[row, :count].astype(np.float64)
    delta = pair.ours.values[row, :count] - values
    if not (np.isfinite(delta).all() and delta.any()):
        return True  # the wrong elements were not recorded
    removed = np.stack([values, np.ones(count)], axis=1)
    left = delta - removed @ np.linalg.lstsq(removed, delta, rcond=None)[0]
    return bool(float(left @ left) < min(_LEFT * float(delta @ delta), seen * float(values @ values)))


def energies(measured: Measured) -> Floats:
    """‖b‖² of the reference's whole rows, [R]; of the slice if it is not recorded."""
    of_points: list[Floats] = []
    for pair in measured.pairs:
        values = np.nan_to_num(pair.ref.values.astype(np.float64), posinf=0.0, neginf=0.0)
        sliced = np.sum(values**2, axis=1)
        l2 = pair.ref.stats.get("l2")
        of_points.append(sliced if l2 is None else np.where(np.isnan(l2), sliced, l2**2))
    return np.concatenate(of_points) if of_points else np.zeros(0)
