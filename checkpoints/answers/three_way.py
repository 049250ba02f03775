"""The result of a comparison of three sides: at each point, which side disagrees with the other two."""

from msgspec import Struct

from .diff import RecordFault

PAIRS = ((0, 1), (0, 2), (1, 2))  # the two sides that each figure of a point compares


class RecordedOtherwise(Struct, frozen=True):
    """A fault of one side's records: `side` is the one that both others differ from there, None where only one pair shows the fault."""

    side: int | None
    fault: RecordFault


class ThreeWayPoint(Struct, frozen=True):
    """One point. `nmse` and `of_limit` are each pair's worst, in the order of PAIRS, None if a pair has no such record.

    `differs`: `diff` judges some pair to differ. `alone` is the side that differs from the two others, which agree.
    `truth`: how far each side's worst record is from the same steps in float64, None where that is not known; `wrong` are the sides that
    are far from it while another one, with which they do not agree, is near.
    """

    checkpoint: str
    nmse: tuple[float | None, float | None, float | None]
    of_limit: tuple[float | None, float | None, float | None]
    alone: int | None = None
    differs: bool = False
    truth: tuple[float | None, float | None, float | None] = (None, None, None)
    wrong: tuple[int, ...] = ()


class ThreeWay(Struct, frozen=True):
    """The answer for three sides; true if all agree. `first` is the first point in dataflow order at which they do not.

    `record_faults`: what was recorded otherwise though everything computed from it agrees, which is no difference.
    """

    sides: tuple[str, str, str]
    points: tuple[ThreeWayPoint, ...]
    compared: tuple[int, int, int]
    first: ThreeWayPoint | None = None
    record_faults: tuple[RecordedOtherwise, ...] = ()
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.first is None
