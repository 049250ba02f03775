"""Rows of the output matrix recomputed one by one (`--rows`): for logits that are garbage at certain ids."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from checkpoints.answers.isolate import Element
from checkpoints.errors import InputError
from checkpoints.points import LOGITS
from engine.graph import Altered, Step, WeightSource

from .elements import Sample, dot_products
from .row_errors import Value


@dataclass
class RowChecks:
    """Recomputes chosen logits at the last position of each pass (`--rows`).

    Raises:
        InputError: a row that the output matrix doesn't have.
    """

    rows: Sequence[int]
    definitions: Sequence[Sequence[Step]]
    weights: WeightSource
    limit: float
    elements: list[Element] = field(default_factory=list)
    reason: str = ""

    def __post_init__(self) -> None:
        count = self.weights.raw(self._matrix(self.definitions[0][-1]))[2][0]
        if wrong := [row for row in self.rows if not 0 <= row < count]:
            raise InputError(f"--rows {wrong[0]} is outside the output matrix.", f"Its rows are 0…{count - 1:,}.", code="rows")

    @staticmethod
    def _matrix(step: Step) -> str:
        first = step.weights[0]
        return first.weight if isinstance(first, Altered) else str(first)

    def watch(self, arriving: Iterable[tuple[str, Value]]) -> Iterator[tuple[str, Value]]:
        """The same values, with the logits' input kept until they come."""
        wanted = self.definitions[0][-1].reads[0]
        before: Value | None = None
        for name, value in arriving:
            if name == wanted:
                before = value
            elif name == LOGITS and self.rows and before is not None and len(before.positions) == len(value.positions):
                self._check(before, value)
            yield name, value

    def _check(self, before: Value, logits: Value) -> None:
        chosen = Sample(np.full(len(self.rows), len(logits.positions) - 1), np.array(self.rows, dtype=np.int64))
        theirs = logits.data[chosen.t, chosen.o].astype(np.float64)
        best: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None
        for steps in self.definitions:
            step = steps[-1]
            bias = step.weights[1] if len(step.weights) > 1 else None
            added = self.weights.get(bias) if isinstance(bias, str) else None
            native = bool(step.params.get("native"))
            dots, size = dot_products(chosen, before.data, self.weights, self._matrix(step), added, native=native)
            error = np.nan_to_num(np.abs(theirs - dots) / size, nan=np.inf)
            if best is None or error.max() < best[1].max():
                best = dots, error
        for row, said, dot, off in zip(self.rows, theirs, *(best or ((), ())), strict=True):
            # The limit is of a squared error.
            right = bool(off <= sqrt(self.limit))
            self.elements.append(Element(row, int(logits.positions[-1]), float(said), float(dot), float(off), right))
