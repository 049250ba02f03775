"""What a foreign engine's names mean (`--map names.toml`): their name = our point, with the changes that the array needs.

layer_offset = -1            # their layer 1 is our layer 0
position_offset = 0

[names]
"h.{i}.attn.q" = { point = "blk.{i}.q", rope_pairs = "norm", heads = 14 }
"h.{i}" = "blk.{i}.l_out"
wte = { point = "embd", transpose = true }
"""

import re
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import InputError
from .points import parse, resolve
from .record import Dump, Rows
from .regular import read_text

_LARGEST = 1 << 22  # bytes of a mapping file: 40,000 names
_KEYS = {"point", "transpose", "reshape", "rope_pairs", "heads", "head_size"}


@dataclass(frozen=True)
class Entry:
    """What one of their names means, and the changes that turn its array into ours, in this order: reshape, transpose, rope_pairs."""

    pattern: re.Pattern[str]
    point: str
    reshape: tuple[int, ...] = ()
    transpose: bool = False
    rope_pairs: str = ""
    heads: int = 0
    head_size: int = 0

    @property
    def changes(self) -> bool:
        """Whether the array itself is changed."""
        return bool(self.reshape or self.transpose or self.rope_pairs)


@dataclass(frozen=True)
class Mapping:
    """The whole mapping file; an empty one knows only the aliases."""

    entries: tuple[Entry, ...] = ()
    layer_offset: int = 0
    position_offset: int | None = None
    path: str = field(default="", compare=False)

    def entry(self, name: str) -> tuple[str, Entry | None]:
        """Our point for their name, and the entry that says so (None if it is an alias)."""
        for entry in self.entries:
            match = entry.pattern.fullmatch(name)
            if match:
                layer = match.groupdict().get("i")
                number = "" if layer is None else str(int(layer) + self.layer_offset)
                return entry.point.replace("{i}", number), entry
        point = parse(resolve(name))
        if point.layer is not None and self.layer_offset:
            return f"blk.{point.layer + self.layer_offset}.{point.kind}", None
        return point.name, None

    def array(self, entry: Entry | None, array: NDArray[np.float32]) -> NDArray[np.float32]:
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
            raise InputError(f"{self.path}: {entry.point}: {error}.", "Check the shapes.", code="map") from error

    def renamed(self, dump: Dump) -> Dump:
        """A dump of slices with our names.

        Raises:
            InputError: an entry would change whole arrays, of which a slice is only a part.
        """
        if not self.entries and not self.layer_offset:
            return dump
        points: dict[str, list[Rows]] = {}
        notes: list[str] = []
        for name, rows in dump.points.items():
            ours, entry = self.entry(name)
            renamed_rows = rows if entry is None or not entry.changes else self._changed(entry, name, rows, notes)
            points.setdefault(ours, []).append(replace(renamed_rows, point=ours))
        return replace(dump, points={name: Rows.stack(parts) for name, parts in points.items()}, notes=(*dump.notes, *notes))

    def _changed(self, entry: Entry, name: str, rows: Rows, notes: list[str]) -> Rows:
        if rows.full().all():
            values = np.stack([self.array(entry, row[None]).reshape(-1) for row in rows.values])
            return replace(rows, values=values, sketch=None, stats={})
        if entry.reshape or entry.transpose:
            raise InputError(
                f"{self.path}: {name} is only a slice; reshape and transpose need whole rows.",
                "Print all values of it, or arrays (.npz).",
                code="map",
            )
        try:
            order = _pairing(entry, _size(rows, entry))
        except ValueError as error:
            raise InputError(f"{self.path}: {name}: {error}.", "Write e.g. head_size = 64.", code="map") from error
        return _moved(rows, name, order, notes)


def _repaired(array: NDArray[np.float32], entry: Entry) -> NDArray[np.float32]:
    """Rows [T, H·d] in the other pairing: "norm" (2i with 2i + 1) becomes "neox" (i with i + d/2), and the reverse."""
    rows = array.reshape(len(array), -1)
    return np.ascontiguousarray(rows[:, _pairing(entry, rows.shape[1])]).reshape(array.shape)


def _pairing(entry: Entry, size: int) -> NDArray[np.int64]:
    """int64 [size]: the index of their element at each place of our row.

    Raises:
        ValueError: neither heads nor head_size is given, or a row of `size` elements cannot be divided into such heads.
    """
    if not entry.heads and not entry.head_size:
        raise ValueError("rope_pairs needs heads, the number of heads in the row, or head_size")
    head = entry.head_size or size // entry.heads
    if head < 2 or head % 2 or size % head or (entry.heads and size > entry.heads * head):
        raise ValueError(f"a row of {size} elements cannot be divided into {entry.heads or 'some'} heads of an even size")
    shape = (size // head, head // 2, 2) if entry.rope_pairs == "norm" else (size // head, 2, head // 2)
    return np.arange(size).reshape(shape).swapaxes(1, 2).reshape(-1)


def _size(rows: Rows, entry: Entry) -> int:
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
    theirs = np.tile(np.arange(rows.values.shape[1]), (len(rows), 1)) if rows.indices is None else rows.indices
    there = (theirs >= 0) & (np.arange(theirs.shape[1]) < rows.counts[:, None]) & (theirs < len(order))
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    ours = np.where(there, place[np.where(there, theirs, 0)], -1)
    width, last = int(rows.counts.max(initial=0)), int(ours.max(initial=0))
    leading = int(((ours >= 0) & (ours < width)).sum(axis=1).max(initial=0))
    notes.append(
        f"{name}: in the other pairing {leading} of its {width} values are among the first {width}, "
        f"a reference with --slice {last + 1} has them all"
    )
    stats = {statistic: column for statistic, column in rows.stats.items() if statistic != "absmax_at"}
    return replace(rows, indices=ours, sketch=None, stats=stats)


def read_mapping(path: Path) -> Mapping:
    """Read a mapping file.

    Raises:
        InputError: it cannot be read, or contains something unknown.
    """
    import tomllib

    try:
        table = tomllib.loads(read_text(path, _LARGEST))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise InputError(f"cannot read {path}: {reason}.", "It is TOML: [names], their = our.", code="map") from error
    unknown = set(table) - {"names", "layer_offset", "position_offset"}
    if unknown:
        raise InputError(f"{path}: {sorted(unknown)[0]!r} is an unknown key.", "Names belong below [names].", code="map")
    names = table.get("names", {})
    if not isinstance(names, dict):
        raise InputError(f"{path}: names must be a table.", "Write [names] in a line of its own.", code="map")
    layers, positions = table.get("layer_offset", 0), table.get("position_offset")
    if not all(
        isinstance(offset, int) and not isinstance(offset, bool) for offset in (layers, 0 if positions is None else positions)
    ):
        raise InputError(f"{path}: offsets must be whole numbers.", code="map")
    entries = tuple(_entry(path, str(theirs), ours) for theirs, ours in names.items())
    return Mapping(entries, layers, positions, str(path))


def _entry(path: Path, theirs: str, ours: Any) -> Entry:
    entry = {"point": ours} if isinstance(ours, str) else ours
    if not isinstance(entry, dict) or not isinstance(entry.get("point"), str) or set(entry) - _KEYS:
        raise InputError(
            f"{path}: {theirs!r} must be a point, or a table with point and some of {', '.join(sorted(_KEYS - {'point'}))}.",
            'Write "their.name" = "blk.5.l_out".',
            code="map",
        )
    pairs, reshape = entry.get("rope_pairs", ""), entry.get("reshape", [])
    whole = isinstance(reshape, list) and all(isinstance(size, int) for size in reshape)
    heads, head_size = entry.get("heads", 0), entry.get("head_size", 0)
    if pairs not in ("", "norm", "neox") or not whole or not all(isinstance(n, int) and n >= 0 for n in (heads, head_size)):
        raise InputError(
            f"{path}: {theirs!r}: rope_pairs is norm or neox, reshape a list of sizes, heads and head_size are numbers.",
            code="map",
        )
    pattern = re.escape(theirs).replace(re.escape("{i}"), r"(?P<i>\d{1,6})", 1)
    return Entry(re.compile(pattern), entry["point"], tuple(reshape), bool(entry.get("transpose")), pairs, heads, head_size)
