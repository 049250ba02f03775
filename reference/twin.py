"""F32 twins: copies of a model with every weight dequantised by llama.cpp, and copies of any other type.

A twin is bit-equal to gguf-py's dequantisation. `twin_cache` keeps them.
"""

import ctypes
import os
import shutil
from contextlib import suppress
from pathlib import Path

from checkpoints.cache import cache_dir
from checkpoints.content import content_hash, touched
from checkpoints.errors import InputError, ModelError, ReferenceFailed
from checkpoints.gguf_file import Contents, contents
from checkpoints.room import cores
from checkpoints.whole_file import Replacement, is_special, unwritable

from . import twin_cache
from .after_quantising import dequantize_rest, is_f32, state_alignment
from .library import Library

_F32 = "F32"  # the file type whose weights are F32 without exception
_ATTEMPTS = 3  # to make a twin that reads back as it was written


def twin_bytes(contents: Contents) -> int:
    """The bytes that a twin takes, in memory as on disk."""
    return 4 * sum(tensor.elements for tensor in contents.tensors)


def checked(library: Library, path: Path) -> Contents:
    """The contents of a model, checked to be computable.

    Raises:
        ModelError: the file is not a GGUF, has no tensors, or is cut short.
    """
    file = contents(path)
    if not file.tensors:
        raise ModelError(
            f"{path} has a tokenizer but no tensors: it can tokenize, not compute.", "Use a model file with weights."
        )
    for tensor in file.tensors:
        part = file.parts[tensor.part]
        end = part.data + tensor.offset + library.ggml.row_size(tensor.type, tensor.elements)
        if end > part.size:
            raise ModelError(
                f"{part.path} is cut short: tensor {tensor.name} ends at byte {end:,}, the file at {part.size:,}.",
                "Download it again.",
            )
    return file


class Twins:
    """The twin that this process uses: made if there is none, checked before it is used, and not evicted meanwhile.

    Attributes:
        notes: what the user should know about twins, one sentence each.
    """

    def __init__(self, library: Library) -> None:
        self._library = library
        self._lock = -1  # a descriptor, which the end of the process closes
        self.notes: list[str] = []

    def of(self, model: Contents, *, joined: bool = False, threads: int | None = None) -> Path:
        """The F32 twin of a `checked` model; one with F32 weights is its own twin. It is kept until the next twin is asked for.

        Args:
            joined: a single file is wanted, so that an F32 model in several files is copied too.

        Raises:
            ReferenceFailed: llama.cpp cannot convert it; InputError: the cache cannot hold it; ModelError: the model was changed
            meanwhile.
        """
        if is_f32(model) and not (joined and len(model.parts) > 1):
            return model.path
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
        twin_cache.workspace()
        with twin_cache.making(model):
            for _ in range(_ATTEMPTS):
                try:
                    taken = twin_cache.take(model)
                except twin_cache.DamagedTwin:
                    self.notes.append(f"the F32 copy of {model.path.name} in the cache was damaged and has been made again.")
                    taken = None
                path, self._lock = taken or self._make(model, threads)
                if path.exists():
                    return path
        raise InputError(
            f"F32 copies disappear from the cache {cache_dir()} while they are in use.", "Set PARITY_CACHE.", code="cache"
        )

    def _make(self, model: Contents, threads: int | None) -> tuple[Path, int]:
        """Make the twin in the cache; returns it and a descriptor that keeps it there."""
        folder = cache_dir()
        twin_cache.make_room(twin_bytes(model))
        before = [part.path.stat() for part in model.parts]
        try:
            with Replacement(folder / twin_cache.name_of(model, "new")) as replacement:
                convert(self._library, model, _F32, replacement.temporary, threads=threads)
                whole(self._library, model, replacement.temporary)
                for part, status in zip(model.parts, before, strict=True):
                    if touched(status, part.path.stat()):
                        raise ModelError(f"{part.path} was changed while it was read.", "Run again when it is whole.")
                own = content_hash(replacement.temporary)
                path = folder / twin_cache.name_of(model, own)
                descriptor = replacement.commit_locked(path, durable=True)
        except OSError as error:
            raise twin_cache.cannot_write(folder, error) from error
        twin_cache.evict()
        return path, descriptor


def _shapes(file: Contents) -> dict[str, tuple[int, ...]]:
    """Each tensor's shape without the dimensions of 1 at its end, which llama.cpp leaves out of what it writes."""
    shapes = {tensor.name: list(tensor.ne) for tensor in file.tensors}
    for ne in shapes.values():
        while len(ne) > 1 and ne[-1] == 1:
            ne.pop()
    return {name: tuple(ne) for name, ne in shapes.items()}


def whole(library: Library, model: Contents, copy: Path) -> None:
    """Check that a copy has all the model's tensors, as F32, up to its end.

    Raises:
        OSError: it has not: the disk lost a part of it without an error; ReferenceFailed: tensors have types that stay as they are.
    """
    try:
        file = checked(library, copy)
    except ModelError as error:
        raise OSError(5, f"the copy of {model.path.name} was not written completely") from error
    if _shapes(file) != _shapes(model):
        raise OSError(5, f"the copy of {model.path.name} was not written completely")
    if not is_f32(file):
        raise ReferenceFailed(
            f"{model.path.name} has tensors of types that llama.cpp does not convert to F32.",
            "Use --mode native.",
            code="type",
        )


def file_types(library: Library) -> dict[str, int]:
    """The names of llama.cpp's file types: "Q4_K_M" -> 15 (`enum llama_ftype`)."""
    prefixes = ("LLAMA_FTYPE_MOSTLY_", "LLAMA_FTYPE_ALL_")
    counts: dict[str, int] = {}
    for name in dir(library.api):
        for prefix in prefixes:
            if name.startswith(prefix):
                counts[name.removeprefix(prefix)] = int(getattr(library.api, name))
    return counts


def quantize(library: Library, path: Path, ftype: str, out: Path, *, threads: int | None = None) -> Path:
    """Write a model with another file type, completely or not at all.

    Raises:
        InputError: no such type, or `out` cannot be written; ReferenceFailed: llama.cpp refused.
    """
    model = checked(library, path)
    file_type(library, ftype)
    if is_special(out):
        raise InputError(f"cannot write a model to {out}: it is a pipe or a device.", "Name a file.", code="output")
    try:
        with Replacement(out) as replacement:
            convert(library, model, ftype, replacement.temporary, threads=threads)
    except OSError as error:
        raise unwritable(out, error, "Choose another --out.") from error
    return out


def convert(library: Library, model: Contents, ftype: str, out: Path, *, threads: int | None = None) -> None:
    """Have llama.cpp write a model with another file type into a file of ours (`llama_model_quantize`).

    Raises:
        InputError: no such type; ReferenceFailed: llama.cpp refused; OSError: the file could not be written.
    """
    api = library.api
    params = api.llama_model_quantize_default_params()
    params.ftype = file_type(library, ftype)
    params.allow_requantize = True
    params.nthread = threads or cores()
    library.lines.clear()
    status = api.llama_model_quantize(os.fsencode(model.path), os.fsencode(out), ctypes.byref(params))
    if status == 0:
        state_alignment(out)
        if ftype.upper() == _F32:
            dequantize_rest(out)
        return
    reason = library.reason()
    if "iostream error" in reason:  # llama.cpp's message for any failed write: the disk itself says why
        raise OSError(*_why(out))
    raise ReferenceFailed(
        f"llama.cpp cannot write {model.path.name} as {ftype.upper()}: {reason}.", "--verbose shows llama.cpp's log."
    )


def _why(out: Path) -> tuple[int, str]:
    """Why nothing more can be written to a file."""
    try:
        with out.open("ab") as file:
            file.write(b"\0" * (1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno or 5, error.strerror or str(error)
    free = 0
    with suppress(OSError):
        free = shutil.disk_usage(out.parent).free
    return 28, f"No space left on device ({free / 1e6:,.0f} MB are free)"


def file_type(library: Library, name: str) -> int:
    """The number of a file type.

    Raises:
        InputError: there is no type of that name.
    """
    types = file_types(library)
    if name.upper() not in types:
        raise InputError(f"there is no file type {name!r:.40}.", f"Use one of {', '.join(sorted(types))}.", code="ftype")
    return types[name.upper()]
