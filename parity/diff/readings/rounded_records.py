"""Records that were rounded only when they were recorded: the engine computed with the unrounded values."""

from collections.abc import Callable

from msgspec import Struct, field

from checkpoints.record import Rows

from ..measured.dataflow import Flow
from .rounding import rounded_to

# Rounded values that prove something: of products of rounded values a third or more round to another one, of these one in twenty may.
_PROOF = 64


class RoundedRecords(Struct):
    """Knows the types of wrong records; `wrong` gives those of a point, ours and the reference's."""

    model: Flow
    wrong: Callable[[str], tuple[Rows, Rows]]
    _types: dict[str, str] = field(default_factory=dict)

    def alone(self, name: str) -> bool:
        """Whether both a point and the input of the product that makes it are the reference's values rounded to the same type.
        A product of rounded inputs would differ by about as much as rounding, so the engine computed with unrounded values.
        """
        kind = self._type(name)
        mixed = (other for other in self.model.parents[name] if self.model.mixes(other, name))
        return bool(kind) and any(self._type(other) == kind for other in mixed)

    def _type(self, name: str) -> str:
        """The type that the reference's values were rounded to, if they are enough for a proof; else empty."""
        if name not in self._types:
            ours, ref = self.wrong(name)
            self._types[name] = rounded_to(ours, ref) if int(ours.counts.sum()) >= _PROOF else ""
        return self._types[name]
