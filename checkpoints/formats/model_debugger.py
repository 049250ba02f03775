"""Hugging Face's model debugger (`model_addition_debugger_context`): a JSON tree of modules.

With `use_repr=False` tensors are stored beside it as safetensors; otherwise they are printed in it, long ones in part.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import DumpError
from ..mapped import mapped
from ..mapping import MapEntry, Mapping
from ..nearest import unknown_names
from ..nesting import parsed
from ..points import EMBD, in_layer, parse
from ..record import Dump, Rows
from ..regular import read_text
from .arrays import rows_of, safetensors
from .torch_text import printed_rows

_TREE, _SUMMARY = "_debug_tree_FULL_TENSORS.json", "_debug_tree_SUMMARY.json"
_LAYER = re.compile(r'"module_path": ?"[^"]{0,200}\.layers\.(\d{1,6})"')
_LARGEST = 1 << 30  # bytes of a tree: it may hold printed tensors
_DEEPEST = 200  # modules in modules; real trees have some ten, and Python stops at a thousand calls


def _tree(path: Path) -> Path | None:
    if path.is_dir():
        return next(iter(sorted(path.glob(f"*{_TREE}"))), None)
    return path if path.name.endswith((_TREE, _SUMMARY)) else None


def detect(path: Path) -> bool:
    """The tree's file, or its folder."""
    return _tree(path) is not None


def read(path: Path, mapping: Mapping) -> Dump:
    """The outputs of all modules whose names are known, and the residual stream from the inputs of the norms.

    Raises:
        DumpError: the tree cannot be read, or holds no tensor of a known module.
    """
    tree = _tree(path) or path
    try:
        text = read_text(tree, _LARGEST)
        root = parsed(json.loads, text)
    except (OSError, ValueError) as error:
        raise DumpError(f"cannot read {tree}: {error}.", "Run the debugger again.", code="tree") from error
    points: dict[str, Rows] = {}
    notes: list[str] = []
    layers = max((int(number) + 1 for number in _LAYER.findall(text)), default=0)
    for name, value in _values(root, layers):
        if not isinstance(value, dict):
            continue
        point, entry = mapping.entry(name)
        if parse(point).known is None and entry is None:
            continue
        given = value.get("value")
        if isinstance(given, list):
            rows = _printed(tree, point, value, entry)
            notes = ["values are printed to a few decimals, and only part of long tensors (use_repr=False writes all)"]
        elif isinstance(given, str):
            place = tree.parent / Path(given).name  # beside the tree, whatever path is given
            try:
                array = next(array for _, array in safetensors(place))
                rows = rows_of(point, mapped(mapping, entry, array))
            except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError, StopIteration) as error:
                raise DumpError(f"cannot read {place}: {error}.", "Run the debugger again.", code="array") from error
        else:
            continue
        if rows is not None:
            points[point] = rows
    if not points:
        advice = (
            "The values are in the file …_FULL_TENSORS.json." if tree.name.endswith(_SUMMARY) else "Give a mapping (--map)."
        )
        raise DumpError(f"{tree} names no known module with a tensor.", advice, code="no-records")
    return Dump(str(path), None, points, notes=(*notes, *unknown_names(points)))


def _printed(tree: Path, point: str, value: dict[str, Any], entry: MapEntry | None) -> Rows | None:
    if entry is not None and entry.changes:
        raise DumpError(f"{tree}: {point} is printed, not written whole.", "Run the debugger with use_repr=False.", code="map")
    try:
        return printed_rows(point, "".join(map(str, value["value"])), str(value.get("shape")))
    except (ValueError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:100]
        raise DumpError(f"{tree}: cannot read {point}: {reason}.", "Run the debugger again.", code="tree") from error


def _values(node: Any, layers: int, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """(name, tensor entry) of a node's outputs and of what enters its norms, then of its children."""
    if not isinstance(node, dict) or depth > _DEEPEST:
        return
    name = str(node.get("module_path", "")).partition(".")[2]
    outputs = node.get("outputs")
    if name:
        yield name, outputs[0] if isinstance(outputs, list) and outputs else outputs
        inputs = node.get("inputs")
        given = inputs.get("args") if isinstance(inputs, dict) else None
        entering = _entering(name, layers)
        if entering is not None and isinstance(given, list) and given:
            yield entering, given[0]
    children = node.get("children")
    for child in children if isinstance(children, list) else []:
        yield from _values(child, layers, depth + 1)


def _entering(name: str, layers: int) -> str | None:
    """The point of the residual stream that is the input of a norm: layers' own outputs are not in the tree."""
    parts = name.split(".")
    if len(parts) >= 3 and parts[-3] == "layers" and re.fullmatch(r"\d{1,6}", parts[-2]):
        layer = int(parts[-2])
        if parts[-1] == "input_layernorm":
            return EMBD if layer == 0 else in_layer(layer - 1, "l_out")
        if parts[-1] == "post_attention_layernorm":
            return in_layer(layer, "ffn_inp")
    return in_layer(layers - 1, "l_out") if layers and parts[-2:] == ["model", "norm"] else None
