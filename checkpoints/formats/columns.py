"""Dumps whose records are stored as arrays in a safetensors file beside the JSON lines (`checkpoints.columns` writes them)."""

import json
import stat
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from ..columns import KIND, beside
from ..errors import DumpError
from ..mapped import renamed
from ..mapping import Mapping
from ..nesting import parsed
from ..reading import fields, lenient
from ..reading.reader import notes
from ..record import SKETCH_SIZE, STATISTICS, Dump, End, Header, Rows, Token
from ..regular import require_regular

_FIRST_LINE = 1 << 24  # bytes of a header at most: the pieces and the dataflow of a long prompt
_KINDS = {"place": np.int64, "shape": np.int64, "counts": np.int64, "values": np.float32, "stats": np.float64}
_NAMES: dict[type[Any], str] = {np.int64: "I64", np.float32: "F32", np.float64: "F64"}  # safetensors' of these types
_OPTIONAL = {"sketch": np.float32, "indices": np.int64, "quantum": np.float64}
_AGAIN = "Dump again: the two files belong together."


def detect(path: Path) -> bool:
    """A file of lines whose header names a file of arrays."""
    if not stat.S_ISREG(path.stat().st_mode):
        return False
    with path.open("rb") as file:
        line = file.readline(_FIRST_LINE)
    return line.startswith(b"{") and b'"columns"' in line and _header(line) is not None


def _header(line: bytes) -> Header | None:
    """The header in a line, if it names a file of arrays."""
    try:
        content = lenient.loads(line)
        if not isinstance(content, dict) or content.get("type") != "header" or not isinstance(content.get("columns"), dict):
            return None
        return fields.header(content)
    except (TypeError, ValueError, KeyError, OverflowError):  # the reader of lines reports what is wrong with it
        return None


def read(path: Path, mapping: Mapping) -> Dump:
    """All records of both files.

    Raises:
        DumpError: the arrays are missing, belong to another dump, or do not match the lines.
    """
    with path.open("rb") as file:
        first, *lines = file.read().split(b"\n")
    header = _header(first)
    if header is None:
        raise DumpError(f"{path} changed while it was being read.", _AGAIN, code="columns")
    parts: dict[str, list[Rows]] = {}
    tokens: list[Token] = []
    end: End | None = None
    skipped = 0
    arrays = _Arrays(path, header)
    for number, line in enumerate(lines, 2):
        try:
            item = _item(line, arrays)
        except (TypeError, ValueError, KeyError, OverflowError) as error:
            raise DumpError(f"{path}, line {number}: {error}.", _AGAIN, code="columns") from error
        if isinstance(item, Rows):
            parts.setdefault(item.point, []).append(item)
        elif isinstance(item, Token):
            tokens.append(item)
        elif isinstance(item, End):
            end = item
        else:
            skipped += bool(line.strip())
    if not parts:
        raise DumpError(f"{path} has no checkpoint record.", _AGAIN, code="no-records")
    points = {name: Rows.stack(several) for name, several in parts.items()}
    dump = Dump(str(path), header, points, tuple(tokens), end, skipped)
    return renamed(mapping, replace(dump, notes=tuple(notes(dump))))


def _item(line: bytes, arrays: "_Arrays") -> Rows | Token | End | None:
    """The content of one line."""
    try:
        content = lenient.loads(line)
    except ValueError:
        return None
    kind = content.get("type") if isinstance(content, dict) else None
    if kind == KIND:
        return arrays.rows(content)
    if kind == "token":
        return fields.token(content)
    if kind == "end":
        return fields.end(content)
    return None


class _Arrays:
    """The file of arrays of a dump."""

    def __init__(self, dump: Path, header: Header) -> None:
        from safetensors import SafetensorError, safe_open

        named = (header.columns or {}).get("file")
        if named != beside(dump).name and (not isinstance(named, str) or not named or Path(named).name != named):
            raise DumpError(f"{dump} names its arrays {named!r:.60}, which is not a file beside it.", _AGAIN, code="columns")
        self.path = dump.with_name(named)
        self._given: set[str] = set()
        self._tables: dict[bytes, tuple[tuple[tuple[int, ...], ...], NDArray[np.int64]]] = {}
        try:
            require_regular(self.path, DumpError, _AGAIN)
            checked: Any = safe_open(self.path, framework="numpy")  # the header's form, offsets within the file
            self._names = set(checked.keys())
            identity = (checked.metadata() or {}).get("dump")
            # Arrays are views of the file's pages: copying them would take most of the time of reading. What is changed in them
            # stays in this process.
            mapped = np.memmap(self.path, dtype=np.uint8, mode="c")
            size = int.from_bytes(mapped[:8].tobytes(), "little")
            self._header: dict[str, Any] = parsed(json.loads, mapped[8 : 8 + size].tobytes())
            self._data = mapped.view(np.ndarray)[8 + size :]
        except (OSError, ValueError, SafetensorError) as error:
            why = " ".join(str(error).split())[:100]
            raise DumpError(f"cannot read {self.path}, the arrays of {dump}: {why}.", _AGAIN, code="columns") from error
        if identity != (header.columns or {}).get("id"):
            raise DumpError(f"{self.path} holds the arrays of a dump other than {dump}.", _AGAIN, code="columns")

    def _get(self, name: str, kind: type[Any]) -> NDArray[Any]:
        if name not in self._names:
            raise DumpError(f"{self.path} has no array {name!r:.80}.", _AGAIN, code="columns")
        entry = self._header.get(name, {})
        if entry.get("dtype") != _NAMES[kind]:
            raise DumpError(f"{self.path}: {name:.80} is {entry.get('dtype')}, not {kind.__name__}.", _AGAIN, code="columns")
        begin, end = entry["data_offsets"]
        array: NDArray[Any] = self._data[begin:end].view(kind).reshape(entry["shape"])
        return array if array.flags.aligned else array.copy()

    def rows(self, line: dict[str, Any]) -> Rows:
        """The records of one part.

        Raises:
            DumpError: an array is missing, or the arrays do not match.
        """
        point, names = line.get("checkpoint"), line.get("stats", [])
        stem = f"{point}/{line.get('part')}/"
        if stem in self._given:  # repeated often enough, a small file would fill the memory
            raise DumpError(f"{self.path}: {stem[:-1]!r:.80} is named by two lines.", _AGAIN, code="columns")
        self._given.add(stem)
        arrays = {name: self._get(stem + name, kind) for name, kind in _KINDS.items()}
        arrays |= {name: self._get(stem + name, kind) for name, kind in _OPTIONAL.items() if stem + name in self._names}
        if not (isinstance(point, str) and _names_fit(names) and _shapes_fit(arrays, line, len(names)) and _values_fit(arrays)):
            raise DumpError(f"{self.path}: the arrays of {point!r:.80} do not fit together.", _AGAIN, code="columns")
        place, counts, (shapes, held) = arrays["place"], arrays["counts"], self._shapes(arrays["shape"])
        if (counts > held).any():
            raise DumpError(f"{self.path}: {point!r:.80} has more values than its shape holds.", _AGAIN, code="columns")
        return Rows(
            point=point,
            seq=place[:, 0],
            token_idx=place[:, 1],
            step=place[:, 2],
            decode=place[:, 3] != 0,
            shapes=shapes,
            values=arrays["values"],
            counts=counts,
            stats={name: arrays["stats"][:, i] for i, name in enumerate(names) if name in STATISTICS},
            sketch=arrays.get("sketch"),
            indices=arrays.get("indices"),
            quantum=arrays.get("quantum"),
            dtype=str(line.get("dtype", "f32")),
        )

    def _shapes(self, table: NDArray[np.int64]) -> tuple[tuple[tuple[int, ...], ...], NDArray[np.int64]]:
        """The shapes of a table and the most values that each may hold, int64 [R]; the points of all layers have few tables."""
        key = table.tobytes()
        if key not in self._tables:
            shapes = _shapes(table)
            held = {shape: prod(shape) if shape else fields.POSITIONS for shape in set(shapes)}
            self._tables[key] = shapes, np.fromiter(map(held.__getitem__, shapes), np.int64, len(shapes))
        return self._tables[key]


def _names_fit(names: Any) -> bool:
    """Whether these are names of statistics, each once."""
    return isinstance(names, list) and all(isinstance(name, str) for name in names) and len(set(names)) == len(names)


def _shapes_fit(arrays: dict[str, NDArray[Any]], line: dict[str, Any], statistics: int) -> bool:
    """Whether the arrays of a part have a row for each of its records, and columns as the format says."""
    count, width = len(arrays["values"]), arrays["values"].shape[-1]
    wanted = {"place": (count, 4), "counts": (count,), "values": (count, width), "stats": (count, statistics)}
    wanted |= {"sketch": (count, SKETCH_SIZE), "indices": (count, width), "quantum": (count, width)}
    wanted |= {"shape": (count, arrays["shape"].shape[-1])}
    return line.get("records") == count and all(array.shape == wanted[name] for name, array in arrays.items())


def _values_fit(arrays: dict[str, NDArray[Any]]) -> bool:
    """Whether counts, places, indices and the steps of decimals are such as lines may have."""
    values, counts, quantum = arrays["values"], arrays["counts"], arrays.get("quantum", np.zeros(0))
    return (
        bool(((counts >= 0) & (counts <= values.shape[1])).all())
        and _in_bounds(arrays["place"])
        and _indices_fit(arrays.get("indices"), counts)
        and bool((np.isfinite(quantum) & (quantum >= 0)).all())
        and not (quantum.size and bool(fields.beyond_values(quantum, values).any()))
    )


def _in_bounds(place: NDArray[np.int64]) -> bool:
    """Whether places [R, 4] are such as lines may have: sequence, position, pass, and 0 or 1."""
    limits = np.array([fields.SEQUENCES, fields.POSITIONS, fields.POSITIONS, 2])
    return bool(((place >= 0) & (place < limits)).all())


def _indices_fit(indices: NDArray[np.int64] | None, counts: NDArray[np.int64]) -> bool:
    """Whether the indices [R, k] of a row's values differ, and are -1 after them and in rows with leading values only."""
    if indices is None or not indices.size:
        return True
    width = indices.shape[1]
    scattered = (np.arange(width)[None, :] < counts[:, None]) & (indices[:, :1] >= 0)
    inside = np.where(scattered, indices, -1)
    ordered = np.sort(np.where(scattered, indices, -1 - np.arange(width)[None, :]), axis=1)
    return bool((inside == indices).all() and (indices < fields.POSITIONS).all() and (np.diff(ordered, axis=1) > 0).all())


def _shapes(table: NDArray[np.int64]) -> tuple[tuple[int, ...], ...]:
    """Shapes from a table padded with -1 after the last axis of each, as the reader of lines gives them.

    Raises:
        ValueError: a shape is larger than any activation.
    """
    alike = len(table) > 1 and bool((table == table[0]).all())
    if table.shape[1] > fields.DIMENSIONS:
        raise ValueError(f"a shape has {table.shape[1]} dimensions, more than any activation has")
    rows = table[:1] if alike else table
    shapes = [tuple(row) for row in rows.tolist()]
    plain = (
        (rows >= 0).all(axis=1) & (rows[:, :1] != 1).all(axis=1) & (np.prod(rows.astype(np.float64), axis=1) < fields.POSITIONS)
    )
    for i in np.flatnonzero(~plain).tolist():
        shapes[i] = fields.shape([axis for axis in shapes[i] if axis >= 0])
    return tuple(shapes) * (len(table) if alike else 1)
