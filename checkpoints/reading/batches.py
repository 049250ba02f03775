"""Blocks of whole lines and their content: plain records are read by the thousand, everything else line by line."""

from collections.abc import Iterator

from ..errors import DumpError
from ..record import End, Header, Rows, Token
from . import lenient, one_line
from .bulk import BulkParser, Taken
from .labels import Labels
from .slabs import Slab, as_rows

_PENDING = 1 << 22  # values that wait to become Rows: 16 MiB …
_HEADERS = 100  # of dumps that were appended to each other
_RECORDS = 1 << 16  # … or records: their other fields take more than 16 values do

Item = Header | Rows | Token | End


class LineReader:
    """Reads the blocks of a file, or of a part of it, one after the other.

    Args:
        name: the file's, for errors.
        header: the header that stands before the first block, if any.
        parser: one that was used before, for its buffers.

    `line`, `records`, `skipped` and `torn` are of the blocks so far; `records` does not count those that wait for `flush`;
    `header` is the last one.
    """

    def __init__(self, name: str, header: Header | None = None, parser: BulkParser | None = None) -> None:
        self.line = 0
        self.skipped = 0
        self.records = 0
        self.torn = False
        self._name = name
        self.header = header
        self._headers = 0
        self._slabs: list[Slab] = []
        self._waiting_records = 0
        self._waiting_values = 0
        self._labels = Labels(name)
        if header is not None:
            self._labels.of_model(header.model.layers)
        self._parser = parser or BulkParser()

    @property
    def many_wait(self) -> bool:
        """Whether it is time to flush: enough records wait to be worth an array, or more would take too much memory."""
        return self._waiting_records > _RECORDS or self._waiting_values > _PENDING

    def count(self, lines: int, records: int, skipped: int, *, torn: bool) -> None:
        """Count blocks that another process has read and flushed."""
        self.line += lines
        self.records += records
        self.skipped += skipped
        self.torn |= torn

    def flush(self) -> Iterator[Rows]:
        """The records that wait, as one `Rows` per point."""
        slabs, self._slabs = self._slabs, []
        self._waiting_records = self._waiting_values = 0
        for rows in as_rows(slabs, self._labels.names):
            self.records += len(rows)
            yield rows

    def take(self, block: bytes) -> Iterator[Item]:
        """The items of some lines, except records, which wait for `flush`. The file's last line may lack its line break."""
        if not block.endswith(b"\n"):
            self.torn = not lenient.whole(block.rpartition(b"\n")[2])
            block += b"\n"
        taken = self._parser.lines(block)
        self.skipped += taken.skipped
        start = 0
        for number, line in taken.left:
            try:
                item = self._one_line(number, line)
            except DumpError:
                self._keep(taken.between(start, number), block)  # the first wrong line is the one to be named
                raise
            if isinstance(item, Header):  # what stands before it is read as the header before says
                self._keep(taken.between(start, number), block)
                start = number
                yield from self._begin(item)
            elif isinstance(item, Slab):
                self._wait(item)
            elif item is not None:
                yield item
        self._keep(taken.between(start, len(block)), block)
        self.line += block.count(b"\n")

    def _keep(self, taken: Taken, block: bytes) -> None:
        """Take the records of a block; those that the parser did not understand are read line by line."""
        slabs, left = self._parser.slabs(taken, self._labels, self.line, digits=self.header is None)
        for slab in slabs:
            self._wait(slab)
        if left:
            lines = block.split(b"\n")
            for number in left:
                item = self._one_line(number, lines[number])
                if isinstance(item, Slab):
                    self._wait(item)

    def _wait(self, slab: Slab) -> None:
        self._slabs.append(slab)
        self._waiting_records += len(slab.point)
        self._waiting_values += slab.values.size

    def _one_line(self, number: int, line: bytes) -> Header | Token | End | Slab | None:
        """What line `number` of the block holds; None if it does not belong to a dump.

        Raises:
            DumpError: it contradicts itself.
        """
        if not line.strip():
            return None
        try:
            item = one_line.item(line, self._labels, self.line + number, digits=self.header is None)
        except (TypeError, ValueError, KeyError, OverflowError) as error:
            where = f"{self._name}, line {self.line + number + 1}"
            raise DumpError(f"{where}: {error}.", "Correct the code that writes it.", code="record") from error
        self.skipped += item is None
        return item

    def _begin(self, header: Header) -> Iterator[Item]:
        """Begin with another header: the records that wait belong to the dump before it."""
        self._headers += 1
        if self._headers > _HEADERS:
            raise DumpError(f"{self._name} has more than {_HEADERS} headers.", "Write one, as the first line.", code="record")
        yield from self.flush()
        self.header = header
        self._labels.of_model(header.model.layers)
        yield header
