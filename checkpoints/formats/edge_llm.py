"""What TensorRT Edge-LLM's layer debugger writes: one safetensors file for each request, with tensors named `round_0.layer_3.kv`.

Round 0 is the prefill, later ones are decode steps. Each has the logits of the last token [B, V], the whole cache of every layer
[B, 2, kv heads, positions, head size], and the valid lengths; the cache holds keys after RoPE.
"""

import re
from collections.abc import Mapping as Named
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DumpError
from ..mapped import mapped
from ..mapping import Mapping
from ..points import LOGITS, in_layer
from ..reading.fields import POSITIONS
from ..record import Dump, Rows, Token
from ..regular import require_regular
from ..summary import summarise
from .arrays import check_size, safetensors

_NAME = re.compile(r"round_(\d{1,7})\.(?:layer_(\d{1,5})\.)?(\w+)")
_HEAD = 1 << 16
_AGAIN = "Dump again with EDGELLM_DUMP_LOGITS_KVCACHE_DIR."


def detect(path: Path) -> bool:
    """A safetensors file whose tensors are named by rounds, or a folder with one file of that name."""
    file = _file(path)
    if file is None or file.suffix != ".safetensors":
        return False
    require_regular(file, DumpError)
    with file.open("rb") as opened:
        return b'"round_0.context_lengths"' in opened.read(_HEAD) or file.name.startswith("edgellm_dump")


def _file(path: Path) -> Path | None:
    return next(iter(sorted(path.glob("edgellm_dump*.safetensors"))), None) if path.is_dir() else path


def read(path: Path, mapping: Mapping) -> Dump:
    """Keys after RoPE and values of every layer, each position from the round that computed it, and the logits of each round.

    Raises:
        DumpError: it cannot be read, or its tensors do not match.
    """
    file = _file(path) or path
    check_size(file)
    try:
        arrays = dict(safetensors(file, integers=True))
        rows, tokens = _rows(arrays, mapping)
    except (OSError, ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError) as error:
        reason = " ".join(str(error).split())[:100]
        raise DumpError(f"cannot read {file}: {reason}.", _AGAIN, code="array") from error
    if not rows:
        raise DumpError(f"{file} has no round with logits or a cache.", _AGAIN, code="no-records")
    return Dump(str(path), None, {name: Rows.stack(parts) for name, parts in rows.items()}, tuple(tokens))


def _rows(arrays: Named[str, NDArray[Any]], mapping: Mapping) -> tuple[dict[str, list[Rows]], list[Token]]:
    rows_of: dict[str, list[Rows]] = {}
    tokens: list[Token] = []
    rounds = sorted({int(match[1]) for name in arrays if (match := _NAME.fullmatch(name))})
    before: dict[int, int] = {}
    for number in rounds:
        prefix = f"round_{number}."
        lengths = [int(n) for n in arrays[f"{prefix}context_lengths"].reshape(-1)]
        if not all(0 < n < POSITIONS for n in lengths):
            raise ValueError(f"round {number} has a context length of {min(lengths, default=0)}")
        for name, array in arrays.items():
            match = _NAME.fullmatch(name)
            if match is None or int(match[1]) != number:
                continue
            for seq, length in enumerate(lengths):
                first = before.get(seq, 0)
                for label, values, positions in _of(match, array, seq, first, length):
                    point, entry = mapping.entry(label)
                    ours = mapped(mapping, entry, np.ascontiguousarray(values, np.float32))
                    rows = summarise(point, ours, positions, step=number, decode=number > 0, slice_size=None, seq=seq)
                    rows_of.setdefault(point, []).append(rows)
        generated = arrays.get(f"{prefix}generated_token_ids")
        if generated is not None:
            ids = generated.reshape(-1)[: len(lengths)]
            tokens += [Token(length, int(ids[seq]), seq=seq) for seq, length in enumerate(lengths[: len(ids)]) if ids[seq] >= 0]
        before = dict(enumerate(lengths))
    return rows_of, tokens


def _of(
    match: "re.Match[str]", array: NDArray[Any], seq: int, first: int, length: int
) -> list[tuple[str, NDArray[Any], NDArray[np.int64]]]:
    """(name, rows, positions) of a tensor for one sequence, for the positions that this round computed."""
    kind = match[3]
    if kind == "logits" and match[2] is None:
        return [(LOGITS, array[seq].reshape(1, -1), np.array([length - 1]))]
    if kind != "kv" or match[2] is None:
        return []
    if array.ndim != 5 or array.shape[1] != 2 or not first < length <= array.shape[3]:
        raise ValueError(f"{match[0]} has shape {list(array.shape)} where {length} positions were computed")
    positions = np.arange(first, length)
    layer = int(match[2])
    parts = ((in_layer(layer, "k_rope"), array[seq, 0]), (in_layer(layer, "v"), array[seq, 1]))
    return [(name, part[:, first:length].transpose(1, 0, 2).reshape(len(positions), -1), positions) for name, part in parts]
