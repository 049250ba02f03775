"""What TensorRT-LLM's PyTorch backend writes in debug mode: `data_dump/rank0/1.LlamaModel-4.LlamaDecoderLayer-output.0.pt`.

A name is the path of modules, each with its number among its siblings, then "input" or "output" and an argument's name. A
module's arguments are written before and after its call; of the files after it, those that were not there before are its results.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DumpError
from ..mapping import Mapping
from ..nearest import unknown_names
from ..points import EMBD, LOGITS, OUTPUT_NORM, in_layer
from ..record import Dump, Rows
from . import torch_file
from .arrays import rows_of
from .shards import joined_and_counted

_NAME = re.compile(r"((?:\d{1,6}\.[^-]+-)+)(input|output)\.([^-]{1,200})\.pt")
_MODULE = re.compile(r"(\d{1,6})\.([^-]+)-")
_RANK = re.compile(r"rank(\d{1,6})")
_FILES = 1 << 17
_TOTAL = 4 << 30  # bytes of all files
_Path = tuple[tuple[int, str], ...]


@dataclass
class _Module:
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
    points: dict[str, Rows] = {}
    notes: dict[str, int] = {}
    for name, sources in _named(modules):
        arrays = [array for array in (_whole(files, notes) for files in sources) if array is not None]
        if not arrays or len({array.shape for array in arrays}) > 1:
            continue
        point, entry = mapping.entry(name)
        total = arrays[0] if len(arrays) == 1 else np.sum([array.astype(np.float32) for array in arrays], axis=0)
        rows = rows_of(point, mapping.array(entry, total))
        if rows is not None:
            points.setdefault(point, rows)
    if EMBD in points and LOGITS in points and len(points[LOGITS]) == 1:  # logits of the last token only
        points[LOGITS] = replace(points[LOGITS], token_idx=points[EMBD].token_idx[-1:])
    if not points:
        raise DumpError(f"{path} names no module of a decoder.", "Dump the whole model, not one module.", code="no-records")
    remarks = [f"{what}: {count} tensors" for what, count in notes.items()]
    return Dump(str(path), None, points, notes=(*remarks, *unknown_names(points)))


def _whole(files: dict[int, Path], notes: dict[str, int]) -> NDArray[Any] | None:
    values = [torch_file.contents(files[rank]) for rank in sorted(files)]
    if not all(isinstance(value, np.ndarray) and value.dtype.kind == "f" for value in values):
        return None
    return joined_and_counted(values, notes)


def _named(modules: dict[_Path, _Module]) -> Iterator[tuple[str, list[dict[int, Path]]]]:
    """(name, the files whose sum it is) of modules known by their place: layers, their norms, attention and feed-forward."""
    layers = sorted(place for place in modules if place[-1][1].endswith("DecoderLayer"))
    for place, module in sorted(modules.items()):
        kind = place[-1][1]
        if kind.endswith("Embedding") and "rotary" not in kind.lower():
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
