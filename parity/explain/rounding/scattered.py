"""Whether the errors of a dump's first place may be rounding, which is scattered over all elements and follows nothing."""

from ...diff.verdict.scatter import spares_elements
from ..case import Case
from ..records.records import first_over
from .precision import REPRODUCED, PrecisionFloor
from .systematic import systematic


def scattered(case: Case, cost: PrecisionFloor) -> bool:
    """Whether they are our own rounding's in that arithmetic, or follow no one number and leave no part of the elements exactly right.

    If they follow a number, the case's notes get a sentence on it.
    """
    first = first_over(case.entries)
    if first is None or cost.alike >= REPRODUCED:
        return True
    right = case.replay.on_host[first.point]
    errors, known = first.errors_beside(right, case.positions)
    spared = spares_elements(errors, first.taken(right, case.positions), known)
    followed = "" if spared else systematic(case, first, errors, known)
    if spared or followed:
        but = (
            "a part of the elements is exactly right"
            if spared
            else f"are not scattered: they follow one number as if {followed}"
        )
        case.notes = (*case.notes, f"the errors at {first.point} have the size of lower arithmetic's, but {but}")
    return not spared and followed == ""
