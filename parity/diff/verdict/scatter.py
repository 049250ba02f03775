"""Whether errors are noise like rounding's: without a direction, equally in all parts of the elements, and at every position."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Share of an error's energy that is along the values themselves (another scale, another epsilon), on average over the positions, whatever
# their size, or the same at every position (a constant, a bias). A choice: normal noise in the smallest sample that is judged, three
# positions of ten values, exceeds the first in 1 of 1,000 draws and the second in 2; with seven positions of sixteen values none of
# 200,000 did.
_ALONG, _COMMON = 0.4, 0.7
# A single position is along its values, as by a wrong scale of that position, if noise would be so in one of 10^6 draws of as many
# elements of equal weight, and if that is this many times as much as at the usual position: truncation is along all of them.
_CHANCE, _UNUSUAL = 1e-6, 4.0
# The rounding of n inputs of a product moves its results, however many, in n directions: 2,048 logits of 64 inputs were along their values
# by more than as many normal numbers are. Small models have that width.
_DIRECTIONS = 64.0
_FEWEST = 8.0  # elements of equal weight: of fewer, one decides
# The share along the values of rows that are the right ones times a factor: what is left may be the rounding of the row. Factors that were
# rounded themselves are off by half a step of F16 at most, to either side: as many to one side by chance once in 64 draws of seven.
_SCALED, _ROUNDED, _MANY = 0.9, 2.0**-11, 7
# Errors of two rows are the same, and their values are not. A choice: errors of a shift of what an expert reads had a cosine of 1 to six
# digits (edits.py --from 195058); of ten normal numbers one pair in 3 × 10^8 reaches 0.99.
_SAME, _UNLIKE, _FEWEST_ALIKE = 0.99, 0.9, 10
_POSITIONS = 3  # fewer do not distinguish noise from a constant
# Rounding of a product to one type costs about as much at each position, NMSE: of the products of three layers of a small qwen3, seven
# tokens, F16, BF16 and sums in F16, at most 17 times as much with 16 values per row and 3.2 times with all; three times the former.
SIMILAR = 50.0
# An element is exactly right if it is off by less than this part of its row's root mean square: float32's own noise at an operation is a
# part in a million, F16's rounding 200 times that.
_EXACT = 3e-6
# The share of elements of a usual size (a twentieth of the root mean square and more) that may be. Rounding's errors have one size there:
# less than one element in 50 is right to that by luck. The share is a choice.
_USUAL, _PART, _FEWEST_USUAL = 0.05, 0.25, 16


def is_scatter(ours: Floats, right: Floats) -> bool:
    """Whether the errors of rows [R, k] are neither along the values nor the same at every position; False where there are none."""
    if not ours.size or not (np.isfinite(ours).all() and np.isfinite(right).all()):
        return False
    delta = ours - right
    energy = float((delta * delta).sum())
    if energy == 0:
        return False
    common = len(delta) * float((delta.mean(axis=0) ** 2).sum()) / energy
    if one_is_scaled(delta, right):
        return False
    return share_along(delta, right) <= _ALONG and (common <= _COMMON or len(delta) == 1)


def recurs(delta: Floats, values: Floats) -> bool:
    """Whether two rows of unlike values [R, k] have the same errors [R, k]: those of an expert, say, and no rounding of the values."""
    if delta.shape[1] < _FEWEST_ALIKE:
        return False
    errors, right = (_cosines(rows) for rows in (delta, values))
    return bool(((errors > _SAME) & (np.abs(right) < _UNLIKE)).any())


def _cosines(rows: Floats) -> Floats:
    """The cosine of each two of these rows [R, k]: [R, R]; 0 of a row of zeros."""
    sizes = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = np.divide(rows, sizes, out=np.zeros_like(rows), where=sizes > 0)
    return np.asarray(unit @ unit.T)


def is_scaled(ours: Floats, right: Floats) -> bool:
    """Whether rows [R, k] are the right ones times factors that are all on one side of 1; False where that may be a factor's rounding."""
    if not ours.size or not (np.isfinite(ours).all() and np.isfinite(right).all()):
        return False
    delta = ours - right
    shares, sizes = _shares(delta, right)
    if not len(shares) or (shares < np.maximum(_SCALED, _by_chance(sizes))).any():
        return False
    factors = (delta * right).sum(axis=1) / (right * right).sum(axis=1)
    alike = bool((factors > 0).all() or (factors < 0).all())
    return alike and (len(factors) >= _MANY or float(np.abs(factors).min()) > _ROUNDED)


def share_along(delta: Floats, values: Floats) -> float:
    """The share of the energy of errors [R, k] that is along the values [R, k], on average over the rows that have an error."""
    shares = _shares(delta, values)[0]
    return float(shares.mean()) if len(shares) else 0.0


def one_is_scaled(delta: Floats, values: Floats) -> bool:
    """Whether errors [R, k] of any row are along its values [R, k] to a degree that neither noise nor the other rows reach: its scale
    is wrong."""
    shares, sizes = _shares(delta, values)
    if len(shares) < _POSITIONS:
        return False
    return bool(((sizes >= _FEWEST) & (shares > _by_chance(sizes)) & (shares > _UNUSUAL * np.median(shares))).any())


def _by_chance(sizes: Floats) -> Floats:
    """The share along any given direction that `sizes` normal random numbers exceed with probability `_CHANCE`: [R].

    The share of n numbers exceeds s with probability (1 − s)^((n − 1) / 2), to within a factor of about 1.
    """
    return np.asarray(1 - _CHANCE ** (2 / (np.maximum(sizes, 2.0) - 1)))


def _shares(delta: Floats, values: Floats) -> tuple[Floats, Floats]:
    """Of each row that has an error: the share of its energy along the values, and as how many elements of equal weight these count."""
    energies = (delta * delta).sum(axis=1) * (values * values).sum(axis=1)
    known = energies > 0
    delta, values = delta[known], values[known]
    shares = (delta * values).sum(axis=1) ** 2 / energies[known]
    sizes = [(rows * rows).sum(axis=1) ** 2 / (rows**4).sum(axis=1) for rows in (delta, values)]
    return shares, np.minimum(np.minimum(*sizes), _DIRECTIONS)


def spares_elements(errors: Floats, right: Floats, known: NDArray[np.bool_]) -> bool:
    """Whether a part of the elements of a wrong point is exactly right: a fault of some elements, or of a head, and no rounding.

    Args:
        errors, right: [R, k], recorded elements minus the right ones, and those; `known` where they are.
    """
    wrong = known.any(axis=1) & (np.where(known, errors, 0.0) != 0).any(axis=1)
    errors, right, known = errors[wrong], right[wrong], known[wrong]
    counts = np.maximum(known.sum(axis=1, keepdims=True), 1)
    size = np.sqrt((np.where(known, right, 0.0) ** 2).sum(axis=1, keepdims=True) / counts)
    usual = known & (np.abs(right) >= _USUAL * size)
    exact = usual & (np.abs(errors) <= _EXACT * size)
    return bool(usual.sum() >= _FEWEST_USUAL and exact.sum() >= _PART * usual.sum())
