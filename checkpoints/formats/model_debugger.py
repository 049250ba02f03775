"""Hugging Face's model debugger (`model_addition_debugger_context(use_repr=False)`): a JSON tree with safetensors beside it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import DumpError
from ..mapping import Mapping
from ..nearest import unknown_names
from ..points import EMBD, in_layer, parse
from ..record import Dump, Rows
from .arrays import rows_of, safetensors

_TREE = "_debug_tree_FULL_TENSORS.json"
_DEEPEST = 200


def _tree(path: Path) -> Path | None:
    if path.is_dir():
        return next(iter(sorted(path.glob(f"*{_TREE}"))), None)
    return path if path.name.endswith(_TREE) else None


def detect(path: Path) -> bool:
    """The tree's file, or the folder that it lies in."""
    return _tree(path) is not None


def read(path: Path, mapping: Mapping) -> Dump:
    """The outputs of all modules whose names are known, and the residual stream from the inputs of the norms.

    Raises:
        DumpError: the tree cannot be read, or holds printed tensors instead of files.
    """
    tree = _tree(path) or path
    try:
        root = json.loads(tree.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DumpError(f"cannot read {tree}: {error}.", "Run the debugger again.", code="tree") from error
    points: dict[str, Rows] = {}
    printed = 0
    for name, value in _values(root, 0):
        file = value.get("value") if isinstance(value, dict) else None
        if not isinstance(file, str):
            printed += isinstance(file, list)
            continue
        point, entry = mapping.entry(name)
        if parse(point).known is None and entry is None:
            continue
        place = tree.parent / Path(file).name  # beside the tree, wherever it says
        try:
            array = next(array for _, array in safetensors(place))
            rows = rows_of(point, mapping.array(entry, array))
        except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
            raise DumpError(f"cannot read {place}: {error}.", "Run the debugger again.", code="array") from error
        if rows is not None:
            points[point] = rows
    if not points:
        advice = "Run it with use_repr=False: printed tensors are abbreviated." if printed else "Give a mapping (--map)."
        raise DumpError(f"{tree} names no known module with a tensor.", advice, code="no-records")
    return Dump(str(path), None, points, notes=unknown_names(points))


def _values(node: Any, depth: int) -> Iterator[tuple[str, Any]]:
    """(name, tensor entry) of a node's outputs and of what enters its norms, then of its children."""
    if not isinstance(node, dict) or depth > _DEEPEST:
        return
    name = str(node.get("module_path", "")).partition(".")[2]
    outputs = node.get("outputs")
    if name:
        yield name, outputs[0] if isinstance(outputs, list) and outputs else outputs
        inputs = node.get("inputs")
        given = inputs.get("args") if isinstance(inputs, dict) else None
        entering = _entering(name)
        if entering is not None and isinstance(given, list) and given:
            yield entering, given[0]
    children = node.get("children")
    for child in children if isinstance(children, list) else []:
        yield from _values(child, depth + 1)


def _entering(name: str) -> str | None:
    """The point of the residual stream that enters a norm: layers' own outputs are not in the tree."""
    parts = name.split(".")
    if len(parts) >= 3 and parts[-3] == "layers" and parts[-2].isdigit():
        layer = int(parts[-2])
        if parts[-1] == "input_layernorm":
            return EMBD if layer == 0 else in_layer(layer - 1, "l_out")
        if parts[-1] == "post_attention_layernorm":
            return in_layer(layer, "ffn_inp")
    return None
