"""Points of ours with the same vector: an operation between them does nothing, or they were captured from one buffer."""

from collections.abc import Mapping

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from checkpoints.points import parse
from checkpoints.record import Rows

from ..measured.records import Records

Floats = NDArray[np.float32]

_TELLING = 4  # different values that a row needs in order to identify it


class SameVector(Struct, frozen=True):
    """A wrong point of ours that equals another one of ours, value by value.

    `input` is an agreeing point that it is made from and equals (empty: none): then the operation does nothing. `others` are all equal
    points, `wrong` those made from it that differ. `later` is one of them that a later layer makes from it (empty: none): what the point
    holds is not its own value.
    """

    point: str
    input: str
    others: tuple[str, ...]
    wrong: tuple[str, ...]
    later: str

    @property
    def idle(self) -> bool:
        """Whether the operation that makes the point is known to do nothing."""
        return bool(self.input)

    def sentence(self, operation: str) -> str:
        """The finding as a sentence; `operation` names the operation that makes the point, empty if it is not known."""
        if self.idle:
            return f"{self.point} is {self.input}, unchanged: {operation or 'the operation between them'} does nothing"
        alike = " = ".join((self.point, *self.others[:3]))
        alike += f" = {len(self.others) - 3} more" if len(self.others) > 3 else ""
        after = " and ".join(self.wrong[:2])
        differs = f", computed from {'it' if len(self.others) == 1 else 'them'}, {'differ' if ' and ' in after else 'differs'}"
        return (
            f"{alike} in ours{f', and {after}{differs}' if after else ''}: nothing is computed between them, or all were captured from "
            "one buffer (copy each value when it is computed)"
        )


def same_vector(records: Records, first: int) -> SameVector | None:
    """The points of ours that equal the first divergence at all of its failing positions; None if there are none.

    Points that are one vector in the reference as well, such as a view and its source, do not count.
    """
    name = records.names[records.point[first]]
    chosen = np.flatnonzero((records.point == records.point[first]) & records.failed & ~records.upstream.failed)
    pair, rows = records.pairs[records.point[first]], records.row[chosen]
    others = alike(name, pair.ours.take(rows), records.ours.points)
    if others:
        same = alike(name, pair.ref.take(rows), records.ref.points)
        others = tuple(other for other in others if other not in same)
    if not others:
        return None
    wrong = {
        other for number, other in enumerate(records.names) if records.failed[records.point == number].any()
    }  # fmt: skip
    inputs = [other for other in records.flow.parents[name] if other in others and other not in wrong]
    below = records.flow.descendants(name)
    later = [other for other in others if other in below and parse(other).layer != parse(name).layer]
    return SameVector(
        point=name,
        input=inputs[0] if inputs else "",
        others=others,
        wrong=tuple(other for other in records.names if other in (below - set(others)) & wrong),
        later=later[0] if later else "",
    )


def alike(name: str, rows: Rows, points: Mapping[str, Rows]) -> tuple[str, ...]:
    """The other points that have the same vectors at the positions of these records; empty if the vectors are too uniform to tell."""
    keys = [(int(seq), int(t)) for seq, t in zip(rows.seq, rows.token_idx, strict=True)]
    if not any(len(set(row[np.isfinite(row)].tolist())) >= _TELLING for row in rows.values):
        return ()
    others: list[str] = []
    for other, candidates in points.items():
        if other == name or not _near(candidates.values, rows.values[0]):
            continue
        places = {(int(seq), int(t)): r for r, (seq, t) in enumerate(zip(candidates.seq, candidates.token_idx, strict=True))}
        if all(
            key in places and _equal(candidates.values[places[key]], row) for key, row in zip(keys, rows.values, strict=True)
        ):
            others.append(other)
    return tuple(others)


def _near(values: Floats, row: Floats) -> bool:
    """Whether any record begins like this one: a quick look before all are compared."""
    return bool((values[:, :1] == row[:1]).any())


def _equal(a: Floats, b: Floats) -> bool:
    width = min(len(a), len(b))
    return bool(np.array_equal(a[:width], b[:width], equal_nan=True))
