"""Streaming reader of dumps: format 1, and any JSONL whose lines carry `checkpoint`, `token_idx` and `values`.

What a foreign engine prints is accepted where it can be understood: log text before the brace, bare `nan` and `inf`,
a shape as a string. Lines that are no records are skipped and counted; a record that contradicts itself is an error
that names its line.
"""

import json
import os
import re
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from . import fields
from .errors import DumpError
from .points import resolve
from .record import DECODE, SKETCH_SIZE, Dump, End, Header, Rows, Token

_FLUSH = 4096  # records of a point that wait as Python lists until they become arrays
_BARE = re.compile(r'(?<![\w"])(-?nan(?:\(\w*\))?|[+-]?inf(?:inity)?|-?NaN|[+-]?Infinity)(?![\w"])', re.IGNORECASE)


def read(path: str | os.PathLike[str]) -> Dump:
    """Read a whole dump.

    Raises:
        DumpError: no such file, nothing in it, no record in it, a newer format, or a record that contradicts itself.
    """
    name = os.fspath(path)
    try:
        if Path(path).stat().st_size == 0 and Path(path).is_file():
            raise DumpError(f"{name} is empty.", "Was the engine stopped before it wrote anything?", code="empty")
        with Path(path).open("rb") as file:
            return _Reading(name).read(file)
    except OSError as error:
        raise DumpError(f"cannot read {name}: {error.strerror or error}.", "Check the path.", code="no-file") from error


def _loads(text: str | bytes) -> Any:
    """One line's JSON; text before the first brace and bare nan/inf are tolerated.

    Raises:
        ValueError: the line is not JSON even so.
    """
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        line = text if isinstance(text, str) else text.decode("utf-8", "replace")
    start = line.find("{")
    if start < 0:
        raise ValueError("no JSON object in this line")
    mended = _BARE.sub(r'"\1"', line[start:].rstrip().rstrip("\0"))
    try:
        return orjson.loads(mended)
    except orjson.JSONDecodeError:
        pass
    try:
        return json.loads(mended)  # numbers beyond float64, which orjson refuses, are infinite here
    except RecursionError:
        raise ValueError("the line is nested too deeply") from None


class _Column:
    """Records of one point while they are read."""

    def __init__(self, point: str) -> None:
        self.point = point
        self.parts: list[Rows] = []
        self._clear()

    def _clear(self) -> None:
        self.places: list[tuple[int, int, int, bool]] = []
        self.shapes: list[tuple[int, ...]] = []
        self.values: list[list[Any]] = []
        self.stats: list[dict[str, Any]] = []
        self.sketches: list[list[Any] | None] = []
        self.indices: list[list[int] | None] = []
        self.quanta: list[NDArray[np.float64] | None] = []
        self.dtype = "f32"

    def flush(self) -> None:
        if not self.places:
            return
        counts = np.array([len(row) for row in self.values], dtype=np.int64)
        width = int(counts.max(initial=0))
        place = np.array(self.places, dtype=np.int64)
        names = dict.fromkeys(name for row in self.stats for name in row)
        sketch = None
        if any(row is not None for row in self.sketches):
            blank = [np.nan] * SKETCH_SIZE
            sketch = _matrix([blank if row is None else row for row in self.sketches], SKETCH_SIZE)
        self.parts.append(
            Rows(
                point=self.point,
                seq=place[:, 0],
                token_idx=place[:, 1],
                step=place[:, 2],
                decode=place[:, 3].astype(np.bool_),
                shapes=tuple(self.shapes),
                values=_matrix(self.values, width),
                counts=counts,
                stats={name: np.array([fields.number(row.get(name)) for row in self.stats]) for name in names},
                sketch=sketch,
                indices=_ragged(self.indices, width, -1, np.int64),
                quantum=_ragged(self.quanta, width, 0.0, np.float64),
                dtype=self.dtype,
            )
        )
        self._clear()


def _matrix(rows: list[list[Any]], width: int) -> NDArray[np.float32]:
    """Lists of numbers (or words for non-finite ones) -> float32 [R, width], padded with NaN."""
    try:
        if all(len(row) == width for row in rows):
            with np.errstate(over="ignore"):
                return np.array(rows, dtype=np.float64).reshape(len(rows), width).astype(np.float32)
    except (TypeError, ValueError, OverflowError):
        pass
    matrix = np.full((len(rows), width), np.nan, dtype=np.float32)
    for r, row in enumerate(rows):
        with np.errstate(over="ignore"):
            matrix[r, : len(row)] = np.array([fields.number(value) for value in row], dtype=np.float64).astype(np.float32)
    return matrix


def _ragged(rows: list[Any], width: int, filler: Any, dtype: Any) -> NDArray[Any] | None:
    if all(row is None for row in rows):
        return None
    matrix = np.full((len(rows), width), filler, dtype=dtype)
    for r, row in enumerate(rows):
        if row is not None:
            matrix[r, : len(row)] = row
    return matrix


class _Reading:
    """The state of one read."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.header: Header | None = None
        self.columns: dict[str, _Column] = {}
        self.names: dict[str, str] = {}
        self.tokens: list[Token] = []
        self.end: End | None = None
        self.skipped = 0
        self.notes: list[str] = []
        self.line_number = 0

    def read(self, file: Any) -> Dump:
        line: bytes = b""
        for self.line_number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                found = _loads(line)
            except ValueError:
                self.skipped += 1
                if not line.endswith(b"\n"):
                    self.notes.append("the last line is cut short and was left out")
                continue
            if isinstance(found, dict):
                self._take(found, line)
            else:
                self.skipped += 1
        for column in self.columns.values():
            column.flush()
        points = {name: Rows.stack(column.parts) for name, column in self.columns.items()}
        if not points:
            raise DumpError(
                f"{self.name} has no checkpoint record in {self.line_number} lines.",
                'A record is a JSON line with "checkpoint", "token_idx" and "values".',
                code="no-records",
            )
        dump = Dump(self.name, self.header, points, tuple(self.tokens), self.end, self.skipped, ())
        return Dump(**{**dump.__dict__, "notes": tuple(self._notes(dump))})

    def _notes(self, dump: Dump) -> Iterator[str]:
        yield from self.notes
        if self.header is not None and self.end is None:
            yield "the dump has no end record: it was cut short; what is whole is used"
        if self.end is not None and self.end.checkpoints != dump.records:
            yield f"the end record counts {self.end.checkpoints} records, {dump.records} are there"
        if self.skipped:
            yield f"{self.skipped} lines are no records and were skipped"

    def _take(self, found: dict[str, Any], line: bytes) -> None:
        kind = found.get("type", "checkpoint")
        try:
            if kind == "header":
                self.header = fields.header(found)
            elif kind == "token":
                self.tokens.append(fields.token(found))
            elif kind == "end":
                self.end = End(
                    fields.integer(found.get("checkpoints", 0), "checkpoints"), fields.integer(found.get("tokens", 0), "tokens")
                )
            elif "checkpoint" in found and "values" in found:
                self._checkpoint(found, line)
            else:
                self.skipped += 1
        except (TypeError, ValueError, KeyError, OverflowError) as error:
            raise DumpError(f"{self.name}, line {self.line_number}: {error}.", "Mend what writes it.", code="record") from error

    def _checkpoint(self, found: dict[str, Any], line: bytes) -> None:
        label, values = found["checkpoint"], found["values"]
        if not isinstance(label, str) or not isinstance(values, list):
            raise TypeError('"checkpoint" must be a name and "values" a list of numbers')
        token_idx = fields.integer(found.get("token_idx", 0), "token_idx")
        step = fields.integer(found.get("step", 0), "step")
        seq = fields.integer(found.get("seq", 0), "seq", fields.SEQUENCES)
        shape = fields.shape(found.get("shape"))
        if shape and prod(shape) < len(values):
            raise ValueError(f"{label} has {len(values)} values, more than its shape {list(shape)} holds")
        fields.check_numbers(values, '"values"')
        sketch, indices = found.get("sketch"), found.get("indices")
        if sketch is not None:
            fields.check_numbers(sketch, '"sketch"')
            if len(sketch) != SKETCH_SIZE:
                raise ValueError(f"{label} has a sketch of {len(sketch)} numbers instead of {SKETCH_SIZE}")
        column = self._column(label)
        column.places.append((seq, token_idx, step, found.get("phase") == DECODE))
        column.shapes.append(shape)
        column.values.append(values)
        column.stats.append(fields.statistics(found.get("stats") or {}))
        column.sketches.append(sketch)
        column.indices.append(None if indices is None else fields.indices(indices, len(values)))
        column.quanta.append(fields.quantum(line, len(values)) if self.header is None else None)
        column.dtype = str(found.get("dtype", "f32"))
        if len(column.places) >= _FLUSH:
            column.flush()

    def _column(self, label: str) -> _Column:
        name = self.names.get(label)
        if name is None:
            name = self.names[label] = resolve(label, self.header.model.layers if self.header else None)
            self.columns.setdefault(name, _Column(name))
        return self.columns[name]
