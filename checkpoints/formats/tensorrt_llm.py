"""What TensorRT-LLM's PyTorch backend writes in debug mode: `data_dump/rank0/1.LlamaModel-4.LlamaDecoderLayer-output.0.pt`.

A name is the path of modules, each with its number among its siblings, then "input" or "output" and an argument's name. Around a
module its arguments are written before and after; of the files after it, those that were not there before are what it returned. The
outermost modules are numbered on from one forward pass to the next.
"""

import re
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct, field
from msgspec.structs import replace
from numpy.typing import NDArray

from ..errors import DumpError
from ..mapped import mapped
from ..mapping import Mapping
from ..nearest import unknown_names
from ..points import EMBD, LOGITS, OUTPUT_NORM, in_layer, parse
from ..record import Dump, Header, Rows
from . import torch_file
from .arrays import rows_of
from .shards import joined_and_counted

_NAME = re.compile(r"((?:\d{1,6}\.[^-]+-)+)(input|output)\.([^-]{1,200})\.pt")
_MODULE = re.compile(r"(\d{1,6})\.([^-]+)-")
_RANK = re.compile(r"rank(\d{1,6})")
_LAYER = "DecoderLayer"
_FILES = 1 << 17
_TOTAL = 4 << 30  # bytes of all files
_Path = tuple[tuple[int, str], ...]


class _Module(Struct):
    """The files of a module's arguments and of its results, by rank and argument."""

    inputs: dict[str, dict[int, Path]] = field(default_factory=dict)
    outputs: dict[str, dict[int, Path]] = field(default_factory=dict)

    @property
    def returned(self) -> list[dict[int, Path]]:
        """Its results, by rank."""
        return [files for name, files in self.outputs.items() if name not in self.inputs]

    @property
    def given(self) -> list[dict[int, Path]]:
        """Its arguments, by rank."""
        return list(self.inputs.values())


def detect(path: Path) -> bool:
    """One of its files by name, the folder of a rank, or the folder above that."""
    if not path.is_dir():
        return bool(_NAME.fullmatch(path.name))
    return next(_files(path), None) is not None


def _files(path: Path) -> Iterator[tuple[int, Path]]:
    ranks = [
        (int(match[1]), child) for child in sorted(path.iterdir()) if (match := _RANK.fullmatch(child.name)) and child.is_dir()
    ]
    own = _RANK.fullmatch(path.name)
    for rank, folder in ranks or [(int(own[1]) if own else 0, path)]:
        for file in sorted(folder.iterdir()):
            if _NAME.fullmatch(file.name):
                yield rank, file


def read(path: Path, mapping: Mapping) -> Dump:
    """The modules of a decoder by their place in the layer, with the shards of ranks joined.

    Raises:
        DumpError: a file cannot be read, or it has no module that is known here.
    """
    files = list(_files(path)) if path.is_dir() else [(0, path)]
    if len(files) > _FILES or sum(file.stat().st_size for _, file in files) > _TOTAL:
        raise DumpError(f"{path} holds {len(files):,} files, or more than 4 GiB.", "Dump fewer modules.", code="array")
    modules: dict[_Path, _Module] = {}
    for rank, file in files:
        match = _NAME.fullmatch(file.name)
        assert match is not None  # `_files` and `detect` asked the same
        place = tuple((int(number), name) for number, name in _MODULE.findall(match[1]))
        module = modules.setdefault(place, _Module())
        (module.inputs if match[2] == "input" else module.outputs).setdefault(match[3], {})[rank] = file
    points: dict[str, list[Rows]] = {}
    notes: dict[str, int] = {}
    tokens: list[int] = []
    begin = 0
    for number, part in enumerate(_passes(modules)):
        rows = _rows(part, number, begin, mapping, notes)
        ids = _ids(part)
        if len(tokens) == begin:
            tokens += ids
        begin += max((len(several) for name, several in rows.items() if name == EMBD or parse(name).kind == "l_out"), default=0)
        for name, several in rows.items():
            points.setdefault(name, []).append(several)
    if not points:
        raise DumpError(f"{path} names no module of a decoder.", "Dump the whole model, not one module.", code="no-records")
    stacked = {name: Rows.stack(several) for name, several in points.items()}
    remarks = [f"{remark}: {count} tensors" for remark, count in notes.items()]
    header = Header("tensorrt-llm", tokens=tuple(tokens)) if tokens and len(tokens) == begin else None
    return Dump(str(path), header, stacked, notes=(*remarks, *unknown_names(stacked)))


def _passes(modules: dict[_Path, _Module]) -> list[dict[_Path, _Module]]:
    """The modules of each forward pass: one begins at every outermost module, but the first, that has layers in it."""
    models = sorted({place[0] for place in modules if len(place) > 1 and place[-1][1].endswith(_LAYER)})
    passes: list[dict[_Path, _Module]] = [{} for _ in models] or [{}]
    for place, module in modules.items():
        passes[max(bisect_right(models, place[0]) - 1, 0)][place] = module
    return passes


def _rows(modules: dict[_Path, _Module], number: int, begin: int, mapping: Mapping, notes: dict[str, int]) -> dict[str, Rows]:
    """The records of one forward pass, whose first position is `begin`."""
    points: dict[str, Rows] = {}
    for name, sources in _named(modules):
        arrays = [array for array in (_whole(files, notes) for files in sources) if array is not None]
        if not arrays or len({array.shape for array in arrays}) > 1:
            continue
        point, entry = mapping.entry(name)
        total = arrays[0] if len(arrays) == 1 else np.sum([array.astype(np.float32) for array in arrays], axis=0)
        rows = rows_of(point, mapped(mapping, entry, total), number, begin)
        if rows is not None:
            points.setdefault(point, rows)
    if EMBD in points and LOGITS in points and len(points[LOGITS]) == 1:  # logits of the last token only
        points[LOGITS] = replace(points[LOGITS], token_idx=points[EMBD].token_idx[-1:])
    return points


def _ids(modules: dict[_Path, _Module]) -> list[int]:
    """The token ids that the embedding was given; none where they were not dumped."""
    for place, module in sorted(modules.items()):
        if _is_embedding(place[-1][1]):
            for files in module.given:
                value = torch_file.contents(files[min(files)])
                if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and value.size and (value >= 0).all():
                    return [int(n) for n in value.ravel()]
    return []


def _is_embedding(kind: str) -> bool:
    return kind.endswith("Embedding") and "rotary" not in kind.lower()


def _whole(files: dict[int, Path], notes: dict[str, int]) -> NDArray[Any] | None:
    values = [torch_file.contents(files[rank]) for rank in sorted(files)]
    if not all(isinstance(value, np.ndarray) and value.dtype.kind == "f" for value in values):
        return None
    return joined_and_counted(values, notes)


def _named(modules: dict[_Path, _Module]) -> Iterator[tuple[str, list[dict[int, Path]]]]:
    """(name, the files whose sum it is) of what is known by its place: layers, their norms, attention and feed-forward."""
    layers = sorted(place for place in modules if place[-1][1].endswith(_LAYER))
    for place, module in sorted(modules.items()):
        kind = place[-1][1]
        if _is_embedding(kind):
            yield EMBD, module.returned[:1]
        elif kind in ("LMHead", "LogitsProcessor"):
            yield LOGITS, module.returned[:1]
        elif kind.endswith("Norm") and not any(place[: len(layer)] == layer for layer in layers):
            yield OUTPUT_NORM, module.returned[:1]
    for number, layer in enumerate(layers):
        # A layer may return its output in two parts, hidden states and residual: their sum is the residual stream.
        yield in_layer(number, "l_out"), modules[layer].returned[:2]
        inside = sorted(place for place in modules if len(place) == len(layer) + 1 and place[: len(layer)] == layer)
        norms = [place for place in inside if place[-1][1].endswith("Norm")]
        for name, place in zip(("attn_norm", "ffn_norm"), norms, strict=False):
            yield in_layer(number, name), modules[place].returned[:1]
        for place in inside:
            kind = place[-1][1].lower()
            linears = sorted(p for p in modules if p[: len(place)] == place and p[-1][1].endswith("Linear"))
            attention = kind.endswith("attention")
            if not (attention or kind.endswith("mlp")):
                continue
            yield in_layer(number, "attn_out" if attention else "ffn_out"), modules[place].returned[:1]
            if linears:
                yield in_layer(number, "kqv_out" if attention else "ffn_swiglu"), modules[linears[-1]].given[:1]
