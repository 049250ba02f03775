"""What `torch.save` writes, read without torch: no pickle is executed.

A file is an archive: `data.pkl` describes a structure of dictionaries, lists and tensors (`pickled.py` interprets it), `data/0`,
`data/1`, … hold their storages.
"""

import zipfile
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from ..errors import DumpError
from ..mapped import mapped
from ..mapping import Mapping
from ..nearest import unknown_names
from ..record import Dump, Rows
from ..regular import require_regular
from .arrays import MOST, rows_of
from .pickled import Opaque, key_of, structure

LARGEST = 1 << 30  # bytes of a file, and of all tensors that it describes
_SMALL = 1 << 24  # bytes that any archive may unpack to; a larger one must be stored uncompressed, as torch does
_RATIO = 100
_ENTRY = 128  # bytes of a dictionary's entry
_DEEPEST = 8  # dimensions of a tensor
_BF16 = "bfloat16"
# Storage classes and torch's own names of types -> NumPy's.
_TYPES = {
    "FloatStorage": "f4", "float32": "f4", "HalfStorage": "f2", "float16": "f2", "BFloat16Storage": _BF16, "bfloat16": _BF16,
    "DoubleStorage": "f8", "float64": "f8", "LongStorage": "i8", "int64": "i8", "IntStorage": "i4", "int32": "i4",
    "ShortStorage": "i2", "int16": "i2", "CharStorage": "i1", "int8": "i1", "ByteStorage": "u1", "uint8": "u1",
    "uint16": "u2", "uint32": "u4", "uint64": "u8",
    "BoolStorage": "?", "bool": "?", "UntypedStorage": "u1",
}  # fmt: skip
_AGAIN = "Save it again, as torch.save(tensor.cpu(), path) does."


class _Storage(Struct, frozen=True):
    type: str
    key: str
    order: str


def detect(path: Path) -> bool:
    """A .pt or .pth file, or a folder of such files."""
    if path.is_dir():
        return any(file.suffix in (".pt", ".pth") for file in path.iterdir())
    return path.suffix in (".pt", ".pth")


def read(path: Path, mapping: Mapping) -> Dump:
    """Every tensor that has a name: those of a dictionary by key, a file that is one tensor by the file's name.

    Raises:
        DumpError: a file cannot be read, or no tensor can be rows of positions.
    """
    files = sorted(file for file in path.iterdir() if file.suffix in (".pt", ".pth")) if path.is_dir() else [path]
    points: dict[str, list[Rows]] = {}
    for file in files:
        for name, array in named(contents(file), file.stem):
            point, entry = mapping.entry(name)
            rows = rows_of(point, mapped(mapping, entry, array))
            if rows is not None:
                points.setdefault(point, []).append(rows)
            if len(points) > MOST:
                raise DumpError(f"{path} holds more than {MOST:,} tensors.", "Save fewer points.", code="array")
    if not points:
        raise DumpError(
            f"{path} holds no tensor of activations.", "Name tensors by point: embd, blk.5.l_out.", code="no-records"
        )
    stacked = {name: batches[0] for name, batches in points.items()}
    return Dump(str(path), None, stacked, notes=tuple(unknown_names(stacked)))


def named(value: Any, name: str) -> Iterator[tuple[str, NDArray[Any]]]:
    """(name, tensor) of a structure; for lists the first tensor, as modules return them."""
    if isinstance(value, np.ndarray):
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            if isinstance(key, str):
                first = (
                    next((item for item in inner if isinstance(item, np.ndarray)), None)
                    if isinstance(inner, list | tuple)
                    else inner
                )
                if isinstance(first, np.ndarray):
                    yield key, first


def contents(file: Path) -> Any:
    """What was saved: dictionaries, lists, tuples, numbers, texts, and tensors as NumPy arrays (bfloat16 as float32).

    Raises:
        DumpError: it is not such a file, is damaged, or describes more data than activations could be.
    """
    require_regular(file, DumpError)
    try:
        size = file.stat().st_size
        with zipfile.ZipFile(file) as archive:
            members = {member.filename.partition("/")[2]: member for member in archive.infolist()}
            _check_members(members, size)
            order = archive.read(members["byteorder"]) if "byteorder" in members else b"little"
            storages = {name.removeprefix("data/"): member for name, member in members.items() if name.startswith("data/")}
            reader = _Reader(archive, storages, big=order.strip() == b"big")
            return structure(archive.read(members["data.pkl"]), reader.storage, reader.called)
    except DumpError:
        raise
    except zipfile.BadZipFile as error:
        reason = "torch's old format, or not a torch file at all" if size else "an empty file"
        raise DumpError(f"cannot read {file}: {reason}.", _AGAIN, code="array") from error
    except Exception as error:  # of zlib, of the instructions' parser, of shapes: a file's fault, whatever its name
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise DumpError(f"cannot read {file}: {reason}.", _AGAIN, code="array") from error


def _check_members(members: dict[str, zipfile.ZipInfo], size: int) -> None:
    """Raises ValueError if an archive of `size` bytes would fill the memory, or if torch did not write it."""
    unpacked = sum(member.file_size for member in members.values())
    if unpacked > LARGEST or unpacked > max(_SMALL, _RATIO * size):
        raise ValueError(f"it would unpack to {unpacked:,} bytes")
    if "data.pkl" not in members:
        raise ValueError("it was not written by torch.save")


class _Reader:
    """Makes what the description of one archive names: its storages and tensors."""

    def __init__(self, archive: zipfile.ZipFile, storages: dict[str, zipfile.ZipInfo], *, big: bool) -> None:
        self._archive = archive
        self._members = storages
        self._order = ">" if big else "<"
        self._room = LARGEST
        self._raw: dict[str, bytes] = {}

    def storage(self, identity: Any) -> _Storage | Opaque:
        kind, storage, key = identity[:3]
        last = storage.name.rpartition(".")[2] if isinstance(storage, Opaque) else ""
        if kind != "storage" or not isinstance(key, str):
            raise ValueError("it names something that is not a storage")
        if last not in _TYPES:
            return Opaque(last)
        return _Storage(_TYPES[last], key, self._order)

    def called(self, function: Any, arguments: Any) -> Any:
        name = function.name if isinstance(function, Opaque) else ""
        if not isinstance(arguments, tuple):
            raise ValueError("its description calls something without arguments")  # noqa: TRY004  # a file's fault
        if name in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"):
            return self._tensor(*arguments[:4])
        if name == "torch._utils._rebuild_tensor_v3":
            kind = arguments[6].name.rpartition(".")[2]
            if kind not in _TYPES:  # float8 and the like, which NumPy lacks
                return Opaque(f"tensor of {kind}")
            storage = _Storage(_TYPES[kind], arguments[0].key, arguments[0].order)
            return self._tensor(storage, *arguments[1:4])
        if name in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"):
            return arguments[0]
        if name == "collections.OrderedDict":
            self._room -= _ENTRY * (len(arguments[0]) if arguments else 0)
            if self._room < 0:
                raise ValueError("its dictionaries are larger than activations")
            return {key_of(key): item for key, item in arguments[0]} if arguments else {}
        if name == "torch.Size":
            return arguments[0]
        return Opaque(name or "?")

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any) -> NDArray[Any] | Opaque:
        if isinstance(storage, Opaque):
            return storage
        if not isinstance(storage, _Storage):
            raise ValueError("it has a tensor without a storage")  # noqa: TRY004  # a file's fault
        if (
            len(shape) != len(strides)
            or len(shape) > _DEEPEST
            or not all(isinstance(n, int) and n >= 0 for n in (*shape, *strides))
        ):
            raise ValueError("it has a tensor whose shape is not a list of sizes")
        kind = np.dtype(f"{storage.order}{'u2' if storage.type == _BF16 else storage.type}")
        raw = self._bytes(storage.key)
        flat = np.frombuffer(raw, kind, len(raw) // kind.itemsize)
        last = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        count = prod(shape)
        if not isinstance(offset, int) or offset < 0 or count > len(flat) or (count and offset + last >= len(flat)):
            raise ValueError("it has a tensor that is larger than its storage")
        self._room -= 8 * count  # as float32, and in a copy of the row
        if self._room < 0:
            raise ValueError("its tensors are larger than activations")
        view = as_strided(flat[offset:], tuple(shape), tuple(stride * kind.itemsize for stride in strides), writeable=False)
        if storage.type == _BF16:
            return (view.astype("<u4") << 16).view("<f4").astype(np.float32)
        return view.astype(kind.newbyteorder("="))

    def _bytes(self, key: str) -> bytes:
        if key not in self._raw:
            self._raw[key] = self._archive.read(self._members[key])
        return self._raw[key]
