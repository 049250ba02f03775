"""What a wrong file or loader does to one weight: parts in another order, data read from elsewhere or as another type, one expert's matrix
in another's place.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, permutations

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

F32, F16, BF16 = 0, 1, 30  # enum ggml_type
Weight = NDArray[np.float32]
Change = Callable[[Weight], Weight]

_PARTS = {2: "halves", 4: "quarters", 8: "eighths"}
_ALL_ORDERS = 4  # parts up to which every order is tried; of more parts two are exchanged, or all are moved on
_SHIFTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # elements: single ones, aligned heads of files, blocks
_TAPS = 8  # elements of a row up to which they are the taps of a convolution
_SINGLE = 64  # elements of a vector up to which any two are exchanged: sinks, norms of heads


class Changed(Struct, frozen=True):
    """One change of a weight.

    Attributes:
        sentence: what is said of it. change: what it does.
        inside: the same with zeros for what would come from outside of the weight, where something would.
        rows: it moves whole rows, or elements of a vector: of those that were not recorded nothing is known.
    """

    sentence: str
    change: Change
    inside: Change | None = None
    rows: bool = False


def changes(shape: Sequence[int], kind: int) -> Iterator[Changed]:
    """The changes that a weight of this shape can have, as NumPy orders its dimensions, and of this type of ggml's."""
    last, first = len(shape) - 1, 0
    if len(shape) == 2 and shape[last] <= _TAPS:
        for pair in combinations(range(shape[last]), 2):
            yield Changed(f"taps {pair[0]} and {pair[1]} are exchanged", _in_order(_swapped(pair, shape[last]), last))
    elif len(shape) == 1:
        yield from _reordered(shape[0], first, "", rows=True)
        for pair in combinations(range(shape[0]) if shape[0] <= _SINGLE else (), 2):
            yield Changed(f"elements {pair[0]} and {pair[1]} are exchanged", _in_order(_swapped(pair, shape[0]), first))
    else:
        yield from _reordered(shape[last], last, " of each row", rows=False)
        whose = " of its rows" if len(shape) == 2 else " of each expert's rows"
        yield from _reordered(shape[-2], last - 1, whose, rows=True)
    for by in (sign * count for count in _SHIFTS if 2 * count < shape[last] for sign in (1, -1)):
        elements = "1 element" if abs(by) == 1 else f"{abs(by)} elements"
        yield Changed(f"read from {elements} too {'early' if by > 0 else 'late'}", _rolled(by), _moved(by))
    yield from _as_other_type(kind)


def in_place_of(count: int, some: Sequence[int]) -> Iterator[Changed]:
    """Of a weight with a matrix for each of so many experts: two of some of them exchanged; for some, another one's in its place."""
    for pair in combinations(some, 2):
        yield Changed(f"experts {pair[0]} and {pair[1]} are exchanged", _in_order(_swapped(pair, count), 0))
    for expert in some:
        for other in (number for number in range(count) if number != expert):
            order = [other if number == expert else number for number in range(count)]
            yield Changed(f"expert {other}'s matrix stands in expert {expert}'s place", _in_order(order, 0))


def taps(shape: Sequence[int]) -> range:
    """The taps of a convolution's weight; none if it is another weight."""
    return range(shape[-1] if len(shape) == 2 and shape[-1] <= _TAPS else 0)


def _reordered(size: int, axis: int, of: str, *, rows: bool) -> Iterator[Changed]:
    """Equal parts along an axis in another order."""
    for count, name in _PARTS.items():
        if size % count or size // count < 2:
            continue
        for order in _orders(count):
            what = "are exchanged" if count == 2 else f"stand in the order {', '.join(map(str, order))}"
            elements = np.arange(size).reshape(count, -1)[order].reshape(-1)
            yield Changed(f"the {name}{of} {what}", _in_order(elements.tolist(), axis), rows=rows)


def _orders(count: int) -> Iterator[list[int]]:
    """Orders of so many parts, but for those of parts twice as large."""
    if count <= _ALL_ORDERS:
        halves = [[2, 3, 0, 1]] if count == 4 else []
        yield from (order for order in map(list, permutations(range(count))) if order != sorted(order) and order not in halves)
        return
    yield from (_swapped(pair, count) for pair in combinations(range(count), 2))
    yield from ([(number + by) % count for number in range(count)] for by in range(1, count, 2))


def _swapped(pair: Sequence[int], count: int) -> list[int]:
    order = list(range(count))
    order[pair[0]], order[pair[1]] = pair[1], pair[0]
    return order


def _in_order(order: Sequence[int], axis: int) -> Change:
    return lambda weight: np.take(weight, order, axis=axis)


def _rolled(by: int) -> Change:
    return lambda weight: np.roll(weight.reshape(-1), by).reshape(weight.shape)


def _moved(by: int) -> Change:
    def change(weight: Weight) -> Weight:
        flat = np.roll(weight.reshape(-1), by)
        flat[slice(0, by) if by > 0 else slice(by, None)] = 0
        return flat.reshape(weight.shape)

    return change


def _as_other_type(kind: int) -> Iterator[Changed]:
    """A weight whose numbers are read with their bytes in the other order, or one 16-bit type as the other one."""
    if kind == F32:
        yield Changed("the bytes of its numbers are read in the other order", lambda weight: weight.byteswap())
    elif kind == F16:
        yield Changed(
            "the bytes of its numbers are read in the other order",
            lambda weight: weight.astype(np.float16).byteswap().astype(np.float32),
        )
        yield Changed(
            "F16 is read as BF16", lambda weight: _widened(weight.astype(np.float16).view(np.uint16)).reshape(weight.shape)
        )
    elif kind == BF16:
        yield Changed(
            "the bytes of its numbers are read in the other order",
            lambda weight: _widened(_halves(weight).byteswap()).reshape(weight.shape),
        )
        yield Changed("BF16 is read as F16", lambda weight: _halves(weight).view(np.float16).astype(np.float32))


def _halves(weight: Weight) -> NDArray[np.uint16]:
    return (np.ascontiguousarray(weight).view(np.uint32) >> 16).astype(np.uint16)


def _widened(halves: NDArray[np.uint16]) -> Weight:
    return (halves.astype(np.uint32) << 16).view(np.float32)
