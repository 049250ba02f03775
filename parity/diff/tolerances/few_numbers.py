"""Rows of which next to nothing may be left: of so few numbers that all of them may cancel (a gate of one number, the scores of the first
positions), or all but zero beside the point's other rows.

The rounding error of such a sum is about the same at every position, while what is left of the sum may be large or next to nothing: errors
are judged in proportion to the point's largest row, or its usual one.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from checkpoints.record import Rows

Floats = NDArray[np.float64]

# Rows with at most this many elements may cancel as a whole: a gate of one number is a product of a whole row. `isolate` uses the same
# number (`parity.isolate.one_pass`).
FEW = 16

# A row with this many times less energy than the usual one of its point is all but zero: limits leave as much above a mean cost
# (`parity.explain.rounding.precision.UPPER`), so that it does not matter which larger row an error is compared with.
_SMALL = 30.0


def share_of_usual(energy: Floats) -> Floats:
    """By what the errors of a point's rows with these energies, [R], are multiplied to be in proportion to its usual row: 1 but for rows
    that are all but zero.
    """
    some = energy[energy > 0]
    return np.minimum(_SMALL * energy / np.median(some), 1.0) if len(some) else np.ones(len(energy))


def share_of_few(rows: Rows) -> Floats:
    """The energy of each record, [R], in proportion to the largest of its point if its rows have few elements; 1 for other rows.

    An error of rounding is about the same at every position of such a point: in proportion to its own row it is larger by this number
    than in proportion to the largest, and so is each bound on what rounding can reach.
    """
    n, l2 = rows.stats.get("n"), rows.stats.get("l2")
    if n is None or l2 is None or not len(rows) or not (n <= FEW).all():
        return np.ones(len(rows))
    energy = np.where(np.isfinite(l2), l2, 0.0) ** 2
    return np.where(energy > 0, energy / max(energy.max(), np.finfo(np.float64).tiny), 1.0)


def worst_of_few(distance: Floats, rows: Rows) -> Floats:
    """The distances of a point's records, [R], adjusted if its rows have few elements; those of other points unchanged.

    Such a row is large at one position and almost nothing at another, depending on how its terms cancel, while the rounding error is
    about the same everywhere: the largest error counts at all positions.
    """
    n, l2 = rows.stats.get("n"), rows.stats.get("l2")
    if n is None or l2 is None or not len(rows) or not (n <= FEW).all():
        return distance
    energy = l2**2
    left = np.where(np.isfinite(distance), distance * energy, 0.0).max()
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.fmax(distance, np.where(energy > 0, left / energy, 0.0))


def shares(of_points: Iterable[Rows]) -> Floats:
    """`share_of_few` of all records of several points, one point after the other."""
    return np.concatenate([share_of_few(rows) for rows in of_points])
