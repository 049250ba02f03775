"""The limit of a record if the truth is known: a multiple of the reference's own distance from the truth."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from checkpoints.points import ENCODER
from checkpoints.record import Rows

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

OFF, AUTO, ALL = "off", "auto", "all"  # where float64 is asked: nowhere, where two sides differ, at every point


class Truth(Protocol):
    """A source of the values of the model's steps in float64 (`parity.arbiter`)."""

    @property
    def coarse(self) -> frozenset[str]:
        """The points that the reference itself computes coarsely: from a table of float16, or from such a point."""

    def distances(self, points: Mapping[str, Rows]) -> dict[str, Floats]:
        """How far records are from the truth: NMSE, float64 [R] for each point; NaN where it is not known."""

    def own_rounding(self, points: Mapping[str, Rows]) -> dict[str, Floats]:
        """How far the same steps in float32, without any table, are from the truth at the recorded elements: as `distances`."""

    def from_table(self, points: Mapping[str, Rows]) -> dict[str, Floats]:
        """How far records are from the same steps in float32 with the reference's tables of float16: as `distances`."""

    def spread(self, points: Mapping[str, Rows]) -> dict[str, Floats]:
        """How far rounding alone moves records from the truth: NMSE, [R], if every operation is as far off as in right engines."""

    def table_spread(self, points: Mapping[str, Rows]) -> dict[str, Floats]:
        """How far rounding moves records if it changes which entries of the reference's tables of float16 are used: NMSE, [R]."""

    def one_entry(self, points: Mapping[str, Rows]) -> dict[str, Floats]:
        """NMSE of the recorded elements, [R], if each of them were looked up one entry further in a table of float16.

        Only points that come from such a table are included.
        """

    def largest_entry(self, points: Mapping[str, Rows]) -> dict[str, Floats]:
        """How far records, [R], are moved if the one element of each row at which that changes most is looked up one entry further.

        In a dense row that is next to nothing; of a row in which few elements are not zero it may be all that is there. At points after
        tables it is the effect of all of them together.
        """


# How far a right float32 engine may be from the reference, in proportion to the reference's own distance from the truth (the worst
# at that position up to that point, since rounding is amplified from layer to layer, and a single record may be near the truth by
# luck). Measured (benchmarks/noise.py --truth -n 10 --tokens 300: NumPy's products and products summed in another order, 156,000
# records, those with an NMSE above 1e-12): at most 48 times; this is twice that.
MULTIPLE = 100.0
# NMSE above which float32's rounding is not considered. Measured (benchmarks/noise.py): at most 2e-10 between right engines; an engine
# without residuals, which amplifies rounding most of all entries of the catalogue, 2e-9.
NO_ROUNDING = 1e-7
# The same for a record at which rounding is seen to be amplified twice over, by the noise of `Truth.spread` and by float32's own distance
# from the truth: a sum that cancels before a norm of one head, the only one that was recorded. A right engine was 8e-7 from the reference
# there, float32 8e-8 and noise 9e-6 from the truth (benchmarks/right_engines.py --from 415).
AMPLIFIED = 1e-6
# The same if the reference is coarse, as after ggml's table of GELU (argument and result have float16's eleven bits: 1e-7 to 3e-7
# at the operation). A right engine is then as far from the reference as the reference from the truth, whether its GELU is exact or
# another entry of the table was used: twice that if both err, and twice again for safety. After 5 to 22 layers of the small gemma3n and
# gemma4 of random weights, seven tokens, the reference is up to 4.2e-4 from the truth; `explain` looks into no error beyond this bound
# (`diff` into those up to `limits.LARGEST_ROUNDING`).
COARSE_MULTIPLE = 4.0
NO_COARSE_ROUNDING = 1e-3
# Two right engines, each as far from the truth as rounding carries a value (`Truth.spread`), are twice as far from each other.
BOTH = 4.0
# Rounding alone reaches no more than this (benchmarks/noise.py: 2e-10): beyond it a right engine is as far from the reference as
# the reference from the truth, and not a hundred times as far.
ROUNDING = 1e-8


class Above(Struct, frozen=True):
    """What each point is made from: `parents` are the numbers of the nearest points before it; the rows of those in `everywhere` act on
    all positions of what is made from them (an encoder's).
    """

    parents: tuple[tuple[int, ...], ...]
    everywhere: frozenset[int] = frozenset()

    @classmethod
    def of(cls, names: Sequence[str], parents: Mapping[str, Sequence[str]]) -> "Above":
        """For points in dataflow order, from the names of the points that each is made from."""
        numbers = {name: number for number, name in enumerate(names)}
        encoder = frozenset(number for name, number in numbers.items() if name.startswith(ENCODER))
        return cls(tuple(tuple(numbers[other] for other in parents[name]) for name in names), encoder)


def raised(
    nmse: Floats,
    limit: Floats,
    distance: Floats,
    point: Ints,
    seq: Ints,
    token_idx: Ints,
    coarse: Bools,
    rounding: float = ROUNDING,
    share: Floats | float = 1.0,
    above: Above | None = None,
) -> Floats:
    """Every record's limit [R], raised where the reference itself is far from the truth; never lowered.

    Args:
        nmse: each record's error; if it is beyond any rounding its limit is not raised.
        limit: each record's limit by the table. distance: NMSE of the reference's record from the truth; NaN where it is not known.
        point, seq, token_idx: int64 [R]; the number of each record's point in dataflow order, its sequence and position.
        coarse: whether the reference computes the record's point coarsely.
        rounding: NMSE up to which `MULTIPLE` times the distance counts as rounding; beyond it, `COARSE_MULTIPLE` times.
        share: of each record, as `few_numbers.share_of_few` gives it.
        above: what each point is made from; without it, all points before it.
    """
    worst = _so_far(distance, point, seq, token_idx, above)
    near = nmse * share <= np.where(coarse, NO_COARSE_ROUNDING, NO_ROUNDING)
    by_distance = np.maximum(np.minimum(MULTIPLE * worst, rounding / share), COARSE_MULTIPLE * worst)
    return np.where(near, np.maximum(limit, by_distance), limit)


def of_table(limit: Floats, apart: Floats, point: Ints, seq: Ints, token_idx: Ints, above: Above | None = None) -> Floats:
    """Every record's limit [R] for an engine that looks GELU up in a table of float16 as the reference does; never lowered.

    Two such engines use different entries here and there, if their arguments lie on the two sides of a step: `apart` shows how far apart
    that carries them.

    Args:
        limit: each record's limit by the table of limits. apart: NMSE of the reference's record from our float32 steps with the same
            table, or how far a few other entries would move it; NaN where it is not known.
        point, seq, token_idx, above: as in `raised`.
    """
    return np.maximum(limit, COARSE_MULTIPLE * _so_far(apart, point, seq, token_idx, above))


def _so_far(distance: Floats, point: Ints, seq: Ints, token_idx: Ints, above: Above | None) -> Floats:
    """The worst known distance at each record's position up to its point, [R]."""
    known = np.where(np.isfinite(distance), distance, 0.0)
    if above is not None:
        return _of_all_above(known, point, seq, token_idx, above)
    order = np.lexsort((point, token_idx, seq))
    borders = (np.diff(seq[order]) != 0) | (np.diff(token_idx[order]) != 0)
    starts = [0, *(np.flatnonzero(borders) + 1).tolist()]
    so_far = np.empty_like(known)
    for begin, end in zip(starts, [*starts[1:], len(order)], strict=True):
        so_far[begin:end] = np.maximum.accumulate(known[order][begin:end])
    worst = np.empty_like(known)
    worst[order] = so_far
    return worst


def _of_all_above(known: Floats, point: Ints, seq: Ints, token_idx: Ints, above: Above) -> Floats:
    """`_so_far` over only those points that each point is made from, directly or not."""
    places, place = np.unique(np.stack([seq, token_idx]), axis=1, return_inverse=True)
    worst, here = np.empty_like(known), np.zeros((len(above.parents), places.shape[1]))
    bounds = np.searchsorted(point, np.arange(len(above.parents) + 1))
    for number, parents in enumerate(above.parents):
        rows = slice(bounds[number], bounds[number + 1])
        at = place[rows]
        for parent in parents:
            np.maximum(
                here[number], here[parent].max(initial=0.0) if parent in above.everywhere else here[parent], out=here[number]
            )
        np.maximum.at(here[number], at, known[rows])
        worst[rows] = here[number][at]
    return worst
