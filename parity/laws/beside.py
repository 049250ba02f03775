"""Wrong rows beside the right ones, element by element."""

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

# A law holds if the error that it leaves in a record is at most this many times its limit, as constants are printed with few digits,
ROOM = 10.0
# and at most this share of the original error, unless printed digits leave more: noise of a few limits has no law. A choice: the
# right law leaves only rounding and printed digits. A law of many numbers (one for each element) must leave less.
LEFT, LEFT_OF_MANY = 0.1, 1e-2
ENOUGH = 12  # recorded values: a number that is fitted to fewer may follow noise
# How much more squared error a number of fewer digits may leave than the one that fits: of noise in n elements that takes away a part in
# n. Or so much of the limits, in float32 1e-12, as two right engines are apart. (1.005 in the place of 1.00504 left 190,000 times as much.)
AS_WELL, AS_NOISE = 4.0, 1e-2

# What a factor of whole rows may leave of the squared distance of the sketches of what was not recorded: exactly, the rounding of both;
# where half of it has the factor, a half. A choice.
_OF_SKETCHES = 0.5


class Beside(Struct, frozen=True):
    """The wrong records of a place, with the right values.

    Attributes:
        dumped, right: float64 [R, k], the recorded elements. index: int64 [k], which elements of the row they are.
        room: [R], the squared error that counts as noise. Of a dumped row that is smaller than the right one it is in proportion to its
            own energy: any law that leaves next to nothing of a row would hold for tiny numbers otherwise.
        printed: the part of it that comes from printed digits. rows: [R], the right run's rows.
        others: [R], as `room`, in all elements but the row's largest right one, where that is an outlier; None if elements are not
            judged by themselves.
        whole: float64 [T, n], the complete right rows; None if a row is not a plain vector.
        bias: [k], the vector that the operation adds last, if it has one.
        heads: how many heads a row consists of, if it does.
        sketches: [R, 32] both, of what was not recorded of the dumped and right rows.
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
    sketches: tuple[Floats, Floats] | None = None
    others: Floats | None = None

    @property
    def outliers(self) -> Bools:
        """The elements [R, k] whose rounding may be larger than all others of their row."""
        if self.others is None:
            return np.zeros(self.right.shape, dtype=np.bool_)
        return np.asarray(_largest(self.right) & np.isfinite(self.others)[:, None])

    @property
    def room_of_each(self) -> Floats:
        """The squared error that counts as noise in each element, [R, k]."""
        others = self.room if self.others is None else np.fmin(self.room, self.others)
        return np.where(self.outliers, self.room[:, None], others[:, None])

    @property
    def noise_beside_outliers(self) -> Floats:
        """The squared error [R] within the limit of what is beside an outlier; 0 of rows without one."""
        return np.zeros(len(self.room)) if self.others is None else np.where(np.isfinite(self.others), self.others / ROOM, 0.0)

    def is_whole(self, factor: float) -> bool:
        """Whether whole rows, by their sketches, are this many times the right ones, as the recorded elements are; True without sketches.

        Sketches are sums of a row's elements: of such rows they are as many times the right one's.
        """
        if self.sketches is None or not np.isfinite(self.sketches).all():
            return True
        dumped, right = self.sketches
        return bool(np.square(dumped - factor * right).sum() <= _OF_SKETCHES * np.square(dumped - right).sum())

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
        if not (within and (left <= self.room).all() and self._others_hold(delta, wrong, elements, share)):
            return None
        some = self.room > 0
        return float((left[some] / self.room[some]).mean()) if some.any() else 0.0

    def _others_hold(self, delta: Floats, wrong: Floats, elements: Bools | None, share: float) -> bool:
        """Whether beside outliers, too, what a law leaves of `wrong`, `delta`, is noise, or so small a part of it."""
        if self.others is None:
            return True
        outliers = self.outliers
        some = outliers if elements is None else outliers[:, elements]
        left, before = (np.where(some, 0.0, np.square(part)).sum(axis=1) for part in (delta, wrong))
        if (left <= self.others).all():
            return True
        energy = np.where(outliers, 0.0, np.square(self.right)).sum(axis=1)
        most = np.where(outliers.any(axis=1), np.maximum(LEFT * energy, self.printed), np.inf)
        return bool((left <= most).all() and left.sum() <= share * before.sum())

    def first(self, count: int) -> "Beside":
        """The first of the wrong records alone."""
        return replace(
            self,
            dumped=self.dumped[:count],
            right=self.right[:count],
            room=self.room[:count],
            printed=self.printed[:count],
            rows=self.rows[:count],
            others=None if self.others is None else self.others[:count],
        )

    def left_at(self, some: Bools, values: Floats, share: float = LEFT) -> float | None:
        """As `left`, of values of some elements [R, s]."""
        whole = self.right.copy()
        whole[:, some] = values
        return self.left(whole, some, share)

    def holds_at(self, some: Bools, values: Floats, share: float = LEFT) -> bool:
        """Whether values of some elements [R, s] equal the dump's up to rounding, with at most this share of the error left."""
        return self.left_at(some, values, share) is not None


def room(limit: Floats, energy: Floats, dumped: Floats, right: Floats) -> Floats:
    """The squared error of dumped rows [R, k] that counts as noise, [R], by a limit and an energy of each."""
    return ROOM * limit * energy * _smaller(dumped, right)


def room_of_others(room: Floats, right: Floats) -> Floats:
    """The part of this room of rows [R, k] that all elements but a row's largest have, by their energy; ∞ where no outlier hides them.

    Of an outlier's energy a lower arithmetic's limit would be wider than all other elements, and of theirs narrower than its own rounding.
    """
    squares = np.square(right)
    others = np.where(_largest(right), 0.0, squares).sum(axis=1)
    hidden = (others > 0) & (room > LEFT * others)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(hidden, room * others / squares.sum(axis=1), np.inf)


def _largest(right: Floats) -> Bools:
    """The largest element of each row [R, k]."""
    return np.asarray(np.arange(right.shape[1]) == np.square(right).argmax(axis=1)[:, None])


def _smaller(dumped: Floats, right: Floats) -> Floats:
    """By what the energy of dumped rows [R, k] is smaller than that of the right ones, [R]; 1 where it is not."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        share = np.square(dumped).sum(axis=1) / np.square(right).sum(axis=1)
    return np.asarray(np.fmin(share, 1.0))
