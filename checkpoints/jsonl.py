"""Streaming writer of dumps: format 1, one JSON object per line. `checkpoints.reading.reader` reads them back."""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, Self

import orjson
from msgspec.structs import replace

from .errors import InputError
from .lines import checkpoint_lines, end_line, header_line, token_line
from .record import Dump, Header, Rows, Token
from .whole_file import Replacement, destination, open_new, unwritable

_AS_LINE = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE


class Writer:
    """Writes a dump line by line.

    The end record is written by `close`, and on leaving a `with` block without an exception: a dump without one was cut
    short. Every call is flushed to the operating system. If nothing is at `path`, lines appear there as they are written,
    readable even if the process is killed afterwards; an existing file is replaced by `close`, if the dump is complete.

    Args:
        whole: nothing appears at `path` before `close`, in either case.

    Raises:
        InputError: the file cannot be created, or the disk refuses a write.
    """

    def __init__(self, path: str | os.PathLike[str], header: Header | None = None, *, whole: bool = False) -> None:
        self.path = Path(path)
        self.checkpoints = 0
        self.tokens = 0
        self._replacement: Replacement | None = None
        try:
            self._file: IO[bytes] = self._open(whole)
        except OSError as error:
            raise _unwritable(self.path, error) from error
        if header is not None:
            self.header(header)

    def _open(self, whole: bool) -> IO[bytes]:
        if not whole:
            place = destination(self.path)
            place.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                return open_new(place)
        self._replacement = Replacement(self.path)
        return self._replacement.temporary.open("wb")

    def header(self, header: Header) -> None:
        """Write the header line; it must come first."""
        self._write([header_line(header)])

    def rows(self, rows: Rows) -> None:
        """Write one line for each row."""
        self._write(checkpoint_lines(rows))
        self.checkpoints += len(rows)

    def token(self, token: Token) -> None:
        """Write one generated token."""
        self._write([token_line(token)])
        self.tokens += 1

    def _write(self, lines: Iterable[dict[str, Any]]) -> None:
        try:
            self._file.writelines(orjson.dumps(line, option=_AS_LINE) for line in lines)
            self._file.flush()
        except OSError as error:
            with contextlib.suppress(OSError):  # closing tries the same write again
                self._file.close()
            self._discard()
            raise _unwritable(self.path, error) from error

    def close(self, *, complete: bool = True, kept: bool | None = None) -> None:
        """Close the file, with the end record if the dump is complete. A second call does nothing.

        An incomplete dump does not replace another file, unless it is to be `kept`.

        Raises:
            InputError: the disk refuses the last write; an earlier file at `path` is unchanged.
        """
        if self._file.closed:
            return
        try:
            if complete:
                self._write([end_line(self.checkpoints, self.tokens)])
            self._file.close()
            if self._replacement is not None and (complete if kept is None else kept):
                self._replacement.commit()
        except OSError as error:
            raise _unwritable(self.path, error) from error
        finally:
            self._file.close()
            self._discard()

    def _discard(self) -> None:
        if self._replacement is not None:
            self._replacement.discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(complete=kind is None)


def write(dump: Dump, path: str | os.PathLike[str], header: Header) -> None:
    """Write a dump that was read, in whatever format, as format 1; `header` is used if the dump has none.

    A dump that was cut short remains so: it gets no end record.

    Raises:
        InputError: the file cannot be written.
    """
    described = replace(dump.header or header, columns=None)  # this writer writes lines
    with Writer(path, described, whole=True) as writer:
        for rows in dump.points.values():
            writer.rows(rows)
        for token in dump.tokens:
            writer.token(token)
        writer.close(complete=not dump.torn and (dump.header is None or dump.end is not None), kept=True)


def _unwritable(path: Path, error: OSError) -> InputError:
    return unwritable(path, error, "Choose another --out.")
