"""Streaming writer of dumps: format 1, one JSON object a line. `checkpoints.reader` reads them back."""

import contextlib
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Self

import jsonlines
import numpy as np
import orjson
from numpy.typing import NDArray

from .errors import InputError
from .points import parse
from .record import DECODE, PREFILL, Header, Rows, Token, statistic_as_json


def _dumps(value: Any) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def _as_text(value: float) -> float | str:
    """JSON has no non-finite numbers: they are written as strings (orjson would write null in silence)."""
    if np.isfinite(value):
        return value
    return "NaN" if np.isnan(value) else ("Infinity" if value > 0 else "-Infinity")


def _numbers(row: NDArray[np.float32], finite: bool) -> Any:
    """A row for orjson, which writes a float32 array with the shortest digits that give back the same float32."""
    if finite:
        return row
    return [_as_text(float(x)) if not np.isfinite(x) else orjson.Fragment(_dumps(np.array([x]))[1:-1]) for x in row]


def checkpoint_lines(rows: Rows) -> Iterable[dict[str, Any]]:
    """One JSON object a row, in the format's order of keys."""
    layer = parse(rows.point).layer
    width = np.arange(rows.values.shape[1])
    padding = width[None, :] >= rows.counts[:, None]
    finite: NDArray[np.bool_] = np.all(np.isfinite(rows.values) | padding, axis=1)
    for r in range(len(rows)):
        count = int(rows.counts[r])
        line: dict[str, Any] = {
            "type": "checkpoint",
            "checkpoint": rows.point,
            "layer": layer,
            "seq": int(rows.seq[r]),
            "token_idx": int(rows.token_idx[r]),
            "step": int(rows.step[r]),
            "phase": DECODE if rows.decode[r] else PREFILL,
            "dtype": rows.dtype,
            "shape": list(rows.shapes[r]),
            "values": _numbers(rows.values[r, :count], bool(finite[r])),
        }
        if rows.indices is not None and rows.indices[r, 0] >= 0:
            line["indices"] = rows.indices[r, :count].tolist()
        stats = {name: column[r] for name, column in rows.stats.items() if not np.isnan(column[r])}
        if stats:
            line["stats"] = {name: _as_text(statistic_as_json(name, value)) for name, value in stats.items()}
        if rows.sketch is not None and not np.isnan(rows.sketch[r]).all():
            line["sketch"] = _numbers(rows.sketch[r], bool(np.isfinite(rows.sketch[r]).all()))
        yield line


def token_line(token: Token) -> dict[str, Any]:
    """One generated token as a JSON object."""
    return {
        "type": "token",
        "seq": token.seq,
        "token_idx": token.token_idx,
        "id": token.id,
        "text": token.text,
        "top": [[number, _as_text(value)] for number, value in token.top],
    }


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
        fields = {name: value for name, value in asdict(header).items() if value not in (None, "", {}, ())}
        fields["model"] = {name: value for name, value in asdict(header.model).items() if value not in (None, "")}
        self._write([{"type": "header", "format": fields.pop("format"), **fields, "tokens": list(header.tokens)}])

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
                self._write([{"type": "end", "checkpoints": self.checkpoints, "tokens": self.tokens}])
        finally:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(complete=kind is None)


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(f"cannot write {path}: {error.strerror or error}.", "Choose another --out.", code="output")
