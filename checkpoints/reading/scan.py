"""Dumps as a stream: format 1, and any JSONL whose lines carry `checkpoint`, `token_idx` and `values`.

What a foreign engine prints is accepted where it can be understood (`checkpoints.reading.fields`, `checkpoints.reading.lenient`).
Lines that are no records are skipped and counted; a record that contradicts itself is an error that names its line. Lines are read
many at a time (`checkpoints.reading.bulk`); what is left is read line by line (`checkpoints.reading.one_line`). Large files are
read by several processes (`checkpoints.reading.parallel`).
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..errors import DumpError
from ..regular import STDIN, require_regular
from .batches import Item, LineReader
from .no_records import reason
from .parallel import SHARED, Readers, Sharing, next_block

_NOTHING = "Was the engine stopped before it wrote anything, or does it print to standard error?"


class Scan:
    """Reads a dump as a stream: iterating gives headers, tokens, ends, and records as `Rows` batches of one point each.

    Memory does not grow with the file. Records of one point keep their order; those of different points may come in another
    order than in the file. `skipped`, `torn` and `records` are complete when the iteration is.

    Args:
        sharing: how many processes read a large file, and in which portions.

    Raises (while iterating):
        DumpError: as `checkpoints.reading.reader.read`.
    """

    def __init__(self, path: str | os.PathLike[str], sharing: Sharing = SHARED) -> None:
        self.name = os.fspath(path)
        self._sharing = sharing
        self._reader = LineReader(self.name)

    @property
    def skipped(self) -> int:
        """Lines that are no records."""
        return self._reader.skipped

    @property
    def records(self) -> int:
        """Records that were given."""
        return self._reader.records

    @property
    def torn(self) -> bool:
        """Whether the last line was cut short."""
        return self._reader.torn

    def __iter__(self) -> Iterator[Item]:
        place = Path(self.name)
        try:
            if self.name == STDIN:
                if sys.stdin is None:  # closed by who started this
                    raise DumpError("standard input is closed.", "Pipe JSON lines in, or name a file.", code="no-file")
                with Readers(Path(os.devnull), Sharing(processes=0)) as readers:
                    yield from self._items(sys.stdin.buffer, readers)
            else:
                require_regular(place, DumpError, "Write the dump to a file, or give - and pipe JSON lines in.")
                if place.is_file() and place.stat().st_size == 0:
                    raise DumpError(f"{self.name} is empty.", _NOTHING, code="empty")
                with place.open("rb") as file, Readers(place, self._sharing) as readers:
                    yield from self._items(file, readers)
        except OSError as error:
            raise DumpError(
                f"cannot read {self.name}: {error.strerror or error}.", "Check the path.", code="no-file"
            ) from error
        if not self.records:
            called = "standard input" if self.name == STDIN else self.name
            if not self._reader.line:
                raise DumpError(f"{called} is empty.", _NOTHING, code="empty")
            raise DumpError(
                f"{called} has no checkpoint record in {self._reader.line} line{'s' * (self._reader.line != 1)}.",
                reason(place) + 'A record is a JSON line with "checkpoint", "token_idx" and "values".',
                code="no-records",
            )

    def _items(self, file: BinaryIO, readers: Readers) -> Iterator[Item]:
        """What stands in the file: read here until the other processes have started, and what they leave."""
        reader, position = self._reader, 0
        while block := next_block(file, self.name, reader.line, self._sharing.block):
            position += len(block)
            yield from reader.take(block)
            if reader.many_wait:
                yield from reader.flush()
            if readers.ready():
                yield from reader.flush()
                for content in readers.contents(position, reader.header):
                    position = content.stop
                    reader.count(content.lines, content.records, content.skipped, torn=content.torn)
                    yield from content.items
                file.seek(position)
        yield from reader.flush()
