"""The wrong records of a place beside the right values, element by element."""

from collections.abc import Mapping

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from engine.backend import Array
from engine.faults import SEEN

from .records import Expected, Floats, Ints

Values = Mapping[str, Array]
Bools = NDArray[np.bool_]

# A law holds if the error that it leaves in a record is at most this many times its limit, as constants are printed with few digits,
ROOM = 10.0
# and at most this share of the original error, unless printed digits leave more: noise of a few limits has no law. A choice: the
# right law leaves only rounding and printed digits. A law of many numbers (one for each element) must leave less.
LEFT, LEFT_OF_MANY = 0.1, 1e-2
# How much more squared error a number of fewer digits may leave than the one that fits: of noise in n elements that takes away a part in
# n. Or so much of the limits, in float32 1e-12, as two right engines are apart. (1.005 in the place of 1.00504 left 190,000 times as much.)
AS_WELL, AS_NOISE = 4.0, 1e-2


class Beside(Struct, frozen=True):
    """The wrong records of a place, with the right values.

    Attributes:
        dumped, right: float64 [R, k], the recorded elements. index: int64 [k], which elements of the row they are.
        room: [R], the squared error that counts as noise. Of a dumped row that is smaller than the right one it is in proportion to its
            own energy: any law that leaves next to nothing of a row would hold for tiny numbers otherwise.
        printed: the part of it that comes from printed digits. rows: [R], the right run's rows.
        whole: float64 [T, n], the complete right rows; None if a row is not a plain vector.
        bias: [k], the vector that the operation adds last, if it has one.
        heads: how many heads a row consists of, if it does.
    """

    dumped: Floats
    right: Floats
    index: Ints
    room: Floats
    printed: Floats
    rows: Ints
    whole: Floats | None = None
    bias: Floats | None = None
    heads: int | None = None

    def holds(self, law: Floats, elements: Bools | None = None, share: float = LEFT) -> bool:
        """Whether values [R, k] equal the dump's up to rounding, at these elements, with at most this share of the error left."""
        return self.left(law, elements, share) is not None

    def left(self, law: Floats, elements: Bools | None = None, share: float = LEFT) -> float | None:
        """The error that values [R, k] leave at these elements, as a share of a record's room; None if they do not hold."""
        with np.errstate(invalid="ignore"):
            delta = self.dumped - law if elements is None else (self.dumped - law)[:, elements]
        if not np.isfinite(delta).all():
            return None
        wrong = self.dumped - self.right if elements is None else (self.dumped - self.right)[:, elements]
        left, before = (np.einsum("ij,ij->i", part, part) for part in (delta, wrong))
        within = (left <= self.printed).all() or float(left.sum()) <= share * float(before.sum())
        if not (within and (left <= self.room).all()):
            return None
        some = self.room > 0
        return float((left[some] / self.room[some]).mean()) if some.any() else 0.0

    def left_at(self, some: Bools, values: Floats, share: float = LEFT) -> float | None:
        """As `left`, of values of some elements [R, s]."""
        whole = self.right.copy()
        whole[:, some] = values
        return self.left(whole, some, share)

    def holds_at(self, some: Bools, values: Floats, share: float = LEFT) -> bool:
        """Whether values of some elements [R, s] equal the dump's up to rounding, with at most this share of the error left."""
        return self.left_at(some, values, share) is not None


def beside(
    entry: Expected, errors: Floats, values: Values, positions: Ints, bias: Floats | None = None, heads: int | None = None
) -> Beside | None:
    """The records of a point that are wrong, by these errors [R], with the right values; None if there is nothing to compare."""
    wrong = errors > entry.limit
    name = SEEN + entry.point if SEEN + entry.point in values else entry.point
    present = entry.present[wrong]
    if not wrong.any() or not present.any():
        return None
    count = int(present.sum(axis=1).min())
    if count == 0:
        return None
    right = entry.taken(values[name], positions)[wrong][:, :count]
    if entry.index is None:
        index = np.arange(count)
    else:
        index = entry.index[wrong][0, :count]
        if not (entry.index[wrong][:, :count] == index).all():
            return None
    whole = entry.whole_values(values[name], positions)
    fits = bias is not None and whole is not None and len(bias) == whole.shape[1]
    printed = (entry.quantum[wrong][:, :count] ** 2).sum(axis=1)
    dumped = entry.values[wrong][:, :count]
    return Beside(
        dumped=dumped,
        right=right,
        index=index,
        room=ROOM * entry.limit[wrong] * entry.energy[wrong] * _smaller(dumped, right) + printed,
        printed=printed,
        rows=entry.rows[wrong],
        whole=whole,
        bias=bias[index] if fits and bias is not None else None,
        heads=heads if whole is not None and heads and whole.shape[1] % heads == 0 else None,
    )


def _smaller(dumped: Floats, right: Floats) -> Floats:
    """By what the energy of dumped rows [R, k] is smaller than that of the right ones, [R]; 1 where it is not."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        share = np.square(dumped).sum(axis=1) / np.square(right).sum(axis=1)
    return np.asarray(np.fmin(share, 1.0))
