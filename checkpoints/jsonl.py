"""Streaming writer of dumps: format 1, one JSON object a line. `checkpoints.reader` reads them back."""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, Self

import jsonlines
import orjson

from .errors import InputError
from .lines import checkpoint_lines, end_line, header_line, token_line
from .record import Dump, Header, Rows, Token


def _dumps(value: Any) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


class Writer:
    """Writes a dump line by line; what was written is readable even if the process is killed afterwards.

    The end record is written by `close`, and by leaving a `with` block without an exception: a dump without one was cut
    short. Every call is flushed to the operating system.

    Raises:
        InputError: the file cannot be created, or the disk refuses a write.
    """

    def __init__(self, path: str | os.PathLike[str], header: Header | None = None) -> None:
        self.path = Path(path)
        self.checkpoints = 0
        self.tokens = 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = self.path.open("wb")
        except OSError as error:
            raise _unwritable(self.path, error) from error
        self._lines = jsonlines.Writer(self._file, dumps=_dumps)
        if header is not None:
            self.header(header)

    def header(self, header: Header) -> None:
        """Write the header line; it belongs first."""
        self._write([header_line(header)])

    def rows(self, rows: Rows) -> None:
        """Write one line a row."""
        self._write(checkpoint_lines(rows))
        self.checkpoints += len(rows)

    def token(self, token: Token) -> None:
        """Write one generated token."""
        self._write([token_line(token)])
        self.tokens += 1

    def _write(self, lines: Iterable[dict[str, Any]]) -> None:
        try:
            self._lines.write_all(lines)
            self._file.flush()
        except OSError as error:
            with contextlib.suppress(OSError):  # closing tries the same write again
                self._file.close()
            raise _unwritable(self.path, error) from error

    def close(self, *, complete: bool = True) -> None:
        """Close the file, with the end record if the dump is complete. A second call does nothing."""
        if self._file.closed:
            return
        try:
            if complete:
                self._write([end_line(self.checkpoints, self.tokens)])
        finally:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(complete=kind is None)


def write(dump: Dump, path: str | os.PathLike[str], header: Header) -> None:
    """Write a dump that was read, whatever its format, as format 1; `header` is taken where it has none of its own.

    What was cut short stays so: it gets no end record.

    Raises:
        InputError: the file cannot be written.
    """
    with Writer(path, dump.header or header) as writer:
        for rows in dump.points.values():
            writer.rows(rows)
        for token in dump.tokens:
            writer.token(token)
        writer.close(complete=not dump.torn and (dump.header is None or dump.end is not None))


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(f"cannot write {path}: {error.strerror or error}.", "Choose another --out.", code="output")
