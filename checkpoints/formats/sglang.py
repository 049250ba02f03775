"""What SGLang writes: its dumper's files, one for each tensor and rank, and its tensor hook's, one for each forward pass and rank.

    dump_20261101_…/step=0___rank=1___dump_index=7___name=attn_out___layer_id=3.pt      {"value": tensor, "meta": {"dims": "t h[tp]"}}
    TP0_PP0_Rank0_pid4711/Pass00000.pt                                                  {"model.layers.0.self_attn.o_proj": tensor}

Shards of tensor-parallel ranks are joined along the noted dims, or along an axis found by trying. Positions, sequences and token ids
come from the `positions` and `input_ids` of the same pass, if they were dumped. The hook writes a pass's file when `model` returns: what
comes after it, above all the logits, is in the next pass's file. A layer returns its output as two tensors, whose sum it is.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct, field
from numpy.typing import NDArray

from ..errors import DumpError
from ..mapped import mapped
from ..mapping import Mapping
from ..nearest import unknown_names
from ..points import LOGITS
from ..reading.fields import POSITIONS
from ..record import Dump, Header, Rows, Token
from ..summary import summarise
from . import torch_file
from .arrays import rows_of
from .shards import joined_and_counted

_TAG = re.compile(r"(\w+)=(.*)", re.DOTALL)
_RANK = re.compile(r"TP(\d{1,5})_PP(\d{1,5})_Rank(\d{1,6})_pid\d+")
_PASS = re.compile(r"Pass(\d{1,9})\.pt")
_OLD_RANK = re.compile(r"sglang_dump_.*_(\d{1,6})")
_HOOKED = "non_intrusive__"
_RETURNED = re.compile(
    r"(?:(.+)\.)?output(?:\.(\d{1,3}|next_token_logits))?"
)  # of a module: its tensor, one of several, or the logits
_NO_ACTIVATION = ("param__", "grad__")
_LAYER = re.compile(r"(?:.+\.)?layers\.\d{1,9}")
_RESIDUAL = " + residual"  # after a layer's name: the second tensor that it returns
_FILES = 1 << 17  # files of a folder: 60 layers, 20 tensors, 8 ranks, 10 steps
_TOTAL = 4 << 30  # bytes of all of them
_LARGEST_NUMBER = 1 << 40
_AGAIN = "Dump again, into an empty folder."


class _Tensor(Struct):
    """One tensor of one pass: its parts by rank; `number` is its place in the order of dumping."""

    name: str
    parts: dict[int, NDArray[Any]] = field(default_factory=dict)
    dims: str = ""


def detect(path: Path) -> bool:
    """One of its files by name, or a folder that contains some, directly or in the folders of ranks."""
    if not path.is_dir():
        return path.suffix == ".pt" and ("___name=" in path.name or bool(_PASS.fullmatch(path.name)))
    return next(_files(path), None) is not None


def _files(path: Path) -> Iterator[Path]:
    folders = [path, *(child for child in sorted(path.iterdir()) if child.is_dir())] if path.is_dir() else []
    for folder in folders:
        for file in sorted(folder.iterdir()):
            if file.suffix == ".pt" and ("name=" in file.name or _PASS.fullmatch(file.name)):
                yield file


def read(path: Path, mapping: Mapping) -> Dump:
    """All tensors whose rows are positions, the shards of ranks joined.

    Raises:
        DumpError: a file cannot be read, or there is no tensor of activations.
    """
    files = list(_files(path)) if path.is_dir() else [path]
    if len(files) > _FILES or sum(file.stat().st_size for file in files) > _TOTAL:
        raise DumpError(f"{path} holds {len(files):,} files, or more than 4 GiB.", "Dump fewer layers or steps.", code="array")
    passes: dict[int, dict[str, _Tensor]] = {}
    for file in files:
        _collected(file, passes)
    points: dict[str, list[Rows]] = {}
    notes: dict[str, int] = {}
    tokens: list[int] = []
    generated: list[Token] = []
    for number, (_, tensors) in enumerate(sorted(passes.items())):
        places = _Places.of(tensors)
        if places.tokens and places.begin == len(tokens) + len(generated):  # the prompt, a further part of it, or a decode step
            if number and len(places.tokens) == 1:
                generated.append(Token(places.begin, places.tokens[0]))
            elif not generated:
                tokens += places.tokens
        for tensor in tensors.values():
            if tensor.name.endswith(_RESIDUAL):
                continue
            rows = _rows(tensor, tensors.get(tensor.name + _RESIDUAL), number, places, mapping, notes)
            if rows is not None:
                points.setdefault(rows.point, []).append(rows)
    if not points:
        raise DumpError(f"{path} holds no tensor of activations.", "Dump layers' outputs by name.", code="no-records")
    stacked = {name: Rows.stack(parts) for name, parts in points.items()}
    remarks = [f"{remark}: {count} tensors" for remark, count in notes.items()]
    header = Header("sglang", tokens=tuple(tokens)) if tokens else None
    return Dump(str(path), header, stacked, tuple(generated), notes=(*remarks, *unknown_names(stacked)))


def _collected(file: Path, passes: dict[int, dict[str, _Tensor]]) -> None:
    """Add the contents of a file to its pass."""
    value = torch_file.contents(file)
    if (named := _PASS.fullmatch(file.name)) is not None:
        rank = _RANK.fullmatch(file.parent.name)
        for name, array in torch_file.named(value, file.stem):
            number = int(named[1]) - (not name.startswith("model."))
            if number < 0 or name == "model":  # of a pass before the first; the norm's output once more
                continue
            known = LOGITS if name == "logits_processor" else name
            passes.setdefault(number, {}).setdefault(known, _Tensor(known)).parts[int(rank[3]) if rank else 0] = array
        return
    tags = {str(match[1]): str(match[2]) for part in file.stem.split("___") if (match := _TAG.fullmatch(part))}
    meta = value.get("meta") if isinstance(value, dict) else None
    meta = meta if isinstance(meta, dict) else {}
    given = value.get("value") if isinstance(value, dict) else value
    if not isinstance(given, np.ndarray) or "name" not in tags:
        return
    old = _OLD_RANK.fullmatch(file.parent.name)
    rank_number = _number(tags.get("rank", old[1] if old else "0"))
    step = _number(tags.get("step", tags.get("forward_pass_id", "0")))
    label = _label(tags["name"], tags.get("layer_id", ""))
    if label is None:
        return
    tensor = passes.setdefault(step, {}).setdefault(label, _Tensor(label))
    tensor.parts[rank_number] = given
    dims = meta.get("dims")
    tensor.dims = dims if isinstance(dims, str) else tensor.dims


def _number(text: str) -> int:
    return min(int(text), _LARGEST_NUMBER) if text.isascii() and text.isdigit() and len(text) < 20 else 0


def _label(name: str, layer: str) -> str | None:
    """The name to look up: with its layer, without what the dumper's hooks add to a module's name; None for anything that is not an
    activation: inputs, parameters, gradients.
    """
    if name.startswith(_NO_ACTIVATION):
        return None
    if name.startswith(_HOOKED):
        returned = _RETURNED.fullmatch(name.removeprefix(_HOOKED))
        if returned is None:
            return None
        module, which = returned[1], returned[2]
        if which == "next_token_logits":
            return LOGITS
        if module is None or which not in (None, "0", "1") or (which == "1" and not _LAYER.fullmatch(module)):
            return None
        name = module + _RESIDUAL * (which == "1")
    if layer.isascii() and layer.isdigit() and "layers." not in name and not name.startswith("blk."):
        return f"layers.{int(layer[:9])}.{name}"
    return name


class _Places(Struct, frozen=True):
    """Where the rows of a pass belong: their positions and sequences, None if those were not dumped.

    `tokens` are the ids of sequence 0 from position `begin` on, () if they were not dumped.
    """

    positions: NDArray[np.int64] | None
    seq: NDArray[np.int64] | None
    tokens: tuple[int, ...]
    begin: int = 0

    @staticmethod
    def of(tensors: dict[str, _Tensor]) -> "_Places":
        """From what the pass itself dumped."""

        def integers_of(ending: str) -> NDArray[np.int64] | None:
            tensor = next((t for name, t in tensors.items() if name.rpartition(".")[2] == ending and t.parts), None)
            array = None if tensor is None else tensor.parts[min(tensor.parts)]
            usable = array is not None and array.ndim == 1 and array.dtype.kind in "iu" and array.size
            return np.asarray(array, np.int64) if usable else None

        positions, ids, lengths = integers_of("positions"), integers_of("input_ids"), integers_of("seq_lens")
        if positions is not None and not ((positions >= 0) & (positions < POSITIONS)).all():
            positions = None
        if positions is None:
            return _Places(None, None, ())
        begins = np.diff(positions, prepend=positions[0] - 1) != 1
        each = lengths is not None and len(lengths) == len(positions)  # a decode step: one token of every sequence
        seq = np.arange(len(positions)) if each else np.cumsum(begins)
        tokens = tuple(ids[seq == 0].tolist()) if ids is not None and len(ids) == len(positions) else ()
        return _Places(positions, seq, tokens if min(tokens, default=0) >= 0 else (), int(positions[0]))


def _rows(
    tensor: _Tensor, residual: _Tensor | None, step: int, places: _Places, mapping: Mapping, notes: dict[str, int]
) -> Rows | None:
    """The records of a tensor, to which `residual` is added."""
    point, entry = mapping.entry(tensor.name)
    layered = re.fullmatch(r"(?:.*\.)?layers\.(\d{1,9})\.(.+)", point)
    if layered:  # a name outside the vocabulary: a node of that layer
        point = f"blk.{int(layered[1])}.{layered[2]}"
    count = None if places.positions is None else len(places.positions)
    whole = _whole(tensor, notes, count)
    if whole is not None and residual is not None:
        added = _whole(residual, notes, count)
        whole = whole.astype(np.float32) + added if added is not None and added.shape == whole.shape else None
    if whole is None:
        return None
    rows = rows_of(point, mapped(mapping, entry, whole), step)
    if rows is None or places.positions is None or places.seq is None:
        return rows
    if len(rows) == len(places.positions):
        values = np.ascontiguousarray(rows.values)
        return _at(point, values, places.positions, places.seq, step)
    last = np.flatnonzero(np.append(np.diff(places.seq) != 0, True))  # logits: the last token of every sequence
    if len(rows) == len(last):
        return _at(point, rows.values, places.positions[last], places.seq[last], step)
    return rows


def _whole(tensor: _Tensor, notes: dict[str, int], count: int | None) -> NDArray[Any] | None:
    """A tensor of floating-point numbers, its ranks' parts joined; None where it is none, or they do not fit."""
    parts = [tensor.parts[rank] for rank in sorted(tensor.parts)]
    if any(part.dtype.kind != "f" for part in parts):
        return None
    return joined_and_counted(parts, notes, tensor.dims, count)


def _at(point: str, values: NDArray[np.float32], positions: NDArray[np.int64], seq: NDArray[np.int64], step: int) -> Rows:
    """Rows at given positions of given sequences."""
    parts = [
        summarise(
            point,
            values[seq == sequence],
            positions[seq == sequence],
            step=step,
            decode=step > 0,
            slice_size=None,
            seq=int(sequence),
        )
        for sequence in np.unique(seq)
    ]
    return Rows.stack(parts)
