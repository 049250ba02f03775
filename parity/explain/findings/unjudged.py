"""Where the first place that differs has a limit that would let zeros pass: any change explains its error, so none is named."""

from collections.abc import Sequence

import numpy as np

from ...diff.unjudged import ZEROS
from ..records.records import Expected
from ..search.state import SearchState

# Other experts leave a right engine errors as large as its values: an NMSE of 7.3, 1.9 times the limit, in the mixture of
# tests/test_unjudged.py. Fifty times as far, ten times the values' own length, is no rounding.
_FAR = 100.0


def unjudged(entries: Sequence[Expected], start: SearchState) -> tuple[str, ...]:
    """The points that cannot be judged, if the first record that differs is of one of them; a record with NaN or infinities is judged."""
    if start.first is None:
        return ()
    first = entries[start.first.point]
    here = first.rows == start.first.row
    if first.limit[here].min() < ZEROS or not np.isfinite(first.base[here]).all():
        return ()
    return tuple(entry.point for entry in entries if entry.limit.max() >= ZEROS)


def is_far(entries: Sequence[Expected], start: SearchState) -> bool:
    """Whether the first record that differs is further off than any arithmetic brings it: then something is wrong, whatever it is."""
    assert start.first is not None
    first = entries[start.first.point]
    here = first.rows == start.first.row
    return bool((first.base[here] > _FAR * first.limit[here]).any())
