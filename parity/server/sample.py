"""The predictions on which causes are tried: some spread over all, and some more that are wrong."""

from collections.abc import Sequence

from .ask import PlacedPrediction
from .base import Row

_SPREAD = 12  # predictions on which a reading is tried
_WRONG = 8  # predictions beyond those that are kept because they are wrong


class Sample:
    """Chooses among predictions as they come, each with llama.cpp's logits [V]."""

    def __init__(self, placed: Sequence[PlacedPrediction]) -> None:
        count = min(_SPREAD, len(placed))
        self._spread = {placed[number * len(placed) // count].position for number in range(count)}
        self._wrong = 0
        self._kept: list[tuple[PlacedPrediction, Row]] = []

    def add(self, placed: PlacedPrediction, row: Row, *, wrong: bool) -> None:
        """Keep a copy of a prediction's row if it is one of those spread over all, or one of the first wrong ones between them."""
        spread = placed.position in self._spread
        self._wrong += wrong and not spread
        if spread or (wrong and self._wrong <= _WRONG):
            self._kept.append((placed, row.copy()))

    @property
    def kept(self) -> tuple[tuple[PlacedPrediction, Row], ...]:
        """The predictions that were kept, in the order of their positions."""
        return tuple(self._kept)
