"""Whether errors are noise, as rounding makes it: along nothing, in no part of the elements more than in others, at every position."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Share of an error's energy that is along the values themselves (another scale, another epsilon), on average over the positions, whatever
# their size, or the same at every position (a constant, a bias). A choice: normal noise in the smallest sample that is judged, three
# positions of ten values, exceeds the first in 1 of 1,000 draws and the second in 2; with seven positions of sixteen values none of
# 200,000 did.
_ALONG, _COMMON = 0.4, 0.7
# A single position is along its values, as by a wrong scale of that position, if noise would be so in one of 10^6 draws of as many
# elements of equal weight, and if that is this many times as much as at the usual position: truncation is along all of them. However many
# elements there are, the share is held to that of all positions: factors that are rounded move thousands of sums of 64 terms in 64
# directions, so that a tenth of a right engine's error was along its 2,048 logits (sums in F16, small qwen3).
_CHANCE, _UNUSUAL = 1e-6, 4.0
_FEWEST = 8.0  # elements of equal weight: of fewer, one decides
# The share along the values of rows that are the right ones times a factor: what is left may be the rounding of the row. Factors that were
# rounded themselves are off by half a step of F16 at most, to either side: as many to one side by chance once in 64 draws of seven.
_SCALED, _ROUNDED, _MANY = 0.9, 2.0**-11, 7
_POSITIONS = 3  # fewer do not distinguish noise from a constant
# An element may be float32's if it is that near, relatively: sums of thousands of terms are off by 1e-6. The step of F16 is 5e-4 to 1e-3,
# so that one element in twenty of its sums is as near by chance; five times that are no chance.
_EXACT, _MOST_EXACT = 1e-5, 0.25


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


def is_everywhere(ours: Floats, right: Floats) -> bool:
    """Whether rows [R, k] are off by more than float32 rounds nearly everywhere, as in another arithmetic, not in some columns or rows."""
    known = right != 0
    exact = np.abs(ours - right)[known] <= _EXACT * np.abs(right)[known]
    return bool(exact.mean() <= _MOST_EXACT) if exact.size else False


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
    """Whether errors [R, k] of any row are along its values [R, k] as those of no noise and of no usual other row: its scale is wrong."""
    shares, sizes = _shares(delta, values)
    if len(shares) < _POSITIONS:
        return False
    return bool(
        ((sizes >= _FEWEST) & (shares > np.maximum(_by_chance(sizes), _ALONG)) & (shares > _UNUSUAL * np.median(shares))).any()
    )


def _by_chance(sizes: Floats) -> Floats:
    """The share along any direction that normal numbers, as many as `sizes` says, exceed by a chance of `_CHANCE`: [R].

    That of n numbers exceeds s by the chance (1 − s)^((n − 1) / 2), to within a factor of about 1.
    """
    return np.asarray(1 - _CHANCE ** (2 / (np.maximum(sizes, 2.0) - 1)))


def _shares(delta: Floats, values: Floats) -> tuple[Floats, Floats]:
    """Of each row that has an error: the share of its energy along the values, and as how many elements of equal weight these count."""
    energies = (delta * delta).sum(axis=1) * (values * values).sum(axis=1)
    known = energies > 0
    delta, values = delta[known], values[known]
    shares = (delta * values).sum(axis=1) ** 2 / energies[known]
    sizes = [(rows * rows).sum(axis=1) ** 2 / (rows**4).sum(axis=1) for rows in (delta, values)]
    return shares, np.minimum(*sizes)
