"""How far two versions of llama.cpp are from each other on the same tokens: data; `reports` formats it."""

from msgspec import Struct


class MovedPoint(Struct, frozen=True):
    """One kind of point, over all layers ("blk.*.ffn_gate"). `nmse`, `layer` and `token_idx` are those of the worst record."""

    kind: str
    records: int
    nmse: float
    layer: int | None
    token_idx: int


class Moved(Struct, frozen=True):
    """The reference compared with another version or build of llama.cpp.

    Attributes:
        base, other: their descriptions ("llama.cpp 0.3.36", "llama.cpp 0.3.16").
        points: every kind in dataflow order; `first` is the first that is not identical, `worst` the one that differs most.
        missing: points that the other one lacks.
        same_instructions: whether both are the same version, compiled for the same instructions of the processor.
        rounding: whether rounding can explain the worst difference; anything larger is another formula, and no measure of noise.
    """

    base: str
    other: str
    points: tuple[MovedPoint, ...]
    compared: int
    first: MovedPoint | None = None
    worst: MovedPoint | None = None
    missing: tuple[str, ...] = ()
    rounding: bool = True
    same_instructions: bool = False


class References(Struct, frozen=True):
    """All other references of a run, and what they mean for our side.

    `within`: our side differs from the reference, but nowhere more than `times` as much as the references differ among themselves.
    """

    moved: tuple[Moved, ...]
    within: bool = False
    times: float = 0.0
    notes: tuple[str, ...] = ()
