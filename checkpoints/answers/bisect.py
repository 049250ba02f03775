"""Which layers of an engine are wrong, each given the reference's input: data; `reports` formats it."""

from msgspec import Struct

RIGHT, WRONG, NOT_JUDGED = "right", "wrong", "not judged"


class JudgedPart(Struct, frozen=True):
    """One part of the model: the embedding, a layer, or what follows the last one.

    `name` is "embd", "blk.7" or "output"; "tokens" alone if the engine computed other ones, `reason` saying which. If the part is wrong,
    `point` is the first of its points that differs, with the worst record's NMSE, its limit and position; `reason` says why it could
    not be judged.
    """

    name: str
    status: str
    point: str = ""
    nmse: float | None = None
    limit: float | None = None
    token_idx: int | None = None
    records: int = 0
    reason: str = ""


class Bisected(Struct, frozen=True):
    """The answer; true if every part was judged, and is right."""

    parts: tuple[JudgedPart, ...]
    runs: int
    engine: str
    seconds: float
    folder: str
    notes: tuple[str, ...] = ()

    @property
    def wrong(self) -> tuple[JudgedPart, ...]:
        """The parts that are wrong although their inputs are right."""
        return tuple(part for part in self.parts if part.status == WRONG)

    def __bool__(self) -> bool:
        return all(part.status == RIGHT for part in self.parts)
