"""Whole arrays: .npy, .npz and .safetensors files, or folders of them, named by point."""

import json
import re
import stat
import zipfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DumpError
from ..mapped import mapped
from ..mapping import Mapping
from ..nearest import unknown_names
from ..nesting import parsed
from ..points import parse
from ..record import Dump, Rows
from ..regular import require_regular
from ..summary import summarise

_ENDINGS = (".npy", ".npz", ".safetensors")
_LARGEST = 1 << 30  # bytes of a file, of all arrays of an archive together, and of all files of a folder
# How many times an archive's own size its arrays may take: activations shrink to half at best, zeros to a thousandth.
_RATIO = 100
_SMALL = 1 << 24  # bytes of arrays that any archive may unpack to
_OF_PASS = re.compile(r"(.+)/(\d{1,9})", re.DOTALL)  # a point, and the number of its forward pass
MOST = 10_000  # arrays of a file: 126 layers of 60 points each, and some more
_HEADER = 1 << 23  # bytes of a safetensors header: 800 for each of so many arrays, which take 250
_ROWS = 1 << 20  # of an array: positions of a context
_TYPES: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "F64": np.float64}
_INTEGERS: dict[str, Any] = {"I32": np.int32, "I64": np.int64}


def detect(path: Path) -> bool:
    """A file with one of the endings, or a folder of such files."""
    if path.is_dir():
        return any(file.suffix in _ENDINGS for file in path.iterdir())
    return path.suffix in _ENDINGS


def read(path: Path, mapping: Mapping) -> Dump:
    """All arrays as whole rows.

    Raises:
        DumpError: a file cannot be read, or no array can be rows of positions.
    """
    files = sorted(file for file in path.iterdir() if file.suffix in _ENDINGS) if path.is_dir() else [path]
    if len(files) > MOST:
        raise DumpError(f"{path} holds {len(files):,} files of arrays.", "Save fewer points.", code="array")
    if sum(map(check_size, files)) > _LARGEST:
        raise DumpError(f"the arrays of {path} are more than 1 GiB together.", "Save fewer positions or points.", code="array")
    parts: dict[str, list[Rows]] = {}
    notes: list[str] = []
    for file in files:
        for name, array in _arrays(file):
            numbered = _OF_PASS.fullmatch(name)
            label, number = (numbered[1], int(numbered[2])) if numbered else (name, 0)
            point, entry = mapping.entry(label)
            rows = rows_of(point, mapped(mapping, entry, array), number, sum(map(len, parts.get(point, []))))
            if rows is None:
                notes.append(f"{name} has shape {list(array.shape)}, which is not rows of positions; left out")
            else:
                parts.setdefault(point, []).append(rows)
    if not parts:
        raise DumpError(f"{path} holds no array of activations.", "Name arrays by point: embd, blk.5.l_out.", code="no-records")
    points = {name: Rows.stack(batches) for name, batches in parts.items()}
    return Dump(str(path), None, points, notes=(*notes, *unknown_names(points)))


def rows_of(point: str, array: NDArray[Any], step: int = 0, first: int = 0) -> Rows | None:
    """An array as the records of one pass: [T, …], [n], or [1, T, …]; None if it has none of these shapes."""
    if array.dtype.kind not in "fiu" or not array.size:
        return None
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(array, dtype=np.float32)
    if (not_a_number := np.isnan(values)).any():  # of any kind: NumPy warns of signalling ones whenever it converts them
        values = np.where(not_a_number, np.float32(np.nan), values)
    known = parse(point).known
    square = known is not None and known.row == ("H", "t+1")
    while values.ndim > (3 if square else 2) and len(values) == 1:
        values = values[0]
    if square:
        if values.ndim != 3 or values.shape[2] < values.shape[1]:
            return None
        return summarise(point, values, np.arange(values.shape[1]), step=step, slice_size=None)
    values = np.atleast_2d(values)
    if len(values) > _ROWS:
        raise DumpError(
            f"{point} has {len(values):,} rows, more positions than any context has.",
            "Save rows of positions [T, n], a million of them at the most.",
            code="array",
        )
    positions = np.arange(first, first + len(values))
    if known is not None and known.row[:1] == ("t+1",):
        positions = np.array([len(values) - 1])
    return summarise(point, values, positions, step=step, decode=step > 0 and len(values) == 1, slice_size=None)


def check_size(file: Path) -> int:
    """The bytes of a file's arrays. Raises DumpError if they would fill the memory."""
    size = unpacked_size(file)
    if size > _LARGEST:
        raise DumpError(f"{file} holds more than 1 GiB.", "Save fewer positions or points, or single arrays.", code="array")
    return size


def unpacked_size(file: Path) -> int:
    """The bytes of a file's arrays. Raises DumpError where a small archive would unpack to huge arrays."""
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            raise DumpError(f"{file} is not a regular file.", "Name a file.", code="no-file")
        size = status.st_size
        if file.suffix == ".npz":
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                size = sum(member.file_size for member in members)
            if len(members) > MOST:
                raise DumpError(f"{file} holds {len(members):,} arrays.", "Save fewer points.", code="array")
            if size > max(_SMALL, _RATIO * status.st_size):
                raise DumpError(
                    f"{file} has {status.st_size:,} bytes and would unpack to {size:,}: neither activations nor weights compress so well.",
                    "Save the arrays again.",
                    code="array",
                )
    except FileNotFoundError as error:
        raise DumpError(f"cannot read {file}: {error.strerror}.", "Check the path.", code="no-file") from error
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
        raise DumpError(f"cannot read {file}: {' '.join(str(error).split())[:100]}.", "Save it again.", code="array") from error
    return size


def _arrays(file: Path) -> Iterator[tuple[str, NDArray[Any]]]:
    try:
        if file.suffix == ".safetensors":
            yield from safetensors(file)
        elif file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as archive:
                for name in archive.files:
                    yield (
                        name,
                        np.asarray(archive[name]),
                    )  # bytes if a member is not an array; such members have no type that is read here
        else:
            with np.errstate(over="ignore"):  # of a header's sizes: the error says it
                array = np.load(file, mmap_mode="r", allow_pickle=False)
            yield file.stem, array
    except Exception as error:  # zip, zlib, NumPy and the parsers of headers raise errors of their own
        in_header = isinstance(error, (RecursionError, SyntaxError, TokenError)) or "malformed node" in str(error)
        reason = "its header is damaged" if in_header else " ".join(str(error).split())[:100] or type(error).__name__
        raise DumpError(f"cannot read {file}: {reason}.", "Save it again.", code="array") from error


def _check_regions(header: dict[str, Any]) -> None:
    """Raises ValueError if two arrays share bytes, which the format forbids: many of them could fill the memory."""
    regions = sorted(
        (int(entry["data_offsets"][0]), int(entry["data_offsets"][1]))
        for name, entry in header.items()
        if name != "__metadata__" and isinstance(entry, dict)
    )
    if any(begin < end for (_, end), (begin, stop) in pairwise(regions) if stop > begin):
        raise ValueError("two of its arrays overlap")


def safetensors(file: Path, *, integers: bool = False) -> Iterator[tuple[str, NDArray[Any]]]:
    """Names and float arrays of a safetensors file, with `integers` those too; bfloat16, which NumPy lacks, becomes float32.

    Raises:
        ValueError: it is not a safetensors file.
    """
    require_regular(file, DumpError)
    data = np.memmap(file, dtype=np.uint8, mode="r")
    size = int.from_bytes(data[:8].tobytes(), "little") if len(data) >= 8 else 0
    if not 2 <= size <= len(data) - 8:
        raise ValueError("it is not a safetensors file")
    if size > _HEADER:
        raise ValueError(f"its header has {size:,} bytes, more than {MOST:,} arrays take")
    body = data[8 + size :]
    header = parsed(json.loads, data[8 : 8 + size].tobytes())
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")  # noqa: TRY004  # a file's fault, not a caller's
    if len(header) > MOST:
        raise ValueError(f"it holds {len(header):,} arrays")
    _check_regions(header)
    for name, entry in header.items():
        if name == "__metadata__" or not isinstance(entry, dict):
            continue
        begin, end = entry["data_offsets"]
        if not 0 <= begin <= end <= len(body):
            raise ValueError(f"{name} lies at bytes {begin} to {end}, but there are only {len(body):,}")
        shape = tuple(entry["shape"])
        raw = body[begin:end]
        if entry["dtype"] == "BF16":
            yield name, (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
        elif (kind := (_TYPES | (_INTEGERS if integers else {})).get(entry["dtype"])) is not None:
            yield name, raw.view(kind).reshape(shape)
