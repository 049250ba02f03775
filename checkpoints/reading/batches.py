"""Blocks of whole lines and their content: plain records are read by the thousand, all others line by line."""

from collections.abc import Iterator, Sequence
from contextlib import suppress

from ..errors import DumpError
from ..record import End, Header, Rows, Token
from . import lenient
from . import one_line as careful
from .bulk import Parser, Record, Text, others
from .labels import Labels
from .slabs import Odd, Slab, as_rows

_PENDING = 1 << 22  # values that wait to become Rows: 16 MiB …
_HEADERS = 100  # of dumps that were appended to each other
_RECORDS = 1 << 16  # … or records: their other fields take more than 16 values do

Item = Header | Rows | Token | End


class Blocks:
    """Takes the blocks of a file, or of a part of it, one after the other.

    Args:
        name: the file's, for errors.
        header: the header that stands before the first block, if any.
        parser: one that was used before, for its buffers.

    `line`, `records`, `skipped` and `torn` are of the blocks so far; `records` does not count those that wait for `flush`;
    `header` is the last one.
    """

    def __init__(self, name: str, header: Header | None = None, parser: Parser | None = None) -> None:
        self.line = 0
        self.skipped = 0
        self.records = 0
        self.torn = False
        self._name = name
        self.header = header
        self._serial = 0
        self._headers = 0
        self._waiting = 0
        self._slabs: list[Slab] = []
        self._labels = Labels(name)
        if header is not None:
            self._labels.of_model(header.model.layers)
        self._parser = parser or Parser()

    @property
    def many_wait(self) -> bool:
        """Whether it is time to flush: enough is together for arrays, and little enough for the memory."""
        return self._serial - self.records > _RECORDS or self._waiting > _PENDING

    def count(self, lines: int, records: int, skipped: int, *, torn: bool) -> None:
        """Blocks that somebody else has read and flushed."""
        self.line += lines
        self._serial += records
        self.records += records
        self.skipped += skipped
        self.torn |= torn

    def flush(self) -> Iterator[Rows]:
        """The records that came together, one `Rows` a point."""
        slabs, self._slabs, self._waiting = self._slabs, [], 0
        for rows in as_rows(slabs, self._labels.names):
            self.records += len(rows)
            yield rows

    def take(self, block: bytes) -> Iterator[Item]:
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
                self.line += len(found)
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
        self.line += block.count(b"\n")

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
            where = f"{self._name}, line {self.line + number + 1}"
            raise DumpError(f"{where}: {error}.", "Correct the code that writes it.", code="record") from error
        if item is None:
            self.skipped += 1
        elif isinstance(item, Slab):
            self._serial += 1
            self._slabs.append(item)
            self._waiting += item.values.size
        elif isinstance(item, Header):
            self._headers += 1
            if self._headers > _HEADERS:
                raise DumpError(
                    f"{self._name} has more than {_HEADERS} headers.", "Write one, as the first line.", code="record"
                )
            yield from self.flush()
            self.header = item
            self._labels.of_model(item.model.layers)
            yield item
        else:
            yield item
