"""Records as the device's kernels stage them, and the rows that are made of them for the writer."""

from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from checkpoints.points import of_scores, parse
from checkpoints.record import SKETCH_SIZE, STATISTICS, Rows

from .tap import CapturedPass

PLAIN, CAUSAL, CACHED, LAST = range(4)  # the layouts of summary.cuh


def record_type(slice_size: int) -> np.dtype[Any]:
    """One record in staging buffer and slab, a multiple of 8 bytes: `values` has one element of padding where the slice is odd."""
    return np.dtype(
        [("stats", "<f8", len(STATISTICS)), ("sketch", "<f4", SKETCH_SIZE), ("values", "<f4", slice_size + slice_size % 2)]
    )


PART_DOUBLES = SKETCH_SIZE + 8  # doubles of one partial sum, PART of summary.cuh


class StagedRows(Struct, frozen=True):
    """The staged rows of one point: where they begin, and what determines the shapes of the rows.

    If `blocks` is not 0, the record itself has only its slice; the sums of that many parts of the row follow it, in order.
    """

    name: str
    kind: int
    start: int
    width: int
    heads: int
    blocks: int = 0


class Batch(Struct, frozen=True):
    """What was staged in one pass."""

    now: CapturedPass
    kept: NDArray[np.int64]
    seen: NDArray[np.int64]
    parts: tuple[StagedRows, ...]

    def rows(self, records: NDArray[Any], slice_size: int) -> list[Rows]:
        """The records in the writer's form, copied out of the slab."""
        return [self._rows(part, records[part.start :], slice_size) for part in self.parts]

    def _rows(self, part: StagedRows, following: NDArray[Any], slice_size: int) -> Rows:
        count = len(self.kept)
        records = following[:count]
        if part.kind == PLAIN:
            shapes: tuple[tuple[int, ...], ...] = ((part.width,),) * count
            sizes = np.full(count, part.width, dtype=np.int64)
        elif part.kind == CAUSAL:
            shapes = tuple((part.heads, int(seen)) for seen in self.seen)
            sizes = self.seen * part.heads
        else:
            shapes = tuple((int(seen), part.width) for seen in self.seen)
            sizes = self.seen * part.width
        counts = np.minimum(sizes, slice_size)
        stats, sketch = records["stats"].T.copy(), records["sketch"].copy()
        if part.blocks:
            sums = following[count:].view(np.float64)[: part.blocks * PART_DOUBLES]
            stats[:, 0], sketch[0] = added_up(sums.reshape(part.blocks, PART_DOUBLES), part.width)
        names = STATISTICS if part.name.endswith("kq_soft_max") else STATISTICS[:-1]
        return Rows(
            point=part.name,
            seq=np.zeros(count, dtype=np.int64),
            token_idx=self.now.token_idx[self.kept],
            step=np.full(count, self.now.step, dtype=np.int64),
            decode=np.full(count, self.now.decode, dtype=np.bool_),
            shapes=shapes,
            values=records["values"][:, : int(counts.max(initial=0))].copy(),
            counts=counts,
            stats={name: stats[i] for i, name in enumerate(names)},
            sketch=sketch,
        )


def added_up(sums: NDArray[np.float64], size: int) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """Statistics [8] and sketch [32] of a row of `size` elements, from the partial sums [parts, 40], added in their order."""
    total, squares, low, high, bad, largest, at, _ = sums[:, SKETCH_SIZE:].T
    none = bad.sum() == size
    extremes = (0.0, 0.0) if none else (low.min(), high.max())
    stats = np.array([size, total.sum(), np.sqrt(squares.sum()), *extremes, bad.sum(), at[largest.argmax()], 0.0])
    return stats, sums[:, :SKETCH_SIZE].sum(axis=0).astype(np.float32)


def layout(name: str, shape: tuple[int, ...], tokens: int) -> tuple[int, int, int, int]:
    """How a value of `shape` is laid out: (kind, S, heads, width), by the vocabulary's entry of that name.

    Raises:
        ValueError: the shape contradicts the number of tokens of the pass.
    """
    known = parse(name).known
    row = known.row if known is not None else ()
    if of_scores(name):
        if len(shape) != 3 or shape[1] != tokens:
            raise ValueError(f"{name}: {shape} is not [heads, {tokens}, cached positions]")
        return CAUSAL, shape[2], shape[0], 0
    width = int(np.prod(shape[1:], dtype=np.int64))
    if row[:1] == ("t+1",):
        return CACHED, shape[0], 1, width
    if shape[0] != tokens:
        raise ValueError(f"{name}: {shape} does not hold one row for each of {tokens} positions")
    return PLAIN, 0, 1, width
