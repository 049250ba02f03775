"""Windows: layers first … stop − 1 of a model as a GGUF of their own, fed with a hidden state instead of tokens.

Chained over the model, they give the whole model's numbers to the bit, in the memory of one window. A window's file is the
model's own table of contents with the layers renumbered, no tokenizer, and the embedding and the output matrix cut to the
rows that are needed; tensors are copied unconverted.
"""

import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from msgspec import Struct
from msgspec.structs import replace

from checkpoints.errors import InputError
from checkpoints.gguf_file import Contents, TensorEntry, contents, header_bytes
from checkpoints.gguf_values import ARRAY, SIZES, Value, string_value, uint32_value

from .after_quantising import is_f32
from .library import Library
from .model import Model
from .twin import convert
from .twin_cache import cannot_write, temporary, workspace

_ROWS = 32  # rows of an embedding or output matrix that is not read
_ALIGNMENT = 32  # of tensors, as GGUF's default
_CHUNK = 1 << 24  # bytes that are copied at a time
_LAYER = re.compile(r"blk\.(\d+)\.(.+)")
_EMBEDDING, _OUTPUT = "token_embd.weight", "output.weight"


class Window(Struct, frozen=True):
    """Layers first … stop − 1 of a model.

    Attributes:
        ids: the tokens that will enter it; None if a hidden state does.
        untied: whether the last window has an output matrix besides the embedding, for architectures that require one.
    """

    first: int
    stop: int
    ids: tuple[int, ...] | None = None
    untied: bool = False


class _Part(Struct, frozen=True):
    """A tensor of the new file: `rows` of the original in this order (None for all, a number for the first so many)."""

    name: str
    source: TensorEntry
    rows: tuple[int, ...] | int | None = None


def vocabulary_of(ids: Sequence[int], n_vocab: int) -> tuple[int, ...]:
    """The rows of the embedding that a window's file holds: those of the tokens, in order, filled up with others if they are few."""
    used = set(ids)
    for number in range(n_vocab):
        if len(used) >= min(_ROWS, n_vocab):
            break
        used.add(number)
    return tuple(sorted(used))


@contextmanager
def open_window(
    library: Library, whole: Contents, window: Window, *, exact: bool = False, hollow: bool = False, threads: int | None = None
) -> Iterator[Model]:
    """A window as a loaded model, whose file is removed afterwards. A hollow one has holes in place of weights; only its graph can be
    listed.

    `window_proof.prove` proves that it computes what the whole model does.

    Raises:
        InputError: no such layers; ModelError, ReferenceFailed: llama.cpp refuses it.
    """
    if not 0 <= window.first < window.stop <= whole.layers:
        raise InputError(
            f"there are no layers {window.first}…{window.stop - 1}.",
            f"The model has layers 0…{whole.layers - 1}.",
            code="layers",
        )
    workspace()
    label = f"{window.first}-{window.stop}.gguf"
    with temporary(f"raw-{label}") as raw, temporary(f"f32-{label}") as f32:
        _write(library, whole, window, raw, hollow=hollow)
        path = raw
        if exact and not is_f32(whole):
            try:
                convert(library, contents(raw), "F32", f32, threads=threads)
            except OSError as error:
                raise cannot_write(f32.parent, error) from error
            path = f32
            raw.unlink()
        with Model(library, path) as model:
            yield model


def _write(library: Library, contents: Contents, window: Window, out: Path, *, hollow: bool) -> None:
    parts, rows = _parts(contents, window)
    infos: list[TensorEntry] = []
    offset = 0
    for part in parts:
        ne = _shape(part)
        infos.append(TensorEntry(part.name, ne, part.source.type, offset))
        size = library.ggml.row_size(part.source.type, infos[-1].elements)
        offset += -(-size // _ALIGNMENT) * _ALIGNMENT
    try:
        with ExitStack() as files:
            sources = [files.enter_context(part.path.open("rb")) for part in contents.parts]
            target = files.enter_context(out.open("wb"))
            target.write(header_bytes(_metadata(contents, window, rows), infos))
            if hollow:
                target.truncate(target.tell() + offset)
                return
            for part, info in zip(parts, infos, strict=True):
                _copy(library, contents, part, sources[part.source.part], target)
                target.write(b"\0" * (-library.ggml.row_size(info.type, info.elements) % _ALIGNMENT))
    except OSError as error:
        raise cannot_write(out.parent, error) from error


def _parts(contents: Contents, window: Window) -> tuple[list[_Part], int]:
    """The tensors of a window's file, and the size of its vocabulary."""
    named = {tensor.name: tensor for tensor in contents.tensors}
    embedding = named[_EMBEDDING]
    n_vocab = embedding.ne[1]
    last = window.stop == contents.layers
    ids = None if window.ids is None or last else vocabulary_of(window.ids, n_vocab)
    rows = n_vocab if last else (len(ids) if ids is not None else min(_ROWS, n_vocab))
    parts: list[_Part] = []
    if last:
        # No token is looked up here, so the output matrix takes the place of the embedding, as in a tied model.
        parts.append(_Part(_EMBEDDING, named.get(_OUTPUT, embedding)))
    else:
        parts.append(_Part(_EMBEDDING, embedding, ids if ids is not None else rows))
    for tensor in contents.tensors:
        match = _LAYER.fullmatch(tensor.name)
        if match:
            if window.first <= int(match[1]) < window.stop:
                parts.append(_Part(f"blk.{int(match[1]) - window.first}.{match[2]}", tensor))
        elif tensor.name == _OUTPUT:
            if not last:
                parts.append(_Part(_OUTPUT, tensor, rows))
            elif window.untied:
                parts.append(_Part(_OUTPUT, tensor))
        elif tensor.name != _EMBEDDING:
            parts.append(_Part(tensor.name, tensor))
    return parts, rows


def _shape(part: _Part) -> tuple[int, ...]:
    if part.rows is None:
        return part.source.ne
    return (part.source.ne[0], part.rows if isinstance(part.rows, int) else len(part.rows))


def _copy(library: Library, contents: Contents, part: _Part, source: IO[bytes], target: IO[bytes]) -> None:
    start = contents.parts[part.source.part].data + part.source.offset
    row = library.ggml.row_size(part.source.type, part.source.ne[0])
    if isinstance(part.rows, tuple):
        for number in part.rows:
            source.seek(start + number * row)
            target.write(source.read(row))
        return
    left = row * part.rows if part.rows is not None else library.ggml.row_size(part.source.type, part.source.elements)
    source.seek(start)
    while left > 0:
        chunk = source.read(min(_CHUNK, left))
        if not chunk:
            raise OSError(5, f"{contents.parts[part.source.part].path} ends too early")
        target.write(chunk)
        left -= len(chunk)


def _metadata(contents: Contents, window: Window, rows: int) -> dict[str, Value]:
    prefix = f"{contents.architecture}."
    kept: dict[str, Value] = {}
    for name, value in contents.metadata.items():
        if name.startswith(("tokenizer.", "split.")) or name == "general.alignment":
            continue
        kept[name] = _own_layers(value, window, contents.layers) if name.startswith(prefix) else value
    kept[f"{prefix}block_count"] = uint32_value(window.stop - window.first)
    kept[f"{prefix}vocab_size"] = uint32_value(rows)
    kept["tokenizer.ggml.model"] = string_value("no_vocab")
    return kept


def _own_layers(value: Value, window: Window, n_layers: int) -> Value:
    """A value with one entry per layer, cut to the window's layers; any other unchanged."""
    if value.type != ARRAY:
        return value
    item, count = struct.unpack("<IQ", value.raw[:12])
    if item not in SIZES or count != n_layers:
        return value
    size = SIZES[item]
    entries = value.raw[12 + window.first * size : 12 + window.stop * size]
    return replace(value, raw=struct.pack("<IQ", item, window.stop - window.first) + entries)


def layer_bytes(library: Library, contents: Contents, *, exact: bool) -> tuple[int, int]:
    """(bytes of one layer, bytes of everything outside the layers), in the type that is computed with."""
    inside = outside = 0
    for tensor in contents.tensors:
        size = 4 * tensor.elements if exact else library.ggml.row_size(tensor.type, tensor.elements)
        if _LAYER.fullmatch(tensor.name):
            inside += size
        else:
            outside += size
    return inside // max(contents.layers, 1), outside
