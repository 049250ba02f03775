"""Whatever an engine wrote, read as a dump: one file for each format, with `detect` and `read`."""

import os
from pathlib import Path
from types import ModuleType

import numpy as np
from msgspec.structs import replace

from ..errors import DumpError
from ..mapped import renamed
from ..mapping import Mapping
from ..nearest import unknown_names
from ..points import ENCODER, parse
from ..reading import reader
from ..reading.fields import POSITIONS
from ..record import Dump, Rows
from ..regular import STDIN


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
        dump = _with_unknown(renamed(given, reader.read(path)))
    else:
        try:
            dump = dump_format.read(place, given)
        except DumpError as error:
            if str(place) in error.message:
                raise
            raise DumpError(f"{place}: {error.message}", error.advice, code=error.code) from error
    return shifted(dump, given.position_offset) if given.position_offset else dump


_OWN = b'{"type":"header","format":1,'  # how every dump of ours begins (`checkpoints.jsonl`)
_FIRST_LINE = 1 << 20  # bytes of it in which a header may name a file of arrays


def _is_own(place: Path) -> bool:
    """Whether a file begins as our own lines do: then no other format has to be imported to be asked, which takes as long as reading it."""
    try:
        if not place.is_file():
            return False
        with place.open("rb") as file:
            line = file.readline(_FIRST_LINE)
    except OSError:
        return False
    return line.startswith(_OWN) and line.endswith(b"\n") and b'"columns"' not in line


def _format_of(place: Path) -> ModuleType | None:
    """The format that recognises a path; None for JSON lines."""
    if _is_own(place):
        return None
    from .table import format_of

    return format_of(place)


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
