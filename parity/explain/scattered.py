"""Whether the errors of a dump's first place may be rounding, which is scattered over all elements and follows nothing."""

import numpy as np

from ..diff.scatter import spares_elements
from .case import Case
from .precision import REPRODUCED, PrecisionFloor
from .systematic import systematic


def scattered(case: Case, cost: PrecisionFloor) -> bool:
    """Whether they are our own rounding's in that arithmetic, or follow no one number and leave no part of the elements exactly right.

    If they follow a number, the case's notes get a sentence on it.
    """
    first = next((entry for entry in case.entries if (entry.base > entry.limit).any()), None)
    if first is None or cost.alike >= REPRODUCED:
        return True
    right = first.taken(case.replay.on_host[first.point], case.positions)
    known = first.present & np.isfinite(first.values) & np.isfinite(right)
    errors = np.where(known, first.values, 0.0) - np.where(known, right, 0.0)
    if spares_elements(errors, right, known):
        case.notes = (
            *case.notes,
            f"the errors at {first.point} have the size of lower arithmetic's, but a part of the elements is exactly right",
        )
        return False
    followed = systematic(case, first, errors, known)
    if followed:
        case.notes = (
            *case.notes,
            f"the errors at {first.point} have the size of lower arithmetic's, but are not scattered: they follow one number as if "
            f"{followed}",
        )
    return followed == ""
