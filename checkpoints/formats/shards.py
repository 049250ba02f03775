"""Tensors of which each process of a tensor-parallel run holds a part, joined."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_PARALLEL = ("tp", "sp", "etp")
_DIM = re.compile(r"[^\s\[]+(?:\[([^\]]*)\])?")


def joined(parts: Sequence[NDArray[Any]], dims: str = "", count: int | None = None) -> tuple[NDArray[Any] | None, str]:
    """The whole tensor, and how it was made: "" for a single part, "the same on all", "joined along axis 1", "summed".

    Args:
        parts: one for each process, in the order of their ranks.
        dims: the axes as SGLang's dumper notes them: "t h[tp] d", "t (h*d)[tp]", "t d[tp:partial]", "t d # tp:replicated"; "" if there
            is no note. Tensors that are split among processes other than those ("t[cp:zigzag]") are not joined.
        count: the number of positions of the pass, if known: it distinguishes the axis of positions from those that are split.

    Returns:
        None, with the reason, if the parts do not match.
    """
    if len(parts) == 1:
        return parts[0], ""
    named = _axis(dims)
    if isinstance(named, str) and named != _SUM:
        return None, f"split along {named}, which is not joined"
    if named == _SUM:
        if len({part.shape for part in parts}) > 1:
            return None, "partial sums of different shapes"
        return np.sum([np.asarray(part, np.float64) for part in parts], axis=0).astype(np.float32), "summed"
    if isinstance(named, int):
        axis: int | None = named if named < parts[0].ndim else None
    elif all(part.shape == parts[0].shape and np.array_equal(part, parts[0], equal_nan=True) for part in parts):
        return parts[0], "the same on all"
    elif dims and named is None and "replicated" in dims:
        return None, "not the same on all processes, although noted as replicated"
    else:
        axis = _tried(parts, count)
    if axis is None:
        return None, "not the same on all processes, and they have no axis along which they can be joined"
    rest = {(*part.shape[:axis], *part.shape[axis + 1 :]) for part in parts}
    if len(rest) > 1:
        return None, f"parts of different shapes beside axis {axis}"
    return np.concatenate(parts, axis=axis), f"joined along axis {axis}"


def joined_and_counted(
    parts: Sequence[NDArray[Any]], notes: dict[str, int], dims: str = "", count: int | None = None
) -> NDArray[Any] | None:
    """The whole tensor of `joined`, None where parts do not fit; `notes` counts the tensors by what was done with them."""
    whole, how = joined(parts, dims, count)
    if how:
        remark = f"shards of {len(parts)} ranks are {how}" if whole is not None else f"left out: {how}"
        notes[remark] = notes.get(remark, 0) + 1
    return whole


_SUM = "sum"


def _axis(dims: str) -> int | str | None:
    """The axis that is split, `_SUM` for partial sums, None if the notes name none; otherwise the name of an unknown kind of split."""
    split: int | str | None = None
    for axis, match in enumerate(_DIM.finditer(dims.partition("#")[0])):
        for modifier in (match[1] or "").split(","):
            name, _, how = modifier.strip().partition(":")
            if not name:
                continue
            if name not in _PARALLEL or (split is not None and split != axis):
                return modifier.strip()[:40]
            split = _SUM if "partial" in how.split("+") else axis
    return split


def _tried(parts: Sequence[NDArray[Any]], count: int | None) -> int | None:
    """The axis along which parts without notes are split: not that of the positions, unless there is no other."""
    first = parts[0]
    if count is not None and first.ndim > 1 and first.shape[0] != count and sum(part.shape[0] for part in parts) == count:
        return 0
    axis = next((axis for axis in range(first.ndim) if len({part.shape[axis] for part in parts}) > 1), None)
    if axis is not None:
        return axis
    if first.ndim < 2:
        return 0 if count is None or len(first) != count else None
    leading = 1 if first.shape[0] == 1 and count not in (None, 1) else 0
    return min(leading + 1, first.ndim - 1)  # heads of [T, heads, size], features of [T, features]
