"""Streaming reader of dumps: format 1, and any JSONL whose lines carry `checkpoint`, `token_idx` and `values`.

What a foreign engine prints is accepted where it can be understood (`checkpoints.fields`, `checkpoints.lenient`). Lines that
are no records are skipped and counted; a record that contradicts itself is an error that names its line. Lines are read many at
a time; what that way doesn't understand is read again line by line.
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import orjson
import simdjson

from . import fields, lenient
from .errors import DumpError
from .points import resolve
from .record import DECODE, SKETCH_SIZE, Dump, End, Header, Rows, Token
from .slabs import Odd, Slab, as_rows, blown_up, slab

_BLOCK = 1 << 18  # bytes read at once: the objects of that many lines stay in a core's cache
_LINE = 1 << 26  # bytes of the longest line: a row of 4 million values; as objects such a line takes 1 GB
_PENDING = 1 << 22  # values that wait to become Rows: 16 MiB …
_RECORDS = 1 << 16  # … or records: their other fields take more than 16 values do
_WIDE = 2048  # bytes of a line from which the values are parsed apart, straight into an array

Item = Header | Rows | Token | End
_RECORD = "checkpoint"


def read(path: str | os.PathLike[str]) -> Dump:
    """Read a whole dump.

    Raises:
        DumpError: no such file, nothing in it, no record in it, a newer format, or a record that contradicts itself.
    """
    scan = Scan(path)
    parts: dict[str, list[Rows]] = {}
    header, end, tokens = None, None, []
    for item in scan:
        if isinstance(item, Rows):
            parts.setdefault(item.point, []).append(item)
        elif isinstance(item, Token):
            tokens.append(item)
        elif isinstance(item, End):
            end = item
        else:
            header = item
    points = {}
    for name, found in parts.items():
        if blown_up(found):
            raise DumpError(
                f"{scan.name}: the records of {name} hold from few to very many values.",
                "Print as many in each.",
                code="record",
            )
        points[name] = Rows.stack(found)
    dump = Dump(scan.name, header, points, tuple(tokens), end, scan.skipped, (), scan.torn)
    return replace(dump, notes=tuple(_notes(dump)))


def _notes(dump: Dump) -> Iterator[str]:
    if dump.torn:
        yield "the last line is cut short and was left out"
    if dump.header is not None and dump.end is None:
        yield "the dump has no end record: it was cut short; what is whole is used"
    if dump.end is not None and dump.end.checkpoints != dump.records:
        yield f"the end record counts {dump.end.checkpoints} records, {dump.records} are there"
    if dump.skipped:
        yield f"{dump.skipped} lines are no records and were skipped"


class Scan:
    """Reads a dump as a stream: iterating gives headers, tokens, ends, and records as `Rows` batches of one point each.

    Memory does not grow with the file. Records of one point keep their order; those of different points may come in another
    order than in the file. `skipped`, `torn` and `records` are complete when the iteration is.

    Raises (while iterating):
        DumpError: as `read`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.name = os.fspath(path)
        self.header: Header | None = None
        self.skipped = 0
        self.records = 0
        self.torn = False
        self._line = 0
        self._serial = 0
        self._waiting = 0
        self._names: list[str] = []
        self._numbers: dict[str, int] = {}  # label as printed -> number of its point
        self._canonical: dict[str, int] = {}
        self._shapes: dict[Any, tuple[tuple[int, ...], float]] = {}
        self._slabs: list[Slab] = []
        self._parser = simdjson.Parser()

    def __iter__(self) -> Iterator[Item]:
        try:
            if Path(self.name).stat().st_size == 0 and Path(self.name).is_file():
                raise DumpError(f"{self.name} is empty.", "Was the engine stopped before it wrote anything?", code="empty")
            with Path(self.name).open("rb") as file:
                for lines in self._blocks(file):
                    yield from self._take(lines)
                    self._line += len(lines)
                    if self._serial - self.records > _RECORDS or self._waiting > _PENDING:
                        yield from self._flush()
        except OSError as error:
            raise DumpError(
                f"cannot read {self.name}: {error.strerror or error}.", "Check the path.", code="no-file"
            ) from error
        yield from self._flush()
        if not self.records:
            raise DumpError(
                f"{self.name} has no checkpoint record in {self._line} lines.",
                'A record is a JSON line with "checkpoint", "token_idx" and "values".',
                code="no-records",
            )

    def _blocks(self, file: BinaryIO) -> Iterator[list[bytes]]:
        """Whole lines, some 256 KiB at a time."""
        waiting: list[bytes] = []
        size = 0
        while block := file.read(_BLOCK):
            cut = block.rfind(b"\n") + 1
            if not cut:
                waiting.append(block)
                size += len(block)
                if size > _LINE:
                    raise DumpError(
                        f"{self.name}: line {self._line + 1} is longer than {_LINE >> 20} MiB.",
                        "Is it a dump? Record fewer values in a line.",
                        code="line",
                    )
                continue
            yield b"".join([*waiting, block[:cut]]).split(b"\n")[:-1]
            waiting, size = [block[cut:]], len(block) - cut
        last = b"".join(waiting)
        if last.strip():
            yield [last]
            self.torn = self._torn_by(last)

    def _torn_by(self, last: bytes) -> bool:
        try:
            lenient.loads(last)
        except ValueError:
            return True
        return False

    def _flush(self) -> Iterator[Rows]:
        slabs, self._slabs, self._waiting = self._slabs, [], 0
        for rows in as_rows(slabs, self._names):
            self.records += len(rows)
            yield rows

    def _take(self, lines: list[bytes]) -> Iterator[Item]:
        """The items of some lines: all at once where they are plain, else one by one."""
        starts = [line.find(b"{") for line in lines]
        if any(starts):  # log text before the brace, or lines without one
            numbered = [(i, line[start:]) for i, (line, start) in enumerate(zip(lines, starts, strict=True)) if start >= 0]
            self.skipped += sum(1 for line, start in zip(lines, starts, strict=True) if start < 0 and line.strip())
            numbers, lines = [i for i, _ in numbered], [line for _, line in numbered]
        else:
            numbers = list(range(len(lines)))
        found = self._parse(lines)
        done = 0
        if found is not None:
            others = [
                i for i, record in enumerate(found) if "checkpoint" not in record or record.get("type", _RECORD) != _RECORD
            ]
            try:
                for i in [*others, len(found)]:
                    self._records(found[done:i], lines[done:i])
                    done = i
                    if i < len(found):
                        yield from self._careful(lines[i], numbers[i])
                        done = i + 1
            except Odd:  # what is left of these lines is read with care
                pass
        for line, number in zip(lines[done:], numbers[done:], strict=True):
            yield from self._careful(line, number)

    def _parse(self, lines: list[bytes]) -> list[dict[str, Any]] | None:
        """The objects of lines that are plain JSON, or None where one is not."""
        joined = b",".join(lines)
        if b"true" in joined or b"false" in joined:  # which packing would take for 1 and 0
            return None
        wide = len(joined) > _WIDE * len(lines)
        try:
            found = [self._parse_wide(line) for line in lines] if wide else orjson.loads(b"[" + joined + b"]")
        except (orjson.JSONDecodeError, ValueError, RuntimeError):
            return None
        # Two broken lines may join to a whole one.
        return found if len(found) == len(lines) and all(isinstance(record, dict) for record in found) else None

    def _parse_wide(self, line: bytes) -> Any:
        """One line whose values are parsed straight into float64, several times as fast as number objects are made."""
        at = line.find(b'"values"')
        begin = line.find(b"[", at)
        end = line.find(b"]", begin)
        if (
            len(line) < _WIDE
            or at < 0
            or begin < 0
            or end < 0
            or line.count(b'"values"') != 1
            or line[at + 8 : begin].strip() != b":"
        ):
            return orjson.loads(line)
        found = orjson.loads(line[: begin + 1] + line[end:])
        if not isinstance(found, dict) or found.get("values") != []:
            return orjson.loads(line)
        parsed: Any = self._parser.parse(line[begin : end + 1])
        try:
            found["values"] = np.frombuffer(parsed.as_buffer(of_type="d"), np.float64).copy() if len(parsed) else []
        except (ValueError, TypeError):  # words for numbers
            found["values"] = orjson.loads(line[begin : end + 1])
        finally:
            del parsed  # the parser is used again only when nothing of it is held
        return found

    def _records(self, found: list[dict[str, Any]], lines: list[bytes]) -> None:
        """Records that are plain; raises Odd before anything of them is taken."""
        if not found:
            return
        by_width: dict[int, list[int]] = {}
        points, shapes = [], []
        try:
            for i, record in enumerate(found):
                values = record["values"]
                given = record.get("shape")
                key = tuple(given) if given.__class__ is list else given
                shape, size = self._shapes.get(key) or self._shape(key, given)
                count = len(values)
                if count > size or "indices" in record or values.__class__ not in (list, np.ndarray):
                    raise Odd
                points.append(self._number(record["checkpoint"]))
                shapes.append(shape)
                by_width.setdefault(count, []).append(i)
        except (KeyError, TypeError, ValueError) as error:
            raise Odd from error
        keep = self.header is None
        serial = range(self._serial + 1, self._serial + 1 + len(found))
        made = []
        for members in by_width.values():
            if len(members) == len(found):
                made.append(slab(found, points, list(serial), shapes, lines if keep else None))
            else:
                made.append(
                    slab(
                        [found[i] for i in members],
                        [points[i] for i in members],
                        [serial[i] for i in members],
                        [shapes[i] for i in members],
                        [lines[i] for i in members] if keep else None,
                    )
                )
        self._serial += len(found)
        self._slabs += made
        self._waiting += sum(one.values.size for one in made)

    def _shape(self, key: Any, given: Any) -> tuple[tuple[int, ...], float]:
        shape = fields.shape(given)
        size = prod(shape) if shape else np.inf
        if len(self._shapes) < 1 << 16:  # few shapes, many records; a hostile file has a new one in each
            self._shapes[key] = (shape, size)
        return shape, size

    def _number(self, label: Any) -> int:
        number = self._numbers.get(label)
        if number is None:
            if not isinstance(label, str):
                raise TypeError('"checkpoint" must be a name and "values" a list of numbers')
            name = resolve(label, self.header.model.layers if self.header else None)
            number = self._canonical.setdefault(name, len(self._names))
            if number == len(self._names):
                self._names.append(name)
            self._numbers[label] = number
        return number

    def _careful(self, line: bytes, number: int) -> Iterator[Item]:
        """What one line holds, whatever it is, with every check in words."""
        if not line.strip():
            return
        try:
            found = lenient.loads(line)
        except ValueError:
            self.skipped += 1
            return
        kind = found.get("type", _RECORD) if isinstance(found, dict) else None
        try:
            if kind == "header":
                yield from self._flush()
                self.header = fields.header(found)
                self._numbers.clear()  # the number of layers decides what some labels mean
                yield self.header
            elif kind == "token":
                yield fields.token(found)
            elif kind == "end":
                yield End(
                    fields.integer(found.get("checkpoints", 0), "checkpoints"), fields.integer(found.get("tokens", 0), "tokens")
                )
            elif kind is not None and _RECORD in found and "values" in found:
                self._slabs.append(self._record(found, line))
            else:
                self.skipped += 1
        except (TypeError, ValueError, KeyError, OverflowError) as error:
            where = f"{self.name}, line {self._line + number + 1}"
            raise DumpError(f"{where}: {error}.", "Mend what writes it.", code="record") from error

    def _record(self, found: dict[str, Any], line: bytes) -> Slab:
        """One record, with words for numbers and scattered values."""
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
        scattered = None if indices is None else np.array([fields.indices(indices, len(values))], dtype=np.int64)
        stats = {name: np.array([fields.number(x)]) for name, x in fields.statistics(found.get("stats") or {}).items()}
        quantum = fields.quantum(line, len(values)) if self.header is None else None
        self._serial += 1
        self._waiting += len(values)
        with np.errstate(over="ignore"):
            return Slab(
                np.array([self._number(label)]),
                np.array([self._serial]),
                np.array([(seq, token_idx, step, found.get("phase") == DECODE)], dtype=np.int64),
                [shape],
                np.array([[fields.number(x) for x in values]], dtype=np.float64).astype(np.float32).reshape(1, len(values)),
                [str(found.get("dtype", "f32"))],
                stats,
                None if sketch is None else np.array([[fields.number(x) for x in sketch]], dtype=np.float64).astype(np.float32),
                None if quantum is None else quantum[None, :],
                scattered,
            )
