"""A large file read by several processes: each reads ranges of it, and this process receives their content in order.

Python runs one thread at a time, and parsing numbers never waits for anything. A range begins with the
first line from its nominal start on, so that consecutive ranges share no line and lose none. What a process cannot
read, or what changes how the rest is to be read (a second header), is left to the caller, who reads on from there itself.
"""

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Self

from msgspec import Struct

from ..errors import DumpError
from ..record import Header
from ..room import cores
from .batches import Item, LineReader
from .bulk import BulkParser

BLOCK = 1 << 19  # bytes read at once: what is made of them stays in a core's cache
LINE = 1 << 26  # bytes of the longest line: a row of 4 million values; as objects such a line takes 1 GB
_AHEAD = 2  # ranges that a process has been asked for: one in work and one for when that is done
_MOST = 4  # processes that can be kept busy: taking a range over costs a tenth of reading it
# Where this package stands is first on the child's path only if it isn't on it anyway.
_BOOT = (
    "import sys; root = sys.argv[1]; sys.path[:0] = [] if root in sys.path else [root]; "
    "from checkpoints.reading.parallel import serve; serve()"
)


class Sharing(Struct, frozen=True):
    """How a file is shared out.

    `processes` read it beside this one: None for one per core, 0 for none. A file of less than `smallest` bytes is read before
    another process has started (0.2 s); a range of `portion` bytes is a tenth of a second's work, some MB as arrays. This
    process reads `block` bytes at once until the others have started, or the first only and waits for them, with `wait`.
    """

    processes: int | None = None
    smallest: int = 1 << 25
    portion: int = 1 << 22
    block: int = BLOCK
    wait: bool = False


SHARED = Sharing()


class RangeContent(Struct, frozen=True):
    """The content of a range, and where the next one begins."""

    items: list[Item]
    stop: int
    lines: int
    records: int
    skipped: int
    torn: bool


def next_block(file: BinaryIO, name: str, line: int, size: int) -> bytes:
    """About `size` bytes of whole lines, empty at the end; the file's last line may lack its break.

    Raises:
        DumpError: a line is longer than any record; `line` lines come before the block.
    """
    block = file.read(size)
    if not block or block.endswith(b"\n"):
        return block
    rest = file.readline(LINE)
    if len(rest) == LINE:
        longest = line + block.count(b"\n") + 1
        raise DumpError(
            f"{name}: line {longest} is longer than {LINE >> 20} MiB.",
            "Is it a dump? Record fewer values in a line.",
            code="line",
        )
    return block + rest


class Readers:
    """Processes that read ranges of one file; none if the file is small or a pipe, or if there is only one core.

    A context manager: they end with it.
    """

    def __init__(self, path: Path, sharing: Sharing = SHARED) -> None:
        self._path = path
        self._sharing = sharing
        self._size = path.stat().st_size if path.is_file() else 0
        free = cores()
        count = (min(free, _MOST) if free > 1 else 0) if sharing.processes is None else sharing.processes
        self._children: list[_Child] = []
        try:
            for _ in range(count if self._size >= sharing.smallest else 0):
                self._children.append(_Child())
        except OSError:  # no more processes are allowed: one reads it as well
            self.end()

    def ready(self) -> bool:
        """Whether they have started and can be asked."""
        try:
            return bool(self._children) and all(child.started(wait=self._sharing.wait) for child in self._children)
        except (EOFError, OSError):  # one has died
            self.end()
            return False

    def contents(self, start: int, header: Header | None) -> Iterator[RangeContent]:
        """The file's content from the line that begins at `start`, up to what they cannot read or the file's end."""
        size = self._sharing.portion
        starts = list(range(start, self._size, size))
        count = len(self._children)
        try:
            for number, begin in enumerate(starts[: _AHEAD * count]):
                self._children[number % count].ask(self._path, begin, begin + size, header)
            for number in range(len(starts)):
                child = self._children[number % count]
                content = child.answer()
                if content is None:
                    return
                if number + _AHEAD * count < len(starts):
                    begin = starts[number + _AHEAD * count]
                    child.ask(self._path, begin, begin + size, header)
                yield content
        except (EOFError, OSError):  # it has died: out of memory
            return
        finally:
            self.end()

    def end(self) -> None:
        """End the processes and drop what they were asked for."""
        while self._children:
            self._children.pop().end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


class _Child:
    """One process, and the pipe to it."""

    def __init__(self) -> None:
        from multiprocessing import Pipe  # for large files only

        self._started = False
        self._pipe, child_end = Pipe()
        try:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-c",
                    _BOOT,
                    str(Path(__file__).resolve().parent.parent.parent),
                    str(child_end.fileno()),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[child_end.fileno()],
            )
        except OSError:
            self._pipe.close()
            raise
        finally:
            child_end.close()

    def started(self, *, wait: bool) -> bool:
        """Whether it has reported that it is ready. Raises EOFError if it has died."""
        if not self._started and self._pipe.poll(None if wait else 0):
            self._pipe.recv()
            self._started = True
        return self._started

    def ask(self, path: Path, start: int, stop: int, header: Header | None) -> None:
        self._pipe.send((path, start, stop, header))

    def answer(self) -> RangeContent | None:
        content: RangeContent | None = self._pipe.recv()
        return content

    def end(self) -> None:
        self._pipe.close()
        self._process.kill()
        self._process.wait()


def serve() -> None:
    """A process's work: reads ranges as they are requested, until the pipe is closed."""
    from multiprocessing.connection import Connection

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who asked is interrupted, and ends this
    gc.disable()  # what lines become has no cycles; looking for them takes a twentieth of the time
    pipe: Connection = Connection(int(sys.argv[2]))
    pipe.send(None)
    parser = BulkParser()
    try:
        while True:
            pipe.send(_read(parser, *pipe.recv()))
    except (EOFError, OSError):
        return


def _read(parser: BulkParser, path: Path, start: int, stop: int, header: Header | None) -> RangeContent | None:
    """The content of a range of bytes, or None if the caller has to read it."""
    reader = LineReader(os.fspath(path), header, parser)
    items: list[Item] = []
    try:
        with path.open("rb") as file:
            file.seek(start - 1)
            while (line := file.readline(LINE)) and not line.endswith(b"\n"):
                pass
            position = file.tell()
            while position < stop and (block := next_block(file, "", 0, min(BLOCK, stop - position))):
                items += reader.take(block)
                if reader.many_wait:
                    items += reader.flush()
                position += len(block)
        items += reader.flush()
    except Exception:  # the caller meets it again, and knows the line's number
        return None
    if any(isinstance(item, Header) for item in items):
        return None
    return RangeContent(items, position, reader.line, reader.records, reader.skipped, reader.torn)
