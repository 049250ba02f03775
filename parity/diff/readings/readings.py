"""What a wrong record may show in place of its point, and the comparison that all such readings share."""

from collections.abc import Mapping
from math import prod

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from checkpoints.points import parse
from checkpoints.record import Dump, Rows

from ..measured.whole_rows import sizes

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

LAYOUT, NAME, MOMENT, TYPE, LENGTH = "layout", "name", "moment", "type", "length"
TELLING = 8  # elements that have to be compared before a reading is believed
CLEAR = 100.0  # a reading has to reduce the error by this factor

_NEAR = 0.5  # relative: two records are looked at more closely if their first values are no further apart


class Reading(Struct, frozen=True):
    """What a record shows instead.

    `kind` is one of the above, `sentence` says it, `mapping` is the `--map` line that settles it, for this point. `relation` is equal
    for points of several layers that show the same; `proof`: no wrong operation makes such a record; `own`: the values are the point's
    own, and right, so that they say of the point what a right record would. `shows` is the other point whose values these are. `weak`:
    wrong operations make such records, too, so that what is made from every one of them has to agree.
    """

    kind: str
    sentence: str
    mapping: str = ""
    relation: str = ""
    proof: bool = False
    own: bool = True
    shows: str = ""
    weak: bool = False

    @property
    def same(self) -> str:
        """A key that is equal for points of several layers that show the same."""
        return self.relation or self.sentence


class Allowed(Struct, frozen=True):
    """How far a reading may be off: NMSE [R], and half a step of the printed decimals.

    `last`: how far off a record of the last position may be by what it is made from, if none of the records is of that position.
    """

    nmse: Floats
    step: float = 0.0
    last: float = 0.0

    @classmethod
    def of(cls, limit: Floats, error: Floats, *sides: Rows, last: float = 0.0) -> "Allowed":
        """The limit of the records, but always far below their error without a reading."""
        step = sum(float(rows.quantum.max(initial=0.0)) / 2 for rows in sides if rows.quantum is not None)
        far = np.nan_to_num(error, posinf=1.0) / CLEAR
        return cls(np.minimum(limit, far), step, min(last, float(far.min(initial=1.0))))

    def take(self, rows: Ints) -> "Allowed":
        """The same for some of the records."""
        return Allowed(self.nmse[rows], self.step, self.last)

    def at_last(self) -> "Allowed":
        """The same for records that may be of the last position."""
        return Allowed(np.maximum(self.nmse, self.last), self.step, self.last)


def wide(values: NDArray[np.floating]) -> Floats:
    """The values as float64, without NumPy's warning about signalling NaNs."""
    with np.errstate(invalid="ignore"):
        return values.astype(np.float64)


def side_by_side(ours: Rows, ref: Rows) -> tuple[Floats, Floats]:
    """Both sides' values [R, k] as far as every row has them. Of rows that grow with the position all that the longest one has, with zeros
    behind the shorter ones, if both sides have as many of each: the shortest one says nothing of the others' ends.
    """
    grow = np.ptp(ref.counts) > 0 and np.array_equal(ours.counts, ref.counts)
    width = int(ref.counts.max() if grow else min(ours.counts.min(), ref.counts.min()))
    a, b = wide(ours.values[:, :width]), wide(ref.values[:, :width])
    behind = np.arange(width) >= ref.counts[:, None]
    return (np.where(behind, 0.0, a), np.where(behind, 0.0, b)) if grow else (a, b)


def agree(a: NDArray[np.floating], b: NDArray[np.floating], allowed: Allowed) -> bool:
    """Whether rows [R, k] agree with the reference's `b`, all of them; never if a row of `b` is zero or too uniform to tell."""
    a, b = wide(a), wide(b)
    if not (np.isfinite(a).all() and np.isfinite(b).all()) or len(set(b[0].tolist())) < 3:
        return False
    delta = np.maximum(np.abs(a - b) - allowed.step, 0.0)
    energy = np.sum(b * b, axis=1)
    return bool((np.sum(delta**2, axis=1) <= allowed.nmse * energy).all() and energy.all())


class Others:
    """All records of the reference's points; `points` by name, `rotated` where the model may have RoPE."""

    def __init__(self, points: Mapping[str, Rows], *, rotated: bool = True) -> None:
        self.points, self.rotated = points, rotated
        self._beginnings: dict[tuple[int, int], tuple[list[str], Floats]] = {}

    def beginning_like(self, ours: Rows, allowed: Allowed) -> list[str]:
        """The points whose record of the same position has two first values near those of our first record: few of all."""
        key = int(ours.seq[0]), int(ours.token_idx[0])
        if key not in self._beginnings:
            self._beginnings[key] = self._at(*key)
        names, others = self._beginnings[key]
        own = wide(ours.values[0, :2])
        if len(own) < 2:
            return []
        far = np.abs(others - own) > _NEAR * np.maximum(np.abs(others), np.abs(own)) + allowed.step
        return [names[number] for number in np.flatnonzero(~far.any(axis=1)).tolist()]

    def _at(self, seq: int, position: int) -> tuple[list[str], Floats]:
        names, values = list[str](), list[NDArray[np.float32]]()
        for name, rows in self.points.items():
            at = np.flatnonzero((rows.seq == seq) & (rows.token_idx == position))
            if len(at) and rows.values.shape[1] > 1:
                names.append(name)
                values.append(rows.values[at[0], :2])
        return names, wide(np.array(values, dtype=np.float32).reshape(-1, 2))


def bare(rows: Rows) -> bool:
    """Whether nothing says how long the rows are."""
    return not any(rows.shapes) and "n" not in rows.stats


def length(rows: Rows) -> int | None:
    """The length of the rows; None if it varies or is not known."""
    known = sizes(rows)
    every = {int(n) for n in known[~np.isnan(known)]}
    return every.pop() if len(every) == 1 else None


def common_length(ours: Rows, ref: Rows) -> int | None:
    """The length of both sides' rows; None if it varies, is not known, or differs."""
    known = [sizes(rows) for rows in (ours, ref)]
    every = {int(n) for column in known for n in column[~np.isnan(column)]}
    return every.pop() if len(every) == 1 else None


def whole(ours: Rows, ref: Rows) -> bool:
    """Whether both sides recorded every value of their rows."""
    return bool((ours.full().all() or bare(ours)) and ref.full().all())


def head_size_of(ref: Dump, ours: Dump) -> int | None:
    """The size of attention's heads: from a header's hyperparameters, or from the shapes of the reference's scores and their values."""
    for header in (ref.header, ours.header):
        for name in ("head_size", "head_dim", "key_length"):
            value = ((header.hparams if header is not None else None) or {}).get(name)
            if isinstance(value, int) and value > 0:
                return value
    for name, rows in ref.points.items():
        if parse(name).kind in ("kq", "kq_soft_max") and rows.shapes and len(rows.shapes[0]) == 2:
            layer = parse(name).layer
            queries = ref.points.get(f"blk.{layer}.q") or ref.points.get(f"blk.{layer}.kqv_out")
            if queries is not None and queries.shapes and queries.shapes[0]:
                return prod(queries.shapes[0]) // max(rows.shapes[0][0], 1)
    return None
