"""Dumps as a stream: format 1, and any JSONL whose lines carry `checkpoint`, `token_idx` and `values`.

What a foreign engine prints is accepted where it can be understood (`checkpoints.fields`, `checkpoints.lenient`). Lines that
are no records are skipped and counted; a record that contradicts itself is an error that names its line. Lines are read many at
a time (`checkpoints.plain`); what that way doesn't understand is read again line by line (`checkpoints.careful`).
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from . import careful, lenient
from .errors import DumpError
from .labels import Labels
from .no_records import reason
from .plain import Parser, Record, Text, others
from .record import End, Header, Rows, Token
from .slabs import Odd, Slab, as_rows

_BLOCK = 1 << 19  # bytes read at once: what is made of them stays in a core's cache
_LINE = 1 << 26  # bytes of the longest line: a row of 4 million values; as objects such a line takes 1 GB
_PENDING = 1 << 22  # values that wait to become Rows: 16 MiB …
_RECORDS = 1 << 16  # … or records: their other fields take more than 16 values do

Item = Header | Rows | Token | End


class Scan:
    """Reads a dump as a stream: iterating gives headers, tokens, ends, and records as `Rows` batches of one point each.

    Memory does not grow with the file. Records of one point keep their order; those of different points may come in another
    order than in the file. `skipped`, `torn` and `records` are complete when the iteration is.

    Raises (while iterating):
        DumpError: as `checkpoints.reader.read`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.name = os.fspath(path)
        self.header: Header | None = None
        self._line = 0
        self.skipped = 0
        self.records = 0
        self.torn = False
        self._serial = 0
        self._waiting = 0
        self._slabs: list[Slab] = []
        self._labels = Labels()
        self._parser = Parser()

    def __iter__(self) -> Iterator[Item]:
        place = Path(self.name)
        try:
            if place.is_file() and place.stat().st_size == 0:
                raise DumpError(f"{self.name} is empty.", "Was the engine stopped before it wrote anything?", code="empty")
            with place.open("rb") as file:
                while block := file.read(_BLOCK):
                    yield from self._take(block if block.endswith(b"\n") else block + self._rest_of_line(file))
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
                reason(place) + 'A record is a JSON line with "checkpoint", "token_idx" and "values".',
                code="no-records",
            )

    def _rest_of_line(self, file: BinaryIO) -> bytes:
        rest = file.readline(_LINE)
        if len(rest) == _LINE:
            raise DumpError(
                f"{self.name}: a line after line {self._line} is longer than {_LINE >> 20} MiB.",
                "Is it a dump? Record fewer values in a line.",
                code="line",
            )
        return rest

    def _flush(self) -> Iterator[Rows]:
        slabs, self._slabs, self._waiting = self._slabs, [], 0
        for rows in as_rows(slabs, self._labels.names):
            self.records += len(rows)
            yield rows

    def _take(self, block: bytes) -> Iterator[Item]:
        """The items of some lines: many at once where they are plain, else one by one. The file's last may lack its break."""
        if not block.endswith(b"\n"):
            self.torn = not lenient.whole(block.rpartition(b"\n")[2])
            block += b"\n"
        found: Sequence[Record] = ()
        texts: Sequence[Text] = ()
        try:
            found, texts = self._parser.records(block)
            if not others(found, texts):
                self._keep(found, texts)
                self._line += len(found)
                return
            numbered = list(enumerate(block.split(b"\n")[:-1]))
        except Odd:
            numbered = self._objects(block)
            trimmed = b"".join(line + b"\n" for _, line in numbered)
            found = ()
            if trimmed != block:
                with suppress(Odd):
                    found, texts = self._parser.records(trimmed)
        done = 0
        with suppress(Odd):  # what is left of these lines is read with care
            for i in [*others(found, texts), len(found)]:
                self._keep(found[done:i], texts[done:i])
                done = i
                if i < len(found):
                    yield from self._careful(*numbered[i])
                    done = i + 1
        for number, line in numbered[done:]:
            yield from self._careful(number, line)
        self._line += block.count(b"\n")

    def _objects(self, block: bytes) -> list[tuple[int, bytes]]:
        """Lines from their first brace on, numbered; those without one are skipped and counted."""
        numbered = []
        for number, line in enumerate(block.split(b"\n")[:-1]):
            start = line.find(b"{")
            if start >= 0:
                numbered.append((number, line[start:].rstrip()))
            elif line.strip():
                self.skipped += 1
        return numbered

    def _keep(self, found: Sequence[Record], texts: Sequence[Text]) -> None:
        """Records that are plain; raises Odd before anything of them is taken."""
        if found:
            made = self._parser.slabs(found, texts, self._labels, self._serial + 1, digits=self.header is None)
            self._serial += len(found)
            self._slabs += made
            self._waiting += sum(one.values.size for one in made)

    def _careful(self, number: int, line: bytes) -> Iterator[Item]:
        """What one line holds, whatever it is."""
        if not line.strip():
            return
        try:
            item = careful.item(line, self._labels, self._serial + 1, digits=self.header is None)
        except (TypeError, ValueError, KeyError, OverflowError) as error:
            where = f"{self.name}, line {self._line + number + 1}"
            raise DumpError(f"{where}: {error}.", "Mend what writes it.", code="record") from error
        if item is None:
            self.skipped += 1
        elif isinstance(item, Slab):
            self._serial += 1
            self._slabs.append(item)
            self._waiting += item.values.size
        elif isinstance(item, Header):
            yield from self._flush()
            self.header = item
            self._labels.of_model(item.model.layers)
            yield item
        else:
            yield item
