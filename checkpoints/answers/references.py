"""How far two llama.cpp are from each other on the same tokens: data; `reports` formats it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MovedPoint:
    """One kind of point, over all layers ("blk.*.ffn_gate"). `nmse` is the worst record's, `layer` and `token_idx` where it is."""

    kind: str
    records: int
    nmse: float
    layer: int | None
    token_idx: int


@dataclass(frozen=True)
class Moved:
    """The reference against another version or build of it.

    Attributes:
        base, other: what they are ("llama.cpp 0.3.36", "llama.cpp 0.3.16").
        points: every kind in dataflow order; `first` the first that is not identical, `worst` the one that moved most.
        missing: points that the other has not.
        rounding: whether the worst lies where rounding can explain it; what is above is another formula, and no floor for anybody.
    """

    base: str
    other: str
    points: tuple[MovedPoint, ...]
    compared: int
    first: MovedPoint | None = None
    worst: MovedPoint | None = None
    missing: tuple[str, ...] = ()
    rounding: bool = True


@dataclass(frozen=True)
class References:
    """All other references of a run, and what that means for our side.

    `within`: our side differs from the reference, but nowhere by more than `times` as much as the references differ among themselves.
    """

    moved: tuple[Moved, ...]
    within: bool = False
    times: float = 0.0
    notes: tuple[str, ...] = ()
