"""What a wrong record's values show by themselves: what a norm after them removes, how large the row is."""

import numpy as np
from numpy.typing import NDArray

from checkpoints.points import of_scores
from checkpoints.record import Rows

from ..limits import LARGEST_ROUNDING, TABLE
from ..measured.align import Pair
from ..measured.measure import Measured, energies
from ..measured.slices import prepare
from ..measured.whole_rows import joined, sizes
from ..tolerances.against_limits import Held
from ..tolerances.few_numbers import share_of_few
from .readings import TELLING, Allowed, agree, side_by_side, wide

Floats = NDArray[np.float64]

# If at least this share of an error's energy is neither a factor nor a constant, or far more than a norm that agrees may be off, a norm
# after it still shows it. The share is a choice: a scaled row leaves only rounding, while a fit of two numbers to noise in ten values
# leaves four fifths of it.
_LEFT = 0.25
_NO_FACTOR = 1e-6  # a factor below is none: the rows are zero, or have nothing in common
_SMALLEST = 8  # elements of the smallest part that a norm is of: a choice; models have heads of 16 and more


def removed_by_a_norm(pair: Pair, row: int, limit: float, seen: float) -> bool:
    """Whether a row is off by a factor and a constant only: a norm after it removes those, so that its agreement says nothing.

    Norms may be of parts of the row, such as heads, each of which has a factor and a constant of its own then.

    Args:
        limit: the NMSE up to which the row would agree.
        seen: an NMSE that an agreeing norm would certainly show.
    """
    count = int(min(pair.ours.counts[row], pair.ref.counts[row]))
    values = pair.ref.values[row, :count].astype(np.float64)
    delta = pair.ours.values[row, :count] - values
    if not np.isfinite(delta).all() or float(delta @ delta) <= limit * float(values @ values):
        return True  # the wrong elements were not recorded
    shown = min(_LEFT * float(delta @ delta), seen * float(values @ values))
    length = sizes(pair.ref)[row]
    whole = count if np.isnan(length) else int(length)
    return any(_left(values, delta, size) < shown for size in range(whole, _SMALLEST - 1, -1) if whole % size == 0)


def _left(values: Floats, delta: Floats, size: int) -> float:
    """The energy of what is neither a factor nor a constant of each part of `size` elements, of values and their errors [n]."""
    starts = np.arange(0, len(values), size)
    count = np.diff([*starts, len(values)])

    def about_means(a: Floats, b: Floats) -> Floats:
        return np.asarray(np.add.reduceat(a * b, starts) - np.add.reduceat(a, starts) * np.add.reduceat(b, starts) / count)

    spread, shared = about_means(values, values), about_means(values, delta)
    factor = np.divide(shared, spread, out=np.zeros(len(starts)), where=spread > 0)
    return float(np.sum(about_means(delta, delta) - factor * shared))


def at_bounds(pair: Pair, row: int, limit: float, made: Pair, made_row: int) -> bool:
    """Whether what is made from a row element by element lies at a bound wherever the row is wrong: a ReLU or a clamp shows no error there.

    Args:
        limit: the NMSE up to which the row would agree.
    """
    count = int(min(pair.ours.counts[row], pair.ref.counts[row], made.ref.counts[made_row]))
    if sizes(pair.ref)[row] != sizes(made.ref)[made_row]:
        return False
    values, results = (rows.values[at, :count].astype(np.float64) for rows, at in ((pair.ref, row), (made.ref, made_row)))
    off = np.square(pair.ours.values[row, :count] - values)
    wrong = results[off > limit * np.mean(np.square(values))]
    if not len(wrong) or not np.isfinite(results).all():
        return False
    bounds = [bound for bound in (results.min(), results.max()) if bound == 0 or np.sum(results == bound) > 1]
    return bool(np.isin(wrong, bounds).all())


def scaled_part(ours: Rows, ref: Rows, allowed: Allowed) -> str:
    """A sentence on rows whose only difference is a factor of some neighbouring elements, such as a head; otherwise empty."""
    a, b = side_by_side(ours, ref)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return ""
    differ = np.flatnonzero(np.square(a - b).sum(axis=0) > allowed.nmse.max() * np.square(b).sum(axis=0))
    if len(differ) < _SMALLEST:
        return ""
    part = slice(int(differ[0]), int(differ[-1]) + 1)
    energy = np.square(b[:, part]).sum()
    factor = float((a[:, part] * b[:, part]).sum() / energy) if energy else 0.0
    if abs(factor) < _NO_FACTOR:
        return ""
    scaled = b.copy()
    scaled[:, part] *= factor
    if not agree(a, scaled, allowed):
        return ""
    if len(differ) == a.shape[1]:
        return f"it is {factor:.6g} times the reference's"
    return f"elements {part.start} to {part.stop - 1} are {factor:.6g} times the reference's, and the others equal"


def summand(ours: Rows, ref: Rows, allowed: Allowed) -> str:
    """A sentence on rows whose every recorded element is off by the same number; otherwise empty."""
    width = int(min(ours.counts.min(), ref.counts.min()))
    a, b = wide(ours.values[:, :width]), wide(ref.values[:, :width])
    if width < TELLING or np.ptp(ref.counts) or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return ""
    off = float(np.mean(a - b))
    if not off or agree(a, b, allowed) or not agree(a - off, b, allowed):
        return ""
    return f"every recorded element is the reference's {'plus' if off > 0 else 'minus'} {abs(off):.6g}"


def share_of_noise(pair: Pair, wrong: NDArray[np.int64], nmse: Floats, held: Held) -> Floats | None:
    """By what the errors of a point's wrong rows, [len(wrong)], are multiplied if they may be noise, as what is made from them agrees.

    That is the energy in proportion to the point's largest row, where rows of few numbers are what is left of sums that all but cancel. In
    a lower arithmetic, whose limits are one for all models, it is the limit in proportion to the largest error that is rounding. None where
    the errors are larger, or not in the values.

    Args:
        held: those rows' limits.
    """
    share = share_of_few(pair.ref)[wrong]
    limit, of_limit = held.limit, held.of_limit
    if 2 * len(wrong) <= len(pair.ref) and bool((of_limit * share <= 1).all()):
        return share
    if not held.lower_arithmetic or not ((limit > TABLE) & (limit < nmse) & (nmse <= LARGEST_ROUNDING)).all():
        return None
    return limit / LARGEST_ROUNDING


def error_energies(measured: Measured) -> Floats:
    """‖a − b‖² of whole rows, [R]: by NMSE or, where a row shows leading values alone or is zero, by those in proportion to its length.

    The NMSE of a slice is in proportion to values that may be next to nothing (`slices.SLICE_FLOOR`), and not to its row.
    """
    energy, measures = energies(measured), measured.measures
    with np.errstate(invalid="ignore", over="ignore"):
        whole, seen = measures.nmse * energy, joined([_of_leading(pair) for pair in measured.pairs], 0)
    whole = np.where(energy > 0, whole, np.where(np.isfinite(measures.nmse), 0.0, np.inf))
    return np.where(np.isnan(measures.nmse_row) | (energy == 0), np.fmin(whole, seen), whole)


def _of_leading(pair: Pair) -> Floats:
    """‖a − b‖² of the values that both sides have, [R], times the length of the row over their number where the row's energy is known."""
    values = prepare(pair)
    difference = values.a.astype(np.float64) - values.b
    shown = np.isfinite(difference)
    error = np.sum(np.where(shown, difference, 0.0) ** 2, axis=1)
    whole = pair.ref.stats.get("l2", np.full(len(error), np.nan))
    times = sizes(pair.ref) / np.fmax(shown.sum(axis=1), 1)
    return np.asarray(error * np.where(np.isnan(whole) | np.isnan(times), 1.0, times))


def in_seen_head(rows: Rows, row: int, scores: Rows, score_row: int, head_size: int | None) -> bool:
    """Whether nothing of a record of queries or keys but its first head was recorded, and of attention's scores, made from it, all of that
    head's up to their own position.
    """
    if head_size is None or rows.indices is not None or scores.indices is not None or not of_scores(scores.point):
        return False
    keys = scores.token_idx[score_row] + 1
    return bool(rows.counts[row] <= head_size and scores.counts[score_row] >= keys)
