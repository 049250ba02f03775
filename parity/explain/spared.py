"""What lower arithmetic spares: nothing. Where some records, or some elements of all, are exactly right, errors are not its rounding."""

import numpy as np
from numpy.typing import NDArray

from .records import Floats

# Of the records that rounding must have changed by at least this many times their limit, this share may be (nearly) exactly right:
# a single value can be right by luck, a whole position or point cannot.
VISIBLE, SPARED = 30.0, 0.01
# An element is exactly right if it is off by less than this part of its row's root mean square: float32's own noise at an operation is a
# part in a million, F16's rounding 200 times that.
_EXACT = 3e-6
# The share of elements of a usual size (a twentieth of the root mean square and more) that may be. Rounding's errors have one size there:
# less than one element in 50 is right to that by luck. The share is a choice.
_USUAL, _PART, _FEWEST = 0.05, 0.25, 16


def spares_records(errors: Floats, costs: Floats, limits: Floats) -> bool:
    """Whether records are exactly right that an arithmetic must have changed: NMSE, what it costs there, and the limit of each, [R]."""
    visible = costs > VISIBLE * limits
    return bool((visible & (errors <= limits)).sum() > SPARED * visible.sum())


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
    return bool(usual.sum() >= _FEWEST and exact.sum() >= _PART * usual.sum())
