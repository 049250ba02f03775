"""Plain records, which engines print by the million: many lines at once.

msgspec checks and parses everything but the values; simdjson reads the values of all lines into one array. What
either does not understand is `Odd`, and is read again line by line (`checkpoints.careful`), with the same result.
"""

from collections.abc import Sequence
from itertools import chain
from math import prod
from operator import attrgetter
from typing import Annotated, Any

import msgspec
import numpy as np
import simdjson
from numpy.typing import NDArray

from ..record import DECODE, SKETCH_SIZE, STATISTICS
from . import digits as printed
from . import fields
from .labels import Labels
from .slabs import Odd, Slab
from .unnumbered import UNNUMBERED

_WIDE = 2048  # bytes of a line from which its values are cut out first: msgspec would walk through them, find does not
_NONE = msgspec.Raw(b"")
_BREAK, _OPEN, _CLOSE, _BRACKET = b"\n{}["
_PARTS = 1 << 16  # shapes that are remembered: few are used, a hostile file has a new one in each record
_Position = Annotated[int, msgspec.Meta(ge=0, lt=fields.POSITIONS)]
RECORD = "checkpoint"

Text = msgspec.Raw | memoryview | bytes


class Record(msgspec.Struct, gc=False):
    """The fields of a line that are looked at; of wrong types they are `Odd`."""

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


def others(found: Sequence[Record], texts: Sequence[Text]) -> list[int]:
    """Which lines are not records: headers, tokens, ends, and lines that do not belong to a dump."""
    if {record.type for record in found} == {RECORD} and all(texts) and all(record.checkpoint is not None for record in found):
        return []
    return [i for i, one in enumerate(found) if one.type != RECORD or one.checkpoint is None or not texts[i]]


_columns = attrgetter(
    "checkpoint", "seq", "token_idx", "step", "phase", "dtype", "shape", "stats", "sketch", "indices", "quantum"
)


class Parser:
    """Takes lines apart. It holds the buffers of simdjson and the shapes that were seen, and nothing of any file."""

    def __init__(self) -> None:
        self._numbers = simdjson.Parser()
        self._lines = msgspec.json.Decoder(Record)
        self._shapes: dict[Any, tuple[tuple[int, ...], float]] = {}

    def records(self, block: bytes) -> tuple[list[Record], Sequence[Text]]:
        """The records of whole lines, one a line, and the text of each one's values with its brackets.

        Raises:
            Odd: a line is no JSON object, or has a field of a wrong type.
        """
        texts: Sequence[Text]
        rest, texts = (block, ()) if block.find(b"\n") < _WIDE else _cut(block)
        count = _lines_of_objects(rest)
        try:
            found = self._lines.decode_lines(rest)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise Odd from error
        if len(found) != count:
            raise Odd
        if not texts:
            texts = [record.values for record in found]
            _no_nesting(texts)
            return found, texts
        for record, text in zip(found, texts, strict=True):
            if bytes(record.values) != (b"[]" if text else b""):
                raise Odd
        return found, texts

    def floats(self, texts: Sequence[Text]) -> tuple[NDArray[np.float64], list[int]]:
        """Numbers of many arrays laid end to end, and how many each has. Arrays in arrays are not told from longer ones.

        Raises:
            Odd: words or objects among them.
        """
        parsed: Any = None
        try:
            parsed = self._numbers.parse(_array(texts))
            counts = list(map(len, parsed))
            flat = np.frombuffer(parsed.as_buffer(of_type="d"), np.float64) if any(counts) else np.zeros(0)
        except (ValueError, TypeError, RuntimeError) as error:
            raise Odd from error
        finally:
            del parsed  # the parser is used again only when nothing of it is held
        if len(flat) != sum(counts):
            raise Odd
        return flat, counts

    def slabs(self, found: Sequence[Record], texts: Sequence[Text], labels: Labels, serial: int, *, digits: bool) -> list[Slab]:
        """Records as arrays, one slab for each number of values; `serial` is the first's number in the file.

        With `digits`, the digits that were printed are looked at (`checkpoints.printed`).

        Raises:
            Odd: a record needs the careful reader; nothing was taken.
        """
        columns = zip(*map(_columns, found), strict=True)
        names, seqs, positions, steps, phases, dtypes, given, statistics, sketches, indices, quanta = columns
        if any(indices) or any(quanta):
            raise Odd
        values, counts = self.floats(texts)
        shapes = self._sizes(given, counts)
        point = np.array(labels.numbers(names), dtype=np.int64)
        place = np.array([seqs, positions, steps, [phase == DECODE for phase in phases]], dtype=np.int64).T
        stats, sketch = _stats(statistics), self._sketch(sketches)
        order = np.arange(serial, serial + len(found))
        if len(set(counts)) == 1:
            wide = values.reshape(len(found), counts[0])
            quantum = printed.quanta(texts, wide) if digits else None
            return [Slab(point, order, place, shapes, _single(wide), list(dtypes), stats, sketch, quantum)]
        made = []
        starts = np.cumsum([0, *counts[:-1]])
        for width in dict.fromkeys(counts):
            members = np.flatnonzero(np.array(counts) == width)
            listed = members.tolist()
            wide = values[starts[members, None] + np.arange(width)]
            made.append(
                Slab(
                    point[members],
                    order[members],
                    place[members],
                    [shapes[i] for i in listed],
                    _single(wide),
                    [dtypes[i] for i in listed],
                    {name: column[members] for name, column in stats.items()},
                    None if sketch is None else sketch[members],
                    printed.quanta([texts[i] for i in listed], wide) if digits else None,
                )
            )
        return made

    def _sizes(self, given: Sequence[Any], counts: list[int]) -> list[tuple[int, ...]]:
        """The shape of each record, from how it is given."""
        known = self._shapes
        for one in set(given).difference(known):
            if len(known) >= _PARTS:
                known.clear()
            try:
                shape = fields.shape(one)
            except (TypeError, ValueError) as error:
                raise Odd from error
            known[one] = shape, prod(shape) if shape else np.inf
        both = [known[one] for one in given]
        if any(count > size for count, (_, size) in zip(counts, both, strict=True)):
            raise Odd
        return [shape for shape, _ in both]

    def _sketch(self, texts: Sequence[Text]) -> NDArray[np.float32] | None:
        if not any(texts):
            return None
        _no_nesting(texts)
        numbers, counts = self.floats(texts)
        if any(count != SKETCH_SIZE for count in counts):
            raise Odd
        return _single(numbers.reshape(-1, SKETCH_SIZE))


def _lines_of_objects(block: bytes) -> int:
    """How many lines there are, each from a brace to a brace: with as many objects in them, each line is one.

    Raises:
        Odd: a line begins or ends with something else.
    """
    data = np.frombuffer(block, np.uint8)
    ends = np.flatnonzero(data == _BREAK)
    if not block.startswith(b"{") or (data[ends - 1] != _CLOSE).any() or (data[ends[:-1] + 1] != _OPEN).any():
        raise Odd
    return len(ends)


def _cut(block: bytes) -> tuple[bytes, list[memoryview]]:
    """Lines without the numbers of their values, and those numbers with their brackets; empty where a line has none.

    Raises:
        Odd: these may not be the record's own values.
    """
    view = memoryview(block)
    rest: list[bytes] = []
    texts: list[memoryview] = []
    begin = cut = 0
    while begin < len(block):
        end = block.index(b"\n", begin) + 1
        at = block.find(b'"values"', begin, end)
        opened = block.find(b"[", at, end) if at >= 0 else -1
        closed = block.find(b"]", opened, end) if opened >= 0 else -1
        if closed < 0:
            rest.append(block[begin:end])
            texts.append(view[:0])
        else:
            rest += block[begin : opened + 1], block[closed:end]
            texts.append(view[opened : closed + 1])
            cut += 1
        begin = end
    joined = b"".join(rest)
    # A second "values", or one spelt with escapes, could be the record's own.
    if b"\\" in joined or joined.count(b'"values"') != cut:
        raise Odd
    return joined, texts


def _array(texts: Sequence[Text]) -> bytes:
    """The texts as elements of one array, copied once: they are most of a file."""
    pieces: list[Text] = [b","] * (2 * len(texts) + 1)
    pieces[1::2] = texts
    pieces[0], pieces[-1] = b"[", b"]"
    return b"".join(pieces)


def _no_nesting(texts: Sequence[Text]) -> None:
    """Raises Odd where there are more brackets than one an array. What was cut out ends at its first closing one."""
    if np.count_nonzero(np.frombuffer(b"".join(texts), np.uint8) == _BRACKET) > len(texts):
        raise Odd


def _stats(found: Sequence[dict[str, float] | None]) -> dict[str, NDArray[np.float64]]:
    """The format's statistics by name, NaN where a record lacks one; names of others' own are left out, since there may be any number."""
    if not any(found):
        return {}
    given = [row or {} for row in found]
    names = list(given[0])
    if any(list(row) != names for row in given):
        names = [name for name in STATISTICS if any(name in row for row in given)]
        given = [{name: row.get(name, np.nan) for name in names} for row in given]
    if not names:
        return {}
    columns = np.fromiter(chain.from_iterable(map(dict.values, given)), np.float64, len(given) * len(names))
    return {name: column for name, column in zip(names, columns.reshape(-1, len(names)).T, strict=True) if name in STATISTICS}


def _single(wide: NDArray[np.float64]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        return wide.astype(np.float32)
