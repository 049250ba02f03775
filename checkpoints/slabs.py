"""Records on their way from lines to arrays: many at a time, of all points together, then one `Rows` a point."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .record import SKETCH_SIZE, Rows


class Odd(Exception):
    """Something that only the careful way reads, line by line: words for numbers, scattered values, a wrong type."""


@dataclass(frozen=True)
class Slab:
    """R records with the same number of values each, of any points.

    Attributes:
        point: int64 [R], number of the point in the order of first appearance.
        serial: int64 [R], number of the record in the file: those of one point keep their order.
        place: int64 [R, 4], sequence, position, pass and whether it decodes.
        values: float32 [R, k]; quantum, indices: [R, k] or None; sketch: float32 [R, 32] or None.
        stats: name -> float64 [R].
    """

    point: NDArray[np.int64]
    serial: NDArray[np.int64]
    place: NDArray[np.int64]
    shapes: list[tuple[int, ...]]
    values: NDArray[np.float32]
    dtypes: list[Any]
    stats: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    sketch: NDArray[np.float32] | None = None
    quantum: NDArray[np.float64] | None = None
    indices: NDArray[np.int64] | None = None


def as_rows(slabs: Sequence[Slab], names: Sequence[str]) -> Iterator[Rows]:
    """One `Rows` a point, in the order of the points' numbers; `names` are theirs. Rows of several widths are padded.

    Where padding would blow them up, a point comes in several `Rows`, one a width.
    """
    by_width: dict[int, list[Slab]] = {}
    for one in slabs:
        by_width.setdefault(one.values.shape[1], []).append(one)
    parts: dict[int, list[tuple[NDArray[np.int64], Rows]]] = {}
    for same in by_width.values():
        joined = _join(same) if len(same) > 1 else same[0]
        order = np.argsort(joined.point, kind="stable")
        starts = np.flatnonzero(np.diff(joined.point[order], prepend=-1))
        for begin, end in zip(starts.tolist(), [*starts[1:].tolist(), len(order)], strict=True):
            members = order[begin:end]
            number = int(joined.point[members[0]])
            parts.setdefault(number, []).append((joined.serial[members], _rows(joined, names[number], members)))
    for number in sorted(parts):
        found = parts[number]
        rows = [part for _, part in found]
        if len(found) == 1 or blown_up(rows):
            yield from rows
        else:
            order = np.argsort(np.concatenate([serial for serial, _ in found]), kind="stable")
            yield Rows.stack(rows).take(order)


# Rows of a point are padded to the longest: past these, one long row would blow up many short ones.
_CELLS, _PADDING = 1 << 26, 8


def blown_up(parts: Sequence[Rows]) -> bool:
    """Whether stacking these would be far larger than they are: one long row among many short ones."""
    padded: int = sum(len(part) for part in parts) * max(part.values.shape[1] for part in parts)
    return padded > _CELLS and padded > _PADDING * sum(part.values.size for part in parts)


def _join(slabs: list[Slab]) -> Slab:
    names = dict.fromkeys(name for one in slabs for name in one.stats)
    width = slabs[0].values.shape[1]

    def column(name: str, size: int, filler: float, dtype: Any) -> NDArray[Any] | None:
        arrays = [getattr(one, name) for one in slabs]
        if all(part is None for part in arrays):
            return None
        full = [
            np.full((len(one.point), size), filler, dtype=dtype) if part is None else part
            for one, part in zip(slabs, arrays, strict=True)
        ]
        return np.concatenate(full)

    return Slab(
        np.concatenate([one.point for one in slabs]),
        np.concatenate([one.serial for one in slabs]),
        np.concatenate([one.place for one in slabs]),
        list(chain.from_iterable(one.shapes for one in slabs)),
        np.concatenate([one.values for one in slabs]),
        list(chain.from_iterable(one.dtypes for one in slabs)),
        {name: np.concatenate([one.stats.get(name, np.full(len(one.point), np.nan)) for one in slabs]) for name in names},
        column("sketch", SKETCH_SIZE, np.nan, np.float32),
        column("quantum", width, 0.0, np.float64),
        column("indices", width, -1, np.int64),
    )


def _rows(source: Slab, name: str, members: NDArray[np.int64]) -> Rows:
    listed = members.tolist()
    sketch = None if source.sketch is None else source.sketch[members]
    quantum = None if source.quantum is None else source.quantum[members]
    indices = None if source.indices is None else source.indices[members]
    stats = {key: column[members] for key, column in source.stats.items()}
    return Rows(
        point=name,
        seq=source.place[members, 0],
        token_idx=source.place[members, 1],
        step=source.place[members, 2],
        decode=source.place[members, 3].astype(np.bool_),
        shapes=tuple(source.shapes[i] for i in listed),
        values=source.values[members],
        counts=np.full(len(members), source.values.shape[1], dtype=np.int64),
        stats={key: column for key, column in stats.items() if not np.isnan(column).all()},
        sketch=None if sketch is None or np.isnan(sketch).all() else sketch,
        indices=None if indices is None or (indices < 0).all() else indices,
        quantum=None if quantum is None or not quantum.any() else quantum,
        dtype=str(source.dtypes[listed[-1]]),
    )
