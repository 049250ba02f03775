"""Where the first place that differs has a limit that would let zeros pass: any change explains its error, so none is named."""

from collections.abc import Sequence

import numpy as np

from ..diff.unjudged import ZEROS
from .records import Expected
from .state import SearchState


def unjudged(entries: Sequence[Expected], start: SearchState) -> tuple[str, ...]:
    """The points that cannot be judged, if the first record that differs is of one of them; a record with NaN or infinities is judged."""
    if start.first is None:
        return ()
    first = entries[start.first.point]
    here = first.rows == start.first.row
    if first.limit[here].min() < ZEROS or not np.isfinite(first.base[here]).all():
        return ()
    return tuple(entry.point for entry in entries if entry.limit.max() >= ZEROS)
