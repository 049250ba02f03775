"""How an engine writes its dump: which part of what it computed."""

import random
from dataclasses import dataclass

import numpy as np
from msgspec.structs import replace

from checkpoints.points import layer_outputs
from checkpoints.record import Dump, End, Rows

_SLICES = (10, 16, None)  # values a row; None: all


@dataclass(frozen=True)
class Written:
    """How an engine writes its dump."""

    size: int | None
    points: str
    bare: bool
    stated: bool

    @staticmethod
    def drawn(draw: random.Random) -> "Written":
        """A random way."""
        return Written(draw.choice(_SLICES), draw.choice(["default", "all"]), draw.random() < 0.5, draw.random() < 0.3)

    def of(self, whole: Dump, layers: int, compute: str) -> Dump:
        """The part of a full dump that the engine writes."""
        wanted = set(layer_outputs(range(layers))) if self.points == "default" else set(whole.points)
        points = {name: self._rows(rows) for name, rows in whole.points.items() if name in wanted}
        if self.bare:
            return Dump("ours.jsonl", None, points)
        assert whole.header is not None
        size = whole.header.slice if self.size is None else self.size
        header = replace(
            whole.header, source="an engine", compute=compute if self.stated else "", dataflow=None, columns=None, slice=size
        )
        return replace(whole, header=header, points=points, end=End(sum(len(rows) for rows in points.values())))

    def _rows(self, rows: Rows) -> Rows:
        size = rows.values.shape[1] if self.size is None else min(self.size, rows.values.shape[1])
        cut = replace(rows, values=rows.values[:, :size], counts=np.minimum(rows.counts, size))
        return replace(cut, stats={}, sketch=None, shapes=((),) * len(rows)) if self.bare else cut
