"""Plain records, which engines print by the million: many lines at once.

msgspec checks and parses everything but the values; simdjson reads the values of all lines into one array
(`checkpoints.reading.arrays`). Lines that either of them does not understand are reported as left; `checkpoints.reading.one_line`
reads those one by one, with the same result.
"""

import re
from collections.abc import Sequence
from itertools import chain
from math import prod
from operator import attrgetter
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from ..record import DECODE, SKETCH_SIZE, STATISTICS
from . import digits as printed
from . import fields, lenient
from .arrays import NumberParser, Numbers, Text
from .cutting import cut_block, cut_line, nested, objects_alone, objects_of
from .labels import Labels
from .line_order import UNNUMBERED
from .slabs import Slab

_WIDE = 2048  # bytes of a line from which its values are cut out first: msgspec would walk through them, find does not
_INDICES = re.compile(rb"\[[0-9, \t\r\n]+\]")
_NONE = msgspec.Raw(b"")
_PARTS = 1 << 16  # shapes that are remembered: few are used, a hostile file has a new one in each record
_Position = Annotated[int, msgspec.Meta(ge=0, lt=fields.POSITIONS)]
_NOT_DECODED = msgspec.MsgspecError, UnicodeDecodeError, RecursionError
RECORD = "checkpoint"


class RecordFields(msgspec.Struct, gc=False):
    """The fields of a line that are read."""

    type: str | None = RECORD
    checkpoint: str | None = None
    values: msgspec.Raw = _NONE
    token_idx: _Position = UNNUMBERED
    seq: Annotated[int, msgspec.Meta(ge=0, lt=fields.SEQUENCES)] = 0
    step: _Position = 0
    phase: Any = None
    dtype: Any = "f32"
    shape: tuple[int, ...] | str | None = None
    stats: dict[str, float] | None = None
    sketch: msgspec.Raw = _NONE
    indices: msgspec.Raw = _NONE
    quantum: msgspec.Raw = _NONE


class _FieldsWithWords(RecordFields, gc=False):
    """The same fields if a statistic may be a word."""

    stats: Any = None


_columns = attrgetter(
    "checkpoint", "seq", "token_idx", "step", "phase", "dtype", "shape", "stats", "sketch", "indices", "quantum"
)


class Taken(Struct, frozen=True):
    """The records that the bulk parser read from a block's lines, and the lines that it left.

    Attributes:
        records, texts: the fields of each record [R], and its values as text, with their brackets.
        numbers: each record's line in the block, int64 [R], from 0.
        left: numbers and texts of the other lines.
        skipped: how many lines hold no object at all.
    """

    records: list[RecordFields]
    texts: Sequence[Text]
    numbers: NDArray[np.int64]
    left: Sequence[tuple[int, bytes]] = ()
    skipped: int = 0

    def between(self, start: int, stop: int) -> "Taken":
        """The records of lines start…stop."""
        a, b = np.searchsorted(self.numbers, [start, stop]).tolist() if start or self.left else (0, len(self.records))
        return self if b - a == len(self.records) else Taken(self.records[a:b], self.texts[a:b], self.numbers[a:b])

    def pick(self, members: Sequence[int]) -> "Taken":
        """Some of the records."""
        return Taken([self.records[i] for i in members], [self.texts[i] for i in members], self.numbers[members])


class BulkParser:
    """Parses lines. It keeps simdjson's buffers and the shapes seen so far, but nothing of any file."""

    def __init__(self) -> None:
        self._numbers = NumberParser()
        self._lines = msgspec.json.Decoder(RecordFields)
        self._lines_with_words = msgspec.json.Decoder(_FieldsWithWords)
        self._shapes: dict[Any, tuple[tuple[int, ...] | None, float]] = {}

    def lines(self, block: bytes) -> Taken:
        """The records of whole lines: parsed together if every line is an object, otherwise line by line."""
        plain = self._plain(block)
        if plain is not None:
            records, texts = plain
            others = _others(records, texts)
            if not others:
                return Taken(records, texts, np.arange(len(records)))
            lines = block.split(b"\n")
            return _without(Taken(records, texts, np.arange(len(records)), [(i, lines[i]) for i in others]), others)
        numbers, objects, skipped = objects_of(block)
        trimmed = b"".join([line + b"\n" for line in objects])
        plain = self._plain(trimmed) if trimmed and trimmed != block else None
        if plain is None:
            fields_of_lines = [self._line(line) for line in objects]
            records, texts = [record for record, _ in fields_of_lines], [text for _, text in fields_of_lines]
        else:
            records, texts = plain
        others = _others(records, texts)
        return _without(
            Taken(records, texts, np.array(numbers, dtype=np.int64), [(numbers[i], objects[i]) for i in others], skipped),
            others,
        )

    def _plain(self, block: bytes) -> tuple[list[RecordFields], Sequence[Text]] | None:
        """The fields of lines that are all JSON objects, and their values as text; None if one is not an object."""
        texts: Sequence[Text] | None = None
        rest = block
        if block.find(b"\n") >= _WIDE:
            parts = cut_block(block)
            if parts is None:
                return None
            rest, texts = parts
        count = objects_alone(rest)
        if count is None:
            return None
        try:
            records = self._lines.decode_lines(rest)
        except _NOT_DECODED:  # the library's way to say that a line is something else
            return None
        if len(records) != count:
            return None
        if texts is None:
            texts = [record.values for record in records]
            return None if nested(texts) else (records, texts)
        fitting = all(bytes(r.values) == (b"[]" if text else b"") for r, text in zip(records, texts, strict=True))
        return (records, texts) if fitting else None

    def _line(self, line: bytes) -> tuple[RecordFields, Text]:
        """The fields of one line and its values as text; a record without a name if the line is not understood."""
        rest, text = cut_line(line)
        record = self._decoded(rest)
        if record is None and text is not None:  # what was cut out may belong to something else
            record, text = self._decoded(line), None
        if record is None:
            return _NOTHING, b""
        if text is None:
            return record, b"" if nested([record.values]) else record.values
        return (record, text) if bytes(record.values) == b"[]" else (_NOTHING, b"")

    def _decoded(self, line: bytes) -> RecordFields | None:
        """The fields of an object, in which bare words may stand for numbers; None if it is not an object, or a field has a wrong type."""
        try:
            return self._lines.decode(line)
        except _NOT_DECODED:
            pass
        try:
            record = self._lines_with_words.decode(lenient.quoted(line))
            if record.stats:
                record.stats = {name: fields.number(x) for name, x in fields.statistics(record.stats).items()}
        except (*_NOT_DECODED, TypeError, ValueError, OverflowError):  # the last: an integer of 400 digits
            return None
        return record

    def slabs(self, taken: Taken, labels: Labels, first: int, *, digits: bool) -> tuple[list[Slab], list[int]]:
        """Records as arrays, one slab for each number of values, and the lines of those records that were left.

        Args:
            first: number of the block's first line in the file.
            digits: look at the digits that were printed (`checkpoints.reading.digits`).
        """
        if not taken.records:
            return [], []
        columns = zip(*map(_columns, taken.records), strict=True)
        names, seqs, positions, steps, phases, dtypes, given, statistics, sketches, indices, quanta = columns
        if any(indices) and not all(indices):  # a slab has them or not
            halves = [[i for i, text in enumerate(indices) if bool(text) == scattered] for scattered in (True, False)]
            (some, a), (others, b) = (self.slabs(taken.pick(half), labels, first, digits=digits) for half in halves)
            return some + others, sorted(a + b)
        left = {i for i, text in enumerate(quanta) if text}
        values = None if left else self._numbers.read(taken.texts)
        if values is None:
            left |= {i for i, text in enumerate(taken.texts) if i not in left and self._numbers.read([text]) is None}
            left = left or set(range(len(taken.records)))  # each can be read, but not all together
        shapes, wrong = self._sizes(given, values.counts) if values is not None else ([], [])
        scattered, unclear = self._scattered(indices, values.counts) if values is not None else (None, [])
        sketch, bad = self._sketch(sketches)
        left.update(wrong, unclear, bad)
        if left or values is None:
            kept = [i for i in range(len(taken.records)) if i not in left]
            slabs, more = self.slabs(taken.pick(kept), labels, first, digits=digits)
            return slabs, sorted([*more, *taken.numbers[sorted(left)].tolist()])
        point = np.array(labels.numbers(names), dtype=np.int64)
        place = np.array([seqs, positions, steps, [phase == DECODE for phase in phases]], dtype=np.int64).T
        order = first + taken.numbers
        whole = Slab(point, order, place, shapes, _EMPTY, list(dtypes), _stats(statistics), sketch)
        return _by_width(whole, values, scattered, digits=digits), []

    def _sizes(self, given: Sequence[Any], counts: list[int]) -> tuple[list[tuple[int, ...]], list[int]]:
        """The shape of each record, as it is given, and which shapes are wrong or smaller than the record's values."""
        known = self._shapes
        for size in set(given).difference(known):
            if len(known) >= _PARTS:
                known.clear()
            try:
                shape = fields.shape(size)
                known[size] = shape, prod(shape) if shape else np.inf
            except (TypeError, ValueError):
                known[size] = None, -1.0
        both = [known.get(size, (None, -1.0)) for size in given]
        wrong = [i for i, (count, (_, size)) in enumerate(zip(counts, both, strict=True)) if count > size]
        return [shape or () for shape, _ in both], wrong

    def _scattered(self, texts: Sequence[Text], counts: list[int]) -> tuple[NDArray[np.int64] | None, list[int]]:
        """The indices of scattered values in their rows, laid end to end, and which records do not give them clearly."""
        if not any(texts):
            return None, []
        elements = self._elements(texts, counts)
        if elements is not None:
            return elements, []
        unclear = [
            i for i, (text, count) in enumerate(zip(texts, counts, strict=True)) if self._elements([text], [count]) is None
        ]
        return None, unclear or list(range(len(texts)))

    def _elements(self, texts: Sequence[Text], counts: list[int]) -> NDArray[np.int64] | None:
        """The whole numbers of arrays of these lengths; None if one is not whole, or occurs twice in its array."""
        if not all(counts) or not all(_INDICES.fullmatch(bytes(text)) for text in texts):
            return None
        numbers = self._numbers.read(texts)
        if numbers is None or numbers.counts != counts or (numbers.flat >= fields.POSITIONS).any():
            return None
        elements = numbers.flat.astype(np.int64)
        record = np.repeat(np.arange(len(counts)), counts)
        order = np.lexsort((elements, record))
        twice = (np.diff(elements[order]) == 0) & (np.diff(record[order]) == 0)
        return None if twice.any() else elements

    def _sketch(self, texts: Sequence[Text]) -> tuple[NDArray[np.float32] | None, list[int]]:
        """The sketch of each record [R, 32], if there are any, and which are wrong, or missing although other records have one."""
        if not any(texts):
            return None, []
        numbers = None if nested(texts) else self._numbers.read([text or b"[]" for text in texts])
        if numbers is not None and all(count == SKETCH_SIZE for count in numbers.counts):
            return _single(numbers.flat.reshape(-1, SKETCH_SIZE)), []
        return None, [i for i, text in enumerate(texts) if not self._is_sketch(text)]

    def _is_sketch(self, text: Text) -> bool:
        numbers = self._numbers.read([text]) if text and not nested([text]) else None
        return numbers is not None and numbers.counts == [SKETCH_SIZE]


_NOTHING = RecordFields()
_EMPTY = np.zeros((0, 0), dtype=np.float32)


def _others(records: Sequence[RecordFields], texts: Sequence[Text]) -> list[int]:
    """Which lines are not records: headers, tokens, ends, and lines that do not belong to a dump."""
    if {record.type for record in records} == {RECORD} and all(texts) and all(r.checkpoint is not None for r in records):
        return []
    return [i for i, record in enumerate(records) if record.type != RECORD or record.checkpoint is None or not texts[i]]


def _without(taken: Taken, others: Sequence[int]) -> Taken:
    """The same without these among the records."""
    if not others:
        return taken
    dropped = set(others)
    kept = taken.pick([i for i in range(len(taken.records)) if i not in dropped])
    return replace(kept, left=taken.left, skipped=taken.skipped)


def _by_width(records: Slab, values: Numbers, scattered: NDArray[np.int64] | None, *, digits: bool) -> list[Slab]:
    """One slab for each number of values per record; `records` has everything but the values. `scattered` are the values' indices
    in their rows, laid end to end."""
    counts = values.counts
    if len(set(counts)) == 1:
        wide = values.flat.reshape(len(counts), counts[0])
        quantum = printed.quanta(values.texts, wide) if digits else None
        elements = None if scattered is None else scattered.reshape(len(counts), counts[0])
        return [replace(records, values=_single(wide), quantum=quantum, indices=elements)]
    slabs = []
    starts = np.cumsum([0, *counts[:-1]])
    for width in dict.fromkeys(counts):
        members = np.flatnonzero(np.array(counts) == width)
        listed = members.tolist()
        cells = starts[members, None] + np.arange(width)
        wide = values.flat[cells]
        slabs.append(
            Slab(
                records.point[members],
                records.serial[members],
                records.place[members],
                [records.shapes[i] for i in listed],
                _single(wide),
                [records.dtypes[i] for i in listed],
                {name: column[members] for name, column in records.stats.items()},
                None if records.sketch is None else records.sketch[members],
                printed.quanta([values.texts[i] for i in listed], wide) if digits else None,
                None if scattered is None else scattered[cells],
            )
        )
    return slabs


def _stats(given: Sequence[dict[str, float] | None]) -> dict[str, NDArray[np.float64]]:
    """The format's statistics by name, NaN where a record lacks one. Names that are not the format's are left out: there could be
    any number of them."""
    if not any(given):
        return {}
    rows = [row or {} for row in given]
    names = list(rows[0])
    if any(list(row) != names for row in rows):
        names = [name for name in STATISTICS if any(name in row for row in rows)]
        rows = [{name: row.get(name, np.nan) for name in names} for row in rows]
    if not names:
        return {}
    columns = np.fromiter(chain.from_iterable(map(dict.values, rows)), np.float64, len(rows) * len(names))
    return {name: column for name, column in zip(names, columns.reshape(-1, len(names)).T, strict=True) if name in STATISTICS}


def _single(wide: NDArray[np.float64]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        return wide.astype(np.float32)
