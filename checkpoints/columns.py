"""Dumps whose records are stored as arrays beside the JSON lines: read at the speed of the disk, compared without parsing digits.

The JSONL has the header, which names the file of arrays, a line for each part of a point, generated tokens and the end. The
arrays are in a safetensors file beside it, each named `<point>/<part>/<column>`: `place` int64 [R, 4] (seq, token_idx, step,
whether it is a decode step), `shape` int64 [R, axes] (-1 after the last axis), `counts` int64 [R], `values` float32 [R, k],
`stats` float64 [R, S] in the order given by the part's line, and, if records have them, `sketch` float32 [R, 32], `indices`
int64 [R, k] and `quantum` float64 [R, k]. `checkpoints.formats.columns` reads them back.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from .jsonl import Writer
from .record import Header, Rows
from .tensors import TensorWriter

ENDING = ".columns.safetensors"
KIND = "columns"  # the type of a part's line
HELD = 64 << 20  # bytes of records in a part: its arrays are then worth their names


def beside(dump: str | os.PathLike[str]) -> Path:
    """The file of arrays of a dump: ours.jsonl -> ours.columns.safetensors."""
    return Path(dump).with_suffix(ENDING)


def open_dump(path: str | os.PathLike[str], header: Header, *, binary: bool) -> Writer:
    """The writer of a dump: JSON lines, or, if `binary`, arrays beside them.

    Raises:
        InputError: a file cannot be created.
    """
    return ColumnsWriter(path, header) if binary else Writer(path, header)


class ColumnsWriter(Writer):
    """Writes a dump whose records are stored as arrays in a file beside it. Both files appear when it is closed.

    Args:
        held: bytes of records that are collected before they are written as a part.

    Raises:
        InputError: a file cannot be created, or the disk refuses a write.
    """

    def __init__(self, path: str | os.PathLike[str], header: Header, *, held: int = HELD) -> None:
        self._identity = os.urandom(8).hex()
        self._arrays = TensorWriter(beside(path), {"dump": self._identity})
        self._rows: dict[str, list[Rows]] = {}
        self._parts: dict[str, int] = {}
        self._held, self._most_held = 0, held
        try:
            super().__init__(path, replace(header, columns={"file": beside(path).name, "id": self._identity}), whole=True)
        except BaseException:
            self._arrays.close(complete=False)
            raise

    def rows(self, rows: Rows) -> None:
        """Add the records of one point."""
        self._rows.setdefault(rows.point, []).append(rows)
        self._held += rows.values.nbytes + 512 * len(rows)
        self.checkpoints += len(rows)
        if self._held > self._most_held:
            self._flush()

    def _flush(self) -> None:
        waiting, self._rows, self._held = self._rows, {}, 0
        for point, several in waiting.items():
            part = self._parts[point] = self._parts.get(point, -1) + 1
            rows = Rows.stack(several)
            for name, array in arrays_of(rows).items():
                self._arrays.add(f"{point}/{part}/{name}", array)
            line = {"type": KIND, "checkpoint": point, "part": part, "records": len(rows), "dtype": rows.dtype}
            self._write([line | {"stats": list(rows.stats)}])

    def close(self, *, complete: bool = True, kept: bool | None = None) -> None:
        """Write the buffered records, then both files. A second call does nothing.

        Raises:
            InputError: the disk refuses a write; an earlier file is unchanged.
        """
        try:
            if not self._file.closed:
                self._flush()
            self._arrays.close(complete=complete if kept is None else kept)
        except BaseException:
            self._arrays.close(complete=False)
            super().close(complete=False)
            raise
        super().close(complete=complete, kept=kept)


def arrays_of(rows: Rows) -> dict[str, NDArray[Any]]:
    """The columns of records as arrays, by name."""
    arrays: dict[str, NDArray[Any]] = {
        "place": np.stack([rows.seq, rows.token_idx, rows.step, rows.decode.astype(np.int64)], axis=1),
        "shape": _shapes(rows.shapes),
        "counts": rows.counts.astype(np.int64),
        "values": rows.values,
        "stats": np.stack([*rows.stats.values()], axis=1) if rows.stats else np.zeros((len(rows), 0)),
    }
    optional = {"sketch": rows.sketch, "indices": rows.indices, "quantum": rows.quantum}
    return arrays | {name: array for name, array in optional.items() if array is not None}


def _shapes(shapes: tuple[tuple[int, ...], ...]) -> NDArray[np.int64]:
    """Shapes as a table, padded with -1 after the last axis of each."""
    axes = max((len(shape) for shape in set(shapes)), default=0)
    padded = {shape: (*shape, *(-1,) * (axes - len(shape))) for shape in set(shapes)}
    return np.array([padded[shape] for shape in shapes], dtype=np.int64).reshape(len(shapes), axes)
