"""The table of contents of a GGUF file: the places of metadata and tensors, without loading either.

gguf-py's reader makes a NumPy view of every element of every array: that takes seconds for a vocabulary of 150,000 tokens, of which
a run needs none. Here values are kept as raw bytes, so that copies are exact, and an array is decoded
when it is asked for. A test compares it with gguf-py's reader. Layout: docs/gguf.md of ggml. A split model is read as one: its
first part has the metadata, every part has tensors.
"""

import hashlib
import mmap
import struct
from functools import cached_property
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from .content import content_hash
from .errors import ModelError
from .fingerprint import fingerprint
from .gguf_parts import missing_part, not_first, other_part, part_path
from .gguf_values import ARRAY, SIZES, STRING, UINT32, Value, string_value, uint32_value
from .record import ModelInfo
from .regular import LFS_POINTER

_ALIGNMENT = 32  # GGUF_DEFAULT_ALIGNMENT
_MAX_DIMS = 4  # GGML_MAX_DIMS
# Bytes that a value (key length, type, one byte) and a tensor (name length, dimensions, one of them, type, offset) take.
_LEAST_VALUE, _LEAST_TENSOR = 13, 32
_FAMILIES = {0: "f32", 1: "f16", 30: "bf16", 28: "f32"}  # by ggml_type; F64 is no coarser than F32


class TensorEntry(Struct, frozen=True):
    """A tensor's place: `ne` in ggml's order, `type` a `ggml_type`, `offset` from the start of the data section.

    `part` is the index of the file that holds it, among `Contents.parts`.
    """

    name: str
    ne: tuple[int, ...]
    type: int
    offset: int
    part: int = 0

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        count = 1
        for n in self.ne:
            count *= n
        return count


class Contents(Struct, frozen=True, dict=True):
    """What a GGUF file contains, and where: `data` is the file offset of the data section, `size` that of the file's end.

    `header_end` is where the table of contents ends, before the padding to a multiple of `alignment`. A split model has its
    further files in `others`; then `tensors` are those of all parts, and everything else is the first part's.
    """

    path: Path
    metadata: dict[str, Value]
    tensors: tuple[TensorEntry, ...]
    data: int
    size: int
    header_end: int
    alignment: int
    others: tuple["Contents", ...] = ()

    @property
    def parts(self) -> tuple["Contents", ...]:
        """The files of the model, one where it is not split: `TensorEntry.part` is an index into it."""
        return (self, *self.others)

    def text(self, key: str) -> str:
        """A string of the metadata, "" if it is missing."""
        value = self.metadata.get(key)
        return (value.text() or "") if value else ""

    def integer(self, key: str) -> int | None:
        """An integer of the metadata, None if it is missing or of another type."""
        value = self.metadata.get(key)
        number = value.number() if value else None
        return number if isinstance(number, int) and not isinstance(number, bool) else None

    @cached_property
    def fingerprint(self) -> str:
        """`checkpoints.fingerprint.fingerprint` of the file; of a split model one of all its parts."""
        return _together([fingerprint(part.path) for part in self.parts])

    @cached_property
    def content(self) -> str:
        """`checkpoints.content.content_hash` of the file; of a split model one of all its parts.

        Raises:
            ModelError: it cannot be read to its end, or is being written.
        """
        try:
            return _together([content_hash(part.path) for part in self.parts])
        except OSError as error:
            raise ModelError(
                f"cannot read {self.path}: {error.strerror or error}.", "Check the file.", code="no-file"
            ) from error

    @property
    def architecture(self) -> str:
        """`general.architecture`."""
        return self.text("general.architecture")

    @property
    def attention_window(self) -> int | None:
        """How many positions attention sees in the layers that have a window; None if the metadata state none."""
        return self.integer(f"{self.architecture}.attention.sliding_window")

    @property
    def weight_families(self) -> tuple[str, ...]:
        """Which of f32, f16, bf16 and quantised types the matrices have."""
        kinds = {_FAMILIES.get(tensor.type, "quantised") for tensor in self.tensors if len(tensor.ne) > 1}
        return tuple(sorted(kinds))

    @property
    def settings(self) -> str:
        """A hash (16 hex digits) of the metadata of the architecture, such as epsilons and RoPE's base, not of the tokenizer."""
        own = sorted(key for key in self.metadata if key.startswith(f"{self.architecture}."))
        digest = hashlib.sha256()
        for key in own:
            value = self.metadata[key]
            digest.update(f"{key}\n{value.type}\n{len(value.raw)}\n".encode() + value.raw)
        return digest.hexdigest()[:16]

    def info(self, file_type: str) -> ModelInfo:
        """The model as a dump's header describes it: `file_type` is the name of `general.file_type`.

        Raises:
            ModelError: the file cannot be read to its end.
        """
        return ModelInfo(
            name=self.text("general.name") or self.path.stem,
            architecture=self.architecture,
            file_type=file_type,
            layers=self.layers or None,
            fingerprint=self.fingerprint,
            content=self.content,
            weights=" ".join(self.weight_families),
            settings=self.settings,
        )

    @property
    def layers(self) -> int:
        """The layers of a pass: `<architecture>.block_count`, as often as `num_loops` says; 0 if it is missing."""
        return (self.integer(f"{self.architecture}.block_count") or 0) * (self.integer(f"{self.architecture}.num_loops") or 1)


def _together(hashes: list[str]) -> str:
    """One hash (32 hex digits) of several, in their order; a single one as it is."""
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()[:32]


class _Cursor:
    """Reads on from an offset in the file; raises EOFError if the file ends first."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def take(self, n: int) -> bytes:
        if n < 0 or self.at + n > len(self.data):
            raise EOFError
        self.at += n
        return self.data[self.at - n : self.at]

    def number(self, code: str) -> int:
        return int(struct.unpack("<" + code, self.take(struct.calcsize(code)))[0])

    def string(self) -> str:
        return self.take(self.number("Q")).decode(errors="replace")

    def skip_value(self, kind: int) -> None:
        if kind in SIZES:
            self.at += SIZES[kind]
        elif kind == STRING:
            self.skip_strings(1)
        elif kind == ARRAY:
            item, count = self.number("I"), self.number("Q")
            if item in SIZES:
                self.at += SIZES[item] * count
            elif item == STRING:
                self.skip_strings(count)
            else:
                raise ValueError(f"its metadata have an array of unknown type {item}")
        else:
            raise ValueError(f"its metadata have a value of unknown type {kind}")
        if self.at > len(self.data):
            raise EOFError

    def skip_strings(self, count: int) -> None:
        """A plain loop: a vocabulary has 300,000 strings and more."""
        if count * 8 > len(self.data):
            raise EOFError
        length_at, data, at = struct.Struct("<Q").unpack_from, self.data, self.at
        try:
            for _ in range(count):
                at += 8 + length_at(data, at)[0]
        except struct.error:
            raise EOFError from None
        self.at = at


def contents(path: Path) -> Contents:
    """Read the table of contents; of a split model, whose first part is named, the tables of all parts.

    Raises:
        ModelError: no such file, a folder, not a GGUF, damaged, or cut short within the table; a part that is not the first,
            is missing or belongs to another model.
    """
    whole = _contents_of_file(path)
    count = whole.integer("split.count") or 0
    return whole if count <= 1 else _joined(whole, count)


def _joined(first: Contents, count: int) -> Contents:
    """The first part of a split model with the tensors of all others; mirrors the checks of llama_model_loader."""
    if (number := first.integer("split.no") or 0) != 0:
        raise not_first(first.path, number + 1, count)
    others: list[Contents] = []
    tensors = {tensor.name: tensor for tensor in first.tensors}
    for number in range(2, count + 1):
        path = part_path(first.path, number, count)
        if not path.exists():
            raise missing_part(path, number, count)
        part = _contents_of_file(path)
        for key, right in (("split.no", number - 1), ("split.count", count)):
            if (value := part.integer(key)) != right:
                raise other_part(path, number, count, f"its {key} is {value}, not {right}")
        if twice := next((tensor.name for tensor in part.tensors if tensor.name in tensors), None):
            raise other_part(path, number, count, f"an earlier part has {twice} already")
        tensors |= {tensor.name: replace(tensor, part=number - 1) for tensor in part.tensors}
        others.append(part)
    expected = first.integer("split.tensors.count")
    if expected is not None and expected != len(tensors):
        raise ModelError(
            f"the {count} parts of {first.path} have {len(tensors)} tensors together, not {expected} as the first says.",
            "Put all parts of one model into one folder.",
            code="split",
        )
    return replace(first, tensors=tuple(tensors.values()), others=tuple(others))


def _contents_of_file(path: Path) -> Contents:
    try:
        if path.is_dir():
            raise ModelError(f"{path} is a folder.", "Name the .gguf file in it.", code="no-file")
        if path.exists() and not path.is_file():
            raise ModelError(f"{path} is a pipe or a device.", "A model is memory-mapped: name a file.", code="no-file")
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
            if start == LFS_POINTER:
                raise ModelError(f"{path} is a Git LFS pointer, not the model.", "Fetch it: git lfs pull.", code="not-gguf")
            magic = start[:4]
            if magic != b"GGUF":
                shown = f'"{magic.decode()}"' if magic.isascii() and magic.decode().isprintable() else magic.hex(" ")
                problem = f'is not a GGUF file: it begins with {shown}, not "GGUF"' if magic else "is empty"
                raise ModelError(f"{path} {problem}.", "Use a model in llama.cpp's format (.gguf).", code="not-gguf")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(path, data)
    except OSError as error:
        raise ModelError(
            f"cannot read {path}: {error.strerror or error}.", "Check the path of the model.", code="no-file"
        ) from error
    except EOFError:
        raise _damaged(path, "is cut short: it ends within its table of contents") from None
    except (ValueError, MemoryError, OverflowError) as error:
        raise _damaged(path, f"is damaged: {error}") from error


def _damaged(path: Path, problem: str) -> ModelError:
    return ModelError(f"{path} {problem}.", "Download it again.", code="damaged-model")


def _parse(path: Path, data: mmap.mmap) -> Contents:
    cursor = _Cursor(data)
    cursor.take(4)
    version = cursor.number("I")
    if not 2 <= version <= 3:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        problem = "is big-endian" if swapped in (2, 3) else f"is GGUF version {version}"
        raise ModelError(f"{path} {problem}.", "Convert it again (version 3, little-endian).", code="version")
    n_tensors, n_values = cursor.number("Q"), cursor.number("Q")
    if n_values * _LEAST_VALUE + n_tensors * _LEAST_TENSOR > len(data):
        raise ValueError(f"it claims {n_values} values and {n_tensors} tensors, more than fit into the file")
    metadata: dict[str, Value] = {}
    for _ in range(n_values):
        key, kind = cursor.string(), cursor.number("I")
        if key in metadata:
            raise ValueError(f"it has two values named {key!r}")
        start = cursor.at
        cursor.skip_value(kind)
        metadata[key] = Value(kind, data[start : cursor.at])
    tensors: dict[str, TensorEntry] = {}
    for number in range(n_tensors):
        name, n_dims = cursor.string(), cursor.number("I")
        if not name:
            raise ValueError(f"tensor {number:,} has no name")
        if not 0 < n_dims <= _MAX_DIMS:
            raise ValueError(f"tensor {name!r} has {n_dims} dimensions")
        ne = tuple(cursor.number("Q") for _ in range(n_dims))
        if name in tensors:
            raise ValueError(f"it has two tensors named {name!r}")
        tensors[name] = TensorEntry(name, ne, cursor.number("I"), cursor.number("Q"))
    stated = metadata.get("general.alignment", uint32_value(_ALIGNMENT))
    step = stated.number() if stated.type == UINT32 else None
    if not isinstance(step, int) or step < 1 or step & (step - 1):
        raise ValueError(f"its alignment is {stated.plain()!r:.60}, not a power of two")
    return Contents(path, metadata, tuple(tensors.values()), -(-cursor.at // step) * step, len(data), cursor.at, step)


def header_bytes(metadata: dict[str, Value], tensors: list[TensorEntry]) -> bytes:
    """The table of contents of a new file (GGUF 3), padded so that the data section may follow at once."""
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [string_value(key).raw, struct.pack("<I", value.type), value.raw]
    for tensor in tensors:
        parts += [string_value(tensor.name).raw, struct.pack(f"<I{len(tensor.ne)}Q", len(tensor.ne), *tensor.ne)]
        parts.append(struct.pack("<IQ", tensor.type, tensor.offset))
    joined = b"".join(parts)
    return joined + b"\0" * (-len(joined) % _ALIGNMENT)
