"""Streaming reader of dumps: format 1, and any JSONL whose lines carry `checkpoint`, `token_idx` and `values`.

What a foreign engine prints is accepted where it can be understood: log text before the brace, bare `nan` and `inf`,
a shape as a string. Lines that are no records are skipped and counted; a record that contradicts itself is an error
that names its line.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from .errors import DumpError
from .points import resolve
from .record import DECODE, FORMAT, SKETCH_SIZE, Dump, End, Header, ModelInfo, Rows, Token

_FLUSH = 4096  # records of a point that wait as Python lists until they become arrays
_WORDS = {
    "NaN": np.nan,
    "nan": np.nan,
    "-nan": np.nan,
    "Infinity": np.inf,
    "inf": np.inf,
    "-Infinity": -np.inf,
    "-inf": -np.inf,
}
_BARE = re.compile(r'(?<![\w"])(-?nan(?:\(\w*\))?|[+-]?inf(?:inity)?|-?NaN|[+-]?Infinity)(?![\w"])', re.IGNORECASE)
_VALUES = re.compile(rb'"values"\s*:\s*\[([^\]]*)\]')
_DECIMAL = re.compile(r"[+-]?(\d*)(?:\.(\d*))?(?:[eE]([+-]?\d+))?")
# A float32 needs up to 9 significant digits. A text whose values all stop at 7 or fewer was rounded for print.
_PRINTED_DIGITS = 7


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
    return orjson.loads(_BARE.sub(r'"\1"', line[start:].rstrip().rstrip("\0")))


def _number(value: Any) -> float:
    if isinstance(value, str):
        word = value.split("(")[0].lower()
        if word in ("-nan", "nan"):
            return np.nan
        return _WORDS[value] if value in _WORDS else float(word)
    return np.nan if value is None else float(value)


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
                stats={name: np.array([_number(row.get(name)) for row in self.stats]) for name in names},
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
            matrix[r, : len(row)] = np.array([_number(value) for value in row], dtype=np.float64).astype(np.float32)
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
        self.torn = False
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
                    self.torn = True
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
        dump = Dump(self.name, self.header, points, tuple(self.tokens), self.end, self.skipped, (), self.torn)
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
                self._header(found)
            elif kind == "token":
                self.tokens.append(_token(found))
            elif kind == "end":
                self.end = End(int(found.get("checkpoints", 0)), int(found.get("tokens", 0)))
            elif "checkpoint" in found and "values" in found:
                self._checkpoint(found, line)
            else:
                self.skipped += 1
        except (TypeError, ValueError, KeyError, OverflowError) as error:
            raise DumpError(f"{self.name}, line {self.line_number}: {error}.", "Mend what writes it.", code="record") from error

    def _header(self, found: dict[str, Any]) -> None:
        version = found.get("format", FORMAT)
        if not isinstance(version, int) or version > FORMAT:
            raise ValueError(f"format {version!r} is newer than this parity, which reads format {FORMAT}")
        known = {field.name for field in fields(Header)}
        taken = {name: value for name, value in found.items() if name in known}
        model = found.get("model") or {}
        model = {"name": model} if isinstance(model, str) else model
        model_fields = {field.name for field in fields(ModelInfo)}
        taken["model"] = ModelInfo(**{name: value for name, value in model.items() if name in model_fields})
        taken["tokens"] = tuple(int(token) for token in found.get("tokens") or ())
        taken["pieces"] = tuple(str(piece) for piece in found.get("pieces") or ())
        taken.setdefault("source", "unknown")
        self.header = Header(**taken)

    def _checkpoint(self, found: dict[str, Any], line: bytes) -> None:
        label, values = found["checkpoint"], found["values"]
        if not isinstance(label, str) or not isinstance(values, list):
            raise TypeError('"checkpoint" must be a name and "values" a list of numbers')
        token_idx = found.get("token_idx", 0)
        if isinstance(token_idx, bool) or not isinstance(token_idx, int) or not 0 <= token_idx < 1 << 40:
            raise ValueError(f'"token_idx" must be a position from 0, not {token_idx!r}')
        shape = _shape(found.get("shape"))
        size = int(np.prod(shape, dtype=np.float64)) if shape else -1
        if 0 <= size < len(values):
            raise ValueError(f"{label} has {len(values)} values, more than its shape {list(shape)} holds")
        for value in values:
            if isinstance(value, (bool, list, dict)):
                raise TypeError(f"{label} has a value that is no number: {value!r:.40}")
        for value in (value for value in values if isinstance(value, str)):
            _number(value)
        sketch, indices = found.get("sketch"), found.get("indices")
        if sketch is not None and len(sketch) != SKETCH_SIZE:
            raise ValueError(f"{label} has a sketch of {len(sketch)} numbers instead of {SKETCH_SIZE}")
        if indices is not None and len(indices) != len(values):
            raise ValueError(f"{label} has {len(indices)} indices for {len(values)} values")
        column = self._column(label)
        step = int(found.get("step", 0))
        column.places.append((int(found.get("seq", 0)), token_idx, step, found.get("phase") == DECODE))
        column.shapes.append(shape)
        column.values.append(values)
        column.stats.append(found.get("stats") or {})
        column.sketches.append(sketch)
        column.indices.append(indices)
        column.quanta.append(_quantum(line, len(values)) if self.header is None else None)
        column.dtype = str(found.get("dtype", "f32"))
        if len(column.places) >= _FLUSH:
            column.flush()

    def _column(self, label: str) -> _Column:
        name = self.names.get(label)
        if name is None:
            name = self.names[label] = resolve(label, self.header.model.layers if self.header else None)
            self.columns.setdefault(name, _Column(name))
        return self.columns[name]


def _token(found: dict[str, Any]) -> Token:
    top = tuple((int(number), _number(value)) for number, value in found.get("top") or ())
    return Token(int(found["token_idx"]), int(found["id"]), str(found.get("text", "")), top, int(found.get("seq", 0)))


def _shape(found: Any) -> tuple[int, ...]:
    """A shape as a list or as text ("[1,151936]"); leading ones are dropped, since a record is one position's row."""
    numbers = re.findall(r"-?\d+", found) if isinstance(found, str) else (found or [])
    shape = tuple(int(number) for number in numbers)
    if any(number < 0 for number in shape):
        raise ValueError(f'"shape" has a negative number: {list(shape)}')
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


def _quantum(line: bytes, count: int) -> NDArray[np.float64] | None:
    """The step of the last printed decimal of each value, or None where the text gives every float32 exactly.

    `%f` prints the same number of decimals everywhere; `%g` stops at a number of significant digits.
    """
    match = _VALUES.search(line)
    texts = [text.strip().strip('"') for text in match[1].decode("ascii", "replace").split(",")] if match else []
    parsed = [_DECIMAL.fullmatch(text) for text in texts]
    if len(texts) != count or not count:
        return None
    decimals, digits = [], []
    for found in parsed:
        if found is None or not (found[1] or found[2]):
            continue  # nan, inf
        decimals.append((len(found[2] or ""), int(found[3] or 0)))
        digits.append(len(((found[1] or "") + (found[2] or "")).strip("0")))
    if not decimals or (max(digits) > _PRINTED_DIGITS and len({places for places, _ in decimals}) > 1):
        return None
    if len({places for places, _ in decimals}) == 1 and any(places for places, _ in decimals):
        steps = [10.0 ** (exponent - places) for places, exponent in decimals]
    else:
        steps = [_last_digit(found, max(digits)) for found in parsed if found is not None and (found[1] or found[2])]
    quanta = np.zeros(count)
    quanta[[i for i, found in enumerate(parsed) if found is not None and (found[1] or found[2])]] = steps
    return quanta


def _last_digit(found: re.Match[str], digits: int) -> float:
    """The step of the last of `digits` significant digits of a printed number."""
    value = abs(float(found[0]))
    return 0.0 if value == 0 else float(10.0 ** (np.floor(np.log10(value)) - digits + 1))
