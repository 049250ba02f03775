"""A tensor of a GGUF beside what it should be, a few rows at a time: memory does not grow with the model."""

from collections.abc import Callable, Iterator

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from checkpoints.answers.weights import FirstDifference
from engine.weights.dequantize import dequantize
from engine.weights.gguf_model import GgufModel, TensorInfo

from .conversion_sources import TensorSource
from .packed import Floats
from .row_distance import Distance

CHUNK = 1 << 18  # elements that are read at a time: what is computed from them stays in the cache (1 MB as float32)

Change = Callable[[Floats], Floats]


class HeldTensor(Struct, frozen=True):
    """A tensor of a GGUF; `unit` is the number of rows that a change needs together, those of a head."""

    model: GgufModel
    info: TensorInfo
    unit: int = 1

    def row(self, number: int) -> Floats:
        """One row, dequantised: [columns]."""
        row: Floats = self._rows(number, number + 1)[0]
        return row

    def beside(self, source: TensorSource, change: Change) -> Iterator[tuple[int, Floats, Floats]]:
        """(first row, its values, those that it should have) of a few rows at a time; nothing if their rows differ in length."""
        for start, rows in source.portions(self.info.shape[-1], CHUNK, self.unit):
            yield start, self._rows(start, start + len(rows)), change(rows)

    def distance(self, source: TensorSource, change: Change) -> Distance | None:
        """How far each row is from its source; None if they do not have one shape."""
        distance, compared = Distance.of(len(self.model.raw(self.info.name)), self.info.shape[-1]), False
        for start, held, wanted in self.beside(source, change):
            distance.put(start, held, wanted)
            compared = True
        return distance if compared else None

    def first(self, source: TensorSource, change: Change, row: int) -> FirstDifference | None:
        """The first element from a row on that is off by more than a hundredth of its row's size."""
        for start, held, wanted in self.beside(source, change):
            skip = max(row - start, 0)
            if skip < len(held) and (
                first := _first(held[skip:].astype(np.float64), wanted[skip:].astype(np.float64), start + skip, self.info)
            ):
                return first
        return None

    def _rows(self, start: int, stop: int) -> Floats:
        rows: Floats = dequantize(self.model.raw(self.info.name)[start:stop], self.info.type, self.info.shape[-1])
        return rows


def _first(held: NDArray[np.float64], wanted: NDArray[np.float64], start: int, info: TensorInfo) -> FirstDifference | None:
    size, columns = np.sqrt((wanted**2).mean(axis=1, keepdims=True)), info.shape[-1]
    off = np.abs(held - wanted) > (
        0.01 * size if info.type not in (0, 1, 30) else 2.0**-8 * np.abs(wanted) if info.type else 0.0
    )
    if not off.any():
        return None
    at = int(off.argmax())
    row, column = divmod(at, columns)
    values = {"GGUF": float(held[row, column]), "folder": float(wanted[row, column])}
    return FirstDifference((start + row) * columns + column, start + row, "", values)
