"""Records on their way from lines to arrays: many at a time for all points together, then one `Rows` per point."""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
from msgspec import Struct, field
from numpy.typing import NDArray

from ..record import SKETCH_SIZE, Rows


class Slab(Struct, frozen=True):
    """R records with the same number of values each, of any points.

    Attributes:
        point: int64 [R], number of the point.
        serial: int64 [R], number of the record's line in the file; the records of one point keep this order.
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
    """One `Rows` per point, in the order of their first records; `names` are the points' names. Rows of different widths are
    padded.

    If padding would blow them up, a point gets several `Rows`, one per width.
    """
    by_width: dict[int, list[Slab]] = {}
    for slab in sorted(slabs, key=lambda slab: int(slab.serial[0])):  # what was read line by line comes before the rest
        by_width.setdefault(slab.values.shape[1], []).append(slab)
    parts: dict[int, list[tuple[NDArray[np.int64], Rows]]] = {}
    for same in by_width.values():
        joined = _by_point(same)
        starts = np.flatnonzero(np.diff(joined.point, prepend=-1)).tolist()
        for begin, end in zip(starts, [*starts[1:], len(joined.point)], strict=True):
            number, members = int(joined.point[begin]), slice(begin, end)
            parts.setdefault(number, []).append((joined.serial[members], _rows(joined, names[number], members)))
    for of_point in sorted(parts.values(), key=lambda widths: min(int(serial.min()) for serial, _ in widths)):
        rows = [part for _, part in of_point]
        if len(of_point) == 1 or blown_up(rows):
            yield from rows
        else:
            order = np.argsort(np.concatenate([serial for serial, _ in of_point]), kind="stable")
            yield Rows.stack(rows).take(order)


# Rows of a point are padded to the longest: past these, one long row would blow up many short ones.
_CELLS, _PADDING = 1 << 26, 8


def blown_up(parts: Sequence[Rows]) -> bool:
    """Whether stacking these would be far larger than they are: one long row among many short ones."""
    padded: int = sum(len(part) for part in parts) * max(part.values.shape[1] for part in parts)
    return padded > _CELLS and padded > _PADDING * sum(part.values.size for part in parts)


def _by_point(slabs: list[Slab]) -> Slab:
    """All slabs as one, with the records of each point together and in their order."""
    point = np.concatenate([slab.point for slab in slabs])
    serial = np.concatenate([slab.serial for slab in slabs])
    in_file = np.argsort(serial, kind="stable") if (np.diff(serial) < 0).any() else np.arange(len(serial))
    order = in_file[np.argsort(point[in_file], kind="stable")]
    listed = order.tolist()
    shapes = list(chain.from_iterable(slab.shapes for slab in slabs))
    dtypes = list(chain.from_iterable(slab.dtypes for slab in slabs))
    width = slabs[0].values.shape[1]
    values = np.empty((len(order), width), dtype=np.float32)
    place_of, start = np.argsort(order), 0
    for slab in slabs:  # most of the memory: copied once
        values[place_of[start : start + len(slab.point)]] = slab.values
        start += len(slab.point)

    def column(name: str, size: int, filler: float, dtype: Any) -> NDArray[Any] | None:
        arrays = [getattr(slab, name) for slab in slabs]
        if all(part is None for part in arrays):
            return None
        full = [
            np.full((len(slab.point), size), filler, dtype=dtype) if part is None else part
            for slab, part in zip(slabs, arrays, strict=True)
        ]
        return np.concatenate(full)[order]

    names = dict.fromkeys(name for slab in slabs for name in slab.stats)
    return Slab(
        point[order],
        serial[order],
        np.concatenate([slab.place for slab in slabs])[order],
        [shapes[i] for i in listed],
        values,
        [dtypes[i] for i in listed],
        {
            name: np.concatenate([slab.stats.get(name, np.full(len(slab.point), np.nan)) for slab in slabs])[order]
            for name in names
        },
        column("sketch", SKETCH_SIZE, np.nan, np.float32),
        column("quantum", width, 0.0, np.float64),
        column("indices", width, -1, np.int64),
    )


def _rows(source: Slab, name: str, members: slice) -> Rows:
    sketch = None if source.sketch is None else source.sketch[members]
    quantum = None if source.quantum is None else source.quantum[members]
    indices = None if source.indices is None else source.indices[members]
    stats = {key: column[members] for key, column in source.stats.items()}
    place, values = source.place[members], source.values[members]
    return Rows(
        point=name,
        seq=place[:, 0],
        token_idx=place[:, 1],
        step=place[:, 2],
        decode=place[:, 3].astype(np.bool_),
        shapes=tuple(source.shapes[members]),
        values=values,
        counts=np.full(len(values), values.shape[1], dtype=np.int64),
        stats={key: column for key, column in stats.items() if not np.isnan(column).all()},
        sketch=None if sketch is None or np.isnan(sketch).all() else sketch,
        indices=None if indices is None or (indices < 0).all() else indices,
        quantum=None if quantum is None or not quantum.any() else quantum,
        dtype=str(source.dtypes[members][-1]),
    )
