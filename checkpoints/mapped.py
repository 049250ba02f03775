"""Arrays and dumps of a foreign engine as ours, as a mapping says (`checkpoints.mapping`)."""

from math import prod

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from .errors import InputError
from .mapping import MapEntry, Mapping
from .record import Dump, Rows


def mapped(mapping: Mapping, entry: MapEntry | None, array: NDArray[np.float32]) -> NDArray[np.float32]:
    """An array of theirs as ours: [T, …].

    Raises:
        InputError: it does not have the shape that the mapping requires.
    """
    if entry is None or not entry.changes:
        return array
    try:
        value = array.reshape(entry.reshape) if entry.reshape else array
        value = value.T if entry.transpose else value
        return _repaired(value, entry) if entry.rope_pairs else value
    except ValueError as error:
        raise InputError(f"{mapping.path}: {entry.point}: {error}.", "Check the shapes.", code="map") from error


def renamed(mapping: Mapping, dump: Dump) -> Dump:
    """A dump of slices with our names.

    Raises:
        InputError: an entry would change whole arrays, of which a slice is only a part; two names have one point.
    """
    if not mapping.entries and not mapping.layer_offset:
        return dump
    points: dict[str, list[Rows]] = {}
    names: dict[str, list[str]] = {}
    notes: list[str] = []
    for name, rows in dump.points.items():
        ours, entry = mapping.entry(name)
        renamed_rows = rows if entry is None or not entry.changes else _changed(mapping, entry, name, rows, notes)
        points.setdefault(ours, []).append(replace(renamed_rows, point=ours))
        names.setdefault(ours, []).append(name)
    for point, parts in points.items():
        if len(parts) > 1 and _contradict(parts):
            listed = " and ".join(map(repr, names[point][:2]))
            raise InputError(
                f"{mapping.path}: {listed} of {dump.path} are both {point}.", "Give each name a point of its own.", code="map"
            )
    return replace(dump, points={name: Rows.stack(parts) for name, parts in points.items()}, notes=(*dump.notes, *notes))


def _contradict(parts: list[Rows]) -> bool:
    """Whether records of several names stand at one place of one pass, with other first values."""
    if not all(rows.values.shape[1] for rows in parts):
        return False
    places = np.concatenate([np.stack((rows.seq, rows.token_idx, rows.step), axis=1) for rows in parts])
    first = np.concatenate([rows.values[:, 0] for rows in parts])
    first = np.where(np.isnan(first), np.inf, first)  # NaN is unequal to itself
    return len(np.unique(np.column_stack((places, first)), axis=0)) > len(np.unique(places, axis=0))


def _changed(mapping: Mapping, entry: MapEntry, name: str, rows: Rows, notes: list[str]) -> Rows:
    if rows.full().all():
        values = np.stack([mapped(mapping, entry, row[None]).reshape(-1) for row in rows.values])
        return replace(rows, values=values, sketch=None, stats={})
    if entry.reshape or entry.transpose:
        raise InputError(
            f"{mapping.path}: {name} is only a slice; reshape and transpose need whole rows.",
            "Print all values of it, or arrays (.npz).",
            code="map",
        )
    try:
        order = _pairing(entry, _size(rows, entry))
    except ValueError as error:
        raise InputError(f"{mapping.path}: {name}: {error}.", "Write e.g. head_size = 64.", code="map") from error
    return _moved(rows, name, order, notes)


def _repaired(array: NDArray[np.float32], entry: MapEntry) -> NDArray[np.float32]:
    """Rows [T, H·d] in the other pairing: "norm" (2i with 2i + 1) becomes "neox" (i with i + d/2), and the reverse."""
    rows = array.reshape(len(array), -1)
    return np.ascontiguousarray(rows[:, _pairing(entry, rows.shape[1])]).reshape(array.shape)


def _pairing(entry: MapEntry, size: int) -> NDArray[np.int64]:
    """int64 [size]: the index of their element at each place of our row.

    Raises:
        ValueError: neither heads nor head_size is given, or a row of `size` elements cannot be divided into such heads.
    """
    if not entry.heads and not entry.head_size:
        raise ValueError("rope_pairs needs heads, the number of heads in the row, or head_size")
    head = entry.head_size or size // entry.heads
    if head < 2 or head % 2 or size % head or (entry.heads and size > entry.heads * head):
        heads = f"heads of {head} elements" if entry.head_size else f"{entry.heads} heads of an even size"
        raise ValueError(
            f"a row of {size} elements cannot be divided into {heads}" + (", which must be even" if head % 2 else "")
        )
    shape = (size // head, head // 2, 2) if entry.rope_pairs == "norm" else (size // head, 2, head // 2)
    return np.arange(size).reshape(shape).swapaxes(1, 2).reshape(-1)


def _size(rows: Rows, entry: MapEntry) -> int:
    """The length of the whole row of a slice; without a shape, enough whole heads to hold every recorded element.

    Raises:
        ValueError: neither a shape nor the head size is known.
    """
    sizes = {prod(shape) for shape in rows.shapes if shape}
    if len(sizes) == 1:
        return sizes.pop()
    if not entry.head_size:
        raise ValueError("rope_pairs of a slice needs head_size, or the row's length as shape in each line")
    last = rows.values.shape[1] - 1 if rows.indices is None else int(rows.indices.max())
    size: int = (last // entry.head_size + 1) * entry.head_size
    return size


def _moved(rows: Rows, name: str, order: NDArray[np.int64], notes: list[str]) -> Rows:
    """A slice in another order: each value gets the index where it belongs. Statistics that do not depend on the order stay."""
    their_index = np.tile(np.arange(rows.values.shape[1]), (len(rows), 1)) if rows.indices is None else rows.indices
    there = (their_index >= 0) & (np.arange(their_index.shape[1]) < rows.counts[:, None]) & (their_index < len(order))
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    ours = np.where(there, place[np.where(there, their_index, 0)], -1)
    width, last = int(rows.counts.max(initial=0)), int(ours.max(initial=0))
    leading = int(((ours >= 0) & (ours < width)).sum(axis=1).max(initial=0))
    notes.append(
        f"{name}: in the other pairing {leading} of its {width} values are among the first {width}, "
        f"a reference with --slice {last + 1} has them all"
    )
    stats = {statistic: column for statistic, column in rows.stats.items() if statistic != "absmax_at"}
    return replace(rows, indices=ours, sketch=None, stats=stats)
