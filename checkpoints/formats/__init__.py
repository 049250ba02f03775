"""Whatever an engine wrote, read as a dump: one file for each format, with `detect` and `read`."""

import os
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np

from ..errors import DumpError
from ..mapping import Mapping
from ..nearest import unknown_names
from ..points import ENCODER, parse
from ..reading import reader
from ..reading.fields import POSITIONS
from ..record import Dump, Rows
from ..regular import STDIN, require_regular
from . import (
    arrays,
    columns,
    debug_mode,
    edge_llm,
    etdump,
    eval_callback,
    llama_debug,
    model_debugger,
    sglang,
    tensorrt_llm,
    torch_file,
)

_FORMATS = (
    columns,
    etdump,
    model_debugger,
    edge_llm,
    llama_debug,
    sglang,
    tensorrt_llm,
    arrays,
    torch_file,
    debug_mode,
    eval_callback,
)  # the first that recognises the path reads it; everything else is read as JSON lines


_PIPED = "Write the dump to a file, or give - and pipe JSON lines in."


def load(path: str | os.PathLike[str], mapping: Mapping | None = None) -> Dump:
    """Read a dump of any known format: JSON lines, eval-callback logs, model debugger trees, .npy, .npz, .safetensors, .pt and the like.

    `mapping` says what foreign names mean and what to add to every position.

    Raises:
        DumpError: it cannot be read, is empty, or a position would become negative.
    """
    given = mapping or Mapping()
    place = Path(path)
    dump_format = _format_of(place) if os.fspath(path) != STDIN else None
    if dump_format is None:
        dump = _with_unknown(given.renamed(reader.read(path)))
    else:
        try:
            dump = dump_format.read(place, given)
        except DumpError as error:
            if str(place) in error.message:
                raise
            raise DumpError(f"{place}: {error.message}", error.advice, code=error.code) from error
    return shifted(dump, given.position_offset) if given.position_offset else dump


def _format_of(place: Path) -> ModuleType | None:
    """The format that recognises a path; None for JSON lines."""
    try:
        require_regular(place, DumpError, _PIPED)
        recognised = next((dump_format for dump_format in _FORMATS if dump_format.detect(place)), None)
        folder = place.is_dir()
    except OSError as error:
        raise DumpError(f"cannot read {place}: {error.strerror}.", "Check the path.", code="no-file") from error
    if recognised is None and folder:
        dumps = sorted(file.name for file in place.glob("*.jsonl"))
        advice = f"Name one of the dumps in it: {', '.join(dumps[:4])}." if dumps else "Name a dump."
        raise DumpError(
            f"{place} is a folder without .npy, .npz, .safetensors or .pt files or a debugger tree.", advice, code="no-file"
        )
    return recognised


_OF_GRAPH = ("llama.cpp", "engine")  # sources whose names are those of llama.cpp's graph


def _with_unknown(dump: Dump) -> Dump:
    """A note on names without meaning; `blk.N.<node>` and `node.<node>`, llama.cpp's own nodes, are names of the open vocabulary."""
    if dump.header is not None and dump.header.source in _OF_GRAPH:
        return dump
    outside = [name for name in dump.points if parse(name).layer is None and not name.removeprefix(ENCODER).startswith("node.")]
    return replace(dump, notes=(*dump.notes, *unknown_names(outside)))


def shifted(dump: Dump, offset: int) -> Dump:
    """The dump with `offset` added to every position, including those of generated tokens.

    Raises:
        DumpError: a position would become negative, or larger than a dump may have.
    """
    recorded = [rows.token_idx for rows in dump.points.values() if len(rows)]
    lowest = min((int(positions.min()) for positions in recorded), default=0)
    highest = max((int(positions.max()) for positions in recorded), default=0)
    if lowest + offset < 0:
        raise DumpError(f"{dump.path}: an offset of {offset} puts position {lowest} below 0.", "Positions count from 0.")
    if highest + offset >= POSITIONS:
        raise DumpError(f"{dump.path}: an offset of {offset} is larger than any position.", "Positions count from 0.")
    points: dict[str, Rows] = {
        name: replace(rows, token_idx=rows.token_idx + np.int64(offset)) for name, rows in dump.points.items()
    }
    tokens = tuple(replace(token, token_idx=token.token_idx + offset) for token in dump.tokens)
    return replace(dump, points=points, tokens=tokens, notes=(*dump.notes, f"positions are shifted by {offset:+d}"))
