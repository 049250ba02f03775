"""Errors of whole rows, recorded or not: from sketches, from statistics, and from the sums that llama.cpp's eval-callback prints.

Such a log prints few values of a tensor, and the sum of all values of all positions of the pass. The pass's last record has it
(`pass_sum`, over `pass_rows` positions); it is compared with the other side's statistics.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from checkpoints.record import SKETCH_SIZE, Dump, Rows

from .align import Pair

Floats = NDArray[np.float64]

_PRINTED = 0.5e-6  # half of the last digit of %f
# The error of summing in float32, one value after the other, in units of u·√n·(l2 + |sum|), u = 2^-24. Measured on a real log of the
# embedded model's F32 twin, 678 tensors of 64 to 4,096 values against float64 sums: at most 0.91.
_ROUNDING = 4.0
# Of rows whose elements differ by less than the smallest normal float32 (`parity.diff.measured.slices.without_subnormal`): the squared
# error of each; the estimate of a sketch scatters by a quarter, four times as much is allowed.
_SUBNORMAL = 4 * float(np.finfo(np.float32).tiny) ** 2


def sizes(rows: Rows) -> Floats:
    """The length of each record's whole activation, [R]: from `stats.n`, else from its shape, else NaN."""
    n = rows.stats.get("n")
    if n is not None and not np.isnan(n).any():
        return n
    shaped = np.where(rows.sizes < 0, np.nan, rows.sizes)
    return shaped if n is None else np.where(np.isnan(n), shaped, n)


def column(pairs: Sequence[Pair], side: str, name: str) -> Floats:
    """A statistic of all records of one side ("ours" or "ref"), [R]; NaN where a record lacks it."""
    return joined([getattr(p, side).stats.get(name, np.full(len(p.ours), np.nan)) for p in pairs], 0)


def joined(arrays: Sequence[NDArray[np.generic]], width: int) -> Floats:
    """Arrays one after the other, as float64; without any, an array [0] or [0, width]."""
    if not arrays:
        return np.zeros((0, width) if width else 0)
    return (arrays[0] if len(arrays) == 1 else np.concatenate(arrays)).astype(np.float64, copy=False)


def ratio(error: Floats, energy: Floats) -> Floats:
    """error / energy: 0 if there is no error, infinite if there is an error but no energy."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.where(error == 0, 0.0, error / energy)


def whole_rows(pairs: list[Pair], n: Floats, l2: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    """NMSE of the whole rows [R], and whether it is only a bound.

    With sketches: mean of the squared differences of the 32 projections, an unbiased estimate of ‖a−b‖² (relative
    deviation 25 %). Without: | ‖a‖−‖b‖ | ≤ ‖a−b‖ and |Σa−Σb| ≤ √n‖a−b‖, so both give a lower bound, which never blames a
    right engine. Differences that an accumulation in float32 may cause (a few √n ulps) count as none there.
    """
    count = len(n)
    estimate = np.full(count, np.nan)
    start = 0
    for pair in pairs:
        if pair.ours.sketch is not None and pair.ref.sketch is not None:
            difference = pair.ours.sketch.astype(np.float64) - pair.ref.sketch
            estimate[start : start + len(pair.ours)] = np.einsum("ij,ij->i", difference, difference) / SKETCH_SIZE
        start += len(pair.ours)
    ours_l2, ours_sum = column(pairs, "ours", "l2"), column(pairs, "ours", "sum")
    bound = np.fmax((ours_l2 - l2) ** 2, (ours_sum - column(pairs, "ref", "sum")) ** 2 / n)
    energy = l2**2
    estimate = np.where(estimate <= n * _SUBNORMAL, 0.0, estimate)
    bound = np.where(bound <= n * _SUBNORMAL, 0.0, bound)
    bound = np.where(bound <= n * (4 * 2.0**-24) ** 2 * np.maximum(energy, ours_l2**2), 0.0, bound)
    is_bound = np.isnan(estimate)
    error = np.where(is_bound, bound, estimate)
    return np.where(np.isnan(error) | np.isnan(energy), np.nan, ratio(error, energy)), is_bound & ~np.isnan(bound)


def pass_sums(pairs: Sequence[Pair], ours: Dump, ref: Dump) -> Floats | None:
    """The NMSE that printed sums show, [R], NaN where they say nothing; None if neither side has any.

    |Σa−Σb| ≤ √n‖a−b‖ gives a lower bound of the pass's NMSE. It is assigned to the pass's last record, since it says nothing about
    single ones.
    """
    if not any("pass_sum" in side.stats for pair in pairs for side in (pair.ours, pair.ref)):
        return None
    return np.concatenate(
        [
            np.fmax(_lower_bound(pair.ours, ref.points[pair.point]), _lower_bound(pair.ref, ours.points[pair.point]))
            for pair in pairs
        ]
    )


def _lower_bound(printed: Rows, other: Rows) -> Floats:
    """float64 [R], a lower bound of NMSE by the sums of one side against all of the other side's rows of the point; NaN if unknown."""
    nothing = np.full(len(printed), np.nan)
    total, count = printed.stats.get("pass_sum"), printed.stats.get("pass_rows")
    if total is None or count is None or not {"sum", "l2"} <= other.stats.keys() or printed.seq.any() or other.seq.any():
        return nothing
    order = np.argsort(other.token_idx, kind="stable")
    position = other.token_idx[order]
    if (np.diff(position) == 0).any():  # a position occurs twice: which of them the pass had is not known
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
