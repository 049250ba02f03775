"""Records that agree only because their measured limit refuses nothing: lower arithmetic's noise there is as large as the values."""

import numpy as np
from msgspec.structs import replace

from checkpoints.answers.diff import AGREES, INCOMPLETE, UNJUDGED, Limits, Unjudged

from .compare import Comparison

ZEROS = 1.0  # the NMSE of a row of zeros, whatever the reference holds


def without_unjudged(compared: Comparison, usual: Limits) -> Comparison:
    """A comparison by measured limits, in which a record whose limit would let zeros pass does not count as agreeing.

    It is incomplete instead of parity if the last compared point has such records: nothing is known of the result then.

    Args:
        usual: the table's limits for the same arithmetic; what agrees by them does agree.
    """
    records, verdict = compared.records, compared.verdict
    if not verdict or not verdict.limits.points:
        return compared
    within = np.array([usual.at(name) for name in records.names])[records.point]
    open_ = (records.limit >= ZEROS) & (records.measures.nmse > within) & records.trusted
    if not open_.any():
        return compared
    numbers = set(records.point[open_].tolist())
    names = tuple(name for number, name in enumerate(records.names) if number in numbers)
    points = tuple(
        replace(point, status=UNJUDGED) if point.status == AGREES and point.checkpoint in names else point
        for point in verdict.points
    )
    unjudged = Unjudged(int(open_.sum()), names, len(records.names) - 1 in numbers)
    outcome = INCOMPLETE if unjudged.result else verdict.verdict
    return replace(compared, verdict=replace(verdict, verdict=outcome, points=points, unjudged=unjudged))
