"""A PyTorch tensor as `print` shows it: all of its values, or the first and last three along each axis."""

import re
from collections.abc import Iterator
from math import floor, log10, prod
from typing import Any

import numpy as np
import orjson

from ..reading.fields import number
from ..record import Rows

_SIZES = re.compile(r"torch\.Size\(\[([\d, ]{0,200})\]\)")
_DECIMALS = re.compile(r"\d\.(\d*)(e?)")
_GAP = "..."
_WORD = re.compile(r"-?(?:nan|inf)|\.\.\.")
_BARE_POINT = re.compile(r"(?<=\d)\.(?![\d.])")  # whole numbers are printed as 3.


def printed_rows(point: str, text: str, sizes: str) -> Rows | None:
    """The rows of a printed tensor [T, …], [n] or [1, T, …], positions from 0; None if it has none of these shapes.

    `sizes` is its shape as PyTorch writes it, "torch.Size([1, 9, 64])".

    Raises:
        ValueError: text and shape do not agree, or it is not a tensor.
    """
    given = _SIZES.fullmatch(sizes)
    if given is None:
        raise ValueError("its shape is not a torch.Size")
    shape = tuple(int(size) for size in given[1].split(",") if size.strip())
    body = text[text.index("[") : text.rindex("]") + 1]
    decimals = _DECIMALS.search(body)
    if decimals is None or not shape or not all(shape) or prod(shape) >= 1 << 40:
        return None
    nested = orjson.loads(_WORD.sub(r'"\g<0>"', _BARE_POINT.sub(".0", body)))
    elements: dict[int, dict[int, float]] = {}
    width = prod(shape[1:]) if len(shape) == 2 else prod(shape[2:]) if len(shape) > 2 else shape[0]
    if len(shape) > 2 and shape[0] != 1:
        return None
    for place, value in _walk(nested, shape):
        at = int(np.ravel_multi_index(place, shape))
        elements.setdefault(at // width, {})[at % width] = value
    return _rows(point, elements, width, len(decimals[1]), scientific=bool(decimals[2]))


def _walk(node: Any, shape: tuple[int, ...], before: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], float]]:
    """(index, value) of every value in nested lists of that shape, in which a gap marks omitted values."""
    if len(before) == len(shape):
        yield before, number(node)
        return
    size = shape[len(before)]
    if not isinstance(node, list):
        raise ValueError("its lists are not nested as deeply as its shape says")  # noqa: TRY004  # a file's fault, not a caller's
    gap = node.index(_GAP) if _GAP in node else len(node)
    if len(node) > size + (gap < len(node)) or (gap == len(node) and gap != size):
        raise ValueError("its lists do not have the length that its shape says")
    for i, child in enumerate(node):
        if i != gap:
            yield from _walk(child, shape, (*before, i if i < gap else size - (len(node) - i)))


def _rows(point: str, elements: dict[int, dict[int, float]], width: int, decimals: int, *, scientific: bool) -> Rows:
    positions = sorted(elements)
    counts = np.array([len(elements[position]) for position in positions], dtype=np.int64)
    values = np.full((len(positions), int(counts.max())), np.nan)
    indices = np.full(values.shape, -1, dtype=np.int64)
    for r, position in enumerate(positions):
        values[r, : counts[r]] = list(elements[position].values())
        indices[r, : counts[r]] = list(elements[position])
    step = [_step(value, decimals, scientific=scientific) for value in values.ravel().tolist()]
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
    return Rows(
        point=point,
        seq=np.zeros(len(positions), dtype=np.int64),
        token_idx=np.array(positions, dtype=np.int64),
        step=np.zeros(len(positions), dtype=np.int64),
        decode=np.zeros(len(positions), dtype=np.bool_),
        shapes=((width,),) * len(positions),
        values=single,
        counts=counts,
        indices=None if (counts == width).all() else indices,
        quantum=np.array(step).reshape(values.shape),
    )


def _step(value: float, decimals: int, *, scientific: bool) -> float:
    """The step of the last decimal; 0 for a value without one (NaN, infinite, an exact 0)."""
    if not np.isfinite(value) or not value:
        return 0.0
    return float(10.0 ** (floor(log10(abs(value))) * scientific - decimals))
