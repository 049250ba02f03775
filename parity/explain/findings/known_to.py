"""How precisely a fitted number is known: what a fit leaves of the error, behind a table's steps or beside rounding, moves it that far."""

from collections.abc import Sequence
from math import floor, log10

import numpy as np

from ...diff.limits import EXACT_FLOOR
from ..records.records import Expected
from ..search.state import Candidate, SearchState

KNOWN_TO = "known to ±"  # begins the remark
_MOST = 17  # significant digits of a float64
# What a fit leaves is not only the number's: a table's steps lie in its slope, too. Behind GELU's table two fitted numbers were 0.75
# and 1.6 times as far from the right ones as what they left gives (gemma2, gemma3; edits.py --from 190063 and 195044): twice the
# latter, in round numbers.
_FACTOR = 4.0


def known_to(candidate: Candidate, before: SearchState, after: SearchState, entries: Sequence[Expected]) -> str:
    """A remark on a factor or a summand whose printed digits claim more than its fit shows; "" where they do not.

    The error at the first place is in proportion to how far the number is off, so that the part that is left of it is the part of the
    number's own distance that is not known.
    """
    number = candidate.parameters.get("by")
    if before.first is None or not isinstance(number, float) or not number:
        return ""
    entry, place = entries[before.first.point], before.first.point
    over = entry.over & np.isfinite(before.nmse[place]) & np.isfinite(after.nmse[place])
    left, base = after.nmse[place][over], before.nmse[place][over]
    if not over.any() or not _leaves_more(after, entries):
        return ""
    neutral = 1.0 if candidate.fault.name.endswith("multiplier") else 0.0
    known = _FACTOR * abs(number - neutral) * float(np.sqrt(left.sum() / base.sum()))
    digits = next(digits for digits in range(1, _MOST + 1) if float(f"{number:.{digits}g}") == number)
    last = 10.0 ** (floor(log10(abs(number))) - digits + 1)
    if known <= last / 2:
        return ""
    short = next(short for most in range(1, digits + 1) if abs((short := float(f"{number:.{most}g}")) - number) <= known)
    about = f": about {short:g}" if short != number else ""
    return f"{KNOWN_TO} {known:.1g} by what the fit leaves{about}"


def _leaves_more(after: SearchState, entries: Sequence[Expected]) -> bool:
    """Whether more than float32's own noise is left anywhere."""
    return any(bool((errors > EXACT_FLOOR.at(entry.point)).any()) for entry, errors in zip(entries, after.nmse, strict=True))
