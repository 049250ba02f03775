"""What the truth says of each measured record, as columns."""

from collections.abc import Callable, Mapping

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from checkpoints.record import Rows

from ..measured.align import Pair, as_wide
from ..measured.measure import Measured
from .few_numbers import worst_of_few

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def known_at(
    measured: Measured,
    chosen: Bools,
    known: Callable[[Mapping[str, Rows]], Mapping[str, Floats]],
    part: Callable[[Pair], Rows] = lambda pair: pair.ref,
) -> Floats:
    """A known quantity of each record, [R], or of a part of it, at the points of the `chosen` records; 0 elsewhere."""
    concerned = measured.names_of(chosen)
    answers = known({pair.point: part(pair) for pair in measured.pairs if pair.point in concerned})
    return np.concatenate([answers.get(pair.point, np.zeros(len(pair.ref))) for pair in measured.pairs])


def joined(measured: Measured, answers: Mapping[str, Floats]) -> Floats:
    """The distances of all records, [R]; NaN where none is known."""
    none = (np.full(len(pair.ref), np.nan) for pair in measured.pairs)
    known = [worst_of_few(answers.get(pair.point, far), pair.ref) for pair, far in zip(measured.pairs, none, strict=True)]
    return np.concatenate(known)


def compared_part(pair: Pair) -> Rows:
    """The reference's records, reduced to what ours shows: as many leading values, and no sketch if ours has none."""
    ref = as_wide(pair.ref, pair.ours)
    return ref if pair.ours.sketch is not None else replace(ref, sketch=None)
