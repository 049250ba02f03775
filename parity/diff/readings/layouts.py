"""The order of elements, or the part of a row, under which records equal the reference's."""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from checkpoints.points import parse
from checkpoints.record import Rows

from ..measured.whole_rows import sizes
from .readings import LAYOUT, LENGTH, TELLING, Allowed, Ints, Reading, agree, common_length, length, whole

_SAME_STATISTIC = 1e-4  # relative: l2, min and max after an accumulation in float32 differ by less
_MOST_HEADS = 512  # most sizes of heads that are tried
_SIZES = (64, 128, 32, 96, 80, 16, 256)  # of heads, the usual ones first
_ROTATED = ("q", "k")  # begin the names of points whose elements RoPE pairs


def reordered(ours: Rows, ref: Rows, allowed: Allowed, head_size: int | None) -> Reading | None:
    """The reading as rows of the same length whose elements are in another order."""
    size = common_length(ours, ref) or _first_of_cache(ours, ref)
    if size is None:
        return None
    buffered = _positions_last(ours, ref, allowed) or _heads_first(ours, ref, allowed, head_size)
    if buffered is not None or not _same_statistics(ours, ref, allowed):
        return buffered
    for source, sentence, mapping in _orders(size, head_size, is_rotated(ours.point)):
        if _fits(ours, ref, source, allowed):
            return Reading(LAYOUT, sentence, mapping.replace("POINT", ours.point), relation=sentence)
    return None


def _first_of_cache(ours: Rows, ref: Rows) -> int | None:
    """The length of one row of a cache, where records show all rows up to their position, if nothing beyond the first one was recorded of
    ours; else None.
    """
    lengths = np.unique(np.concatenate([known[~np.isnan(known)] for known in map(sizes, (ours, ref))])).astype(int)
    if not len(lengths) or ours.indices is not None:
        return None
    first = int(np.gcd.reduce(lengths))
    return first if len(lengths) > 1 and ours.values.shape[1] <= first else None


def is_rotated(point: str) -> bool:
    """Whether RoPE pairs the elements of a point's rows, by its name."""
    kind = parse(point).kind
    return kind.startswith(_ROTATED) and not kind.startswith("kq")


@lru_cache(maxsize=8)
def _orders(size: int, head_size: int | None, rotated: bool) -> list[tuple[Ints, str, str]]:
    heads = [head_size] if head_size and size % head_size == 0 else []
    heads += [
        d
        for d in (64, 128, 96, 80, 32, 256, *range(4, min(size, _MOST_HEADS) + 1, 2))
        if size % d == 0 and d <= size and d % 2 == 0
    ]
    every = list(dict.fromkeys(heads))
    paired, places = list(pairs(size, every)), list(_places(size, every))
    return [*paired, *places] if rotated else [*places, *paired]  # two interleaved heads look like pairs of neighbours


def pairs(size: int, heads: list[int]) -> Iterator[tuple[Ints, str, str]]:
    """(the element of the reference at each place of ours, the name of that order, the `--map` line): RoPE's pairs stored otherwise."""
    place = np.arange(size)
    for d in heads:
        line = f'"POINT" = {{ point = "POINT", rope_pairs = "KIND", head_size = {d} }}'
        halves = place.reshape(-1, d // 2, 2).swapaxes(1, 2).reshape(-1)
        yield halves, "halves where llama.cpp has neighbours", line.replace("KIND", "neox")
        neighbours = place.reshape(-1, 2, d // 2).swapaxes(1, 2).reshape(-1)
        yield neighbours, "neighbours where llama.cpp has halves", line.replace("KIND", "norm")


def _places(size: int, heads: list[int]) -> Iterator[tuple[Ints, str, str]]:
    """Likewise for whole heads, and for the elements of several heads, in another order."""
    place = np.arange(size)
    for d in heads:
        count = size // d
        if count > 1:
            # The `--map` line for two interleaved heads of d is that of one head of 2·d whose pairs are neighbours.
            line = f'"POINT" = {{ point = "POINT", rope_pairs = "norm", head_size = {size} }}' if count == 2 else ""
            transposed = place.reshape(count, d).T.reshape(-1)
            yield transposed, f"the elements of its {count} heads interleaved (head by head in llama.cpp)", line
            yield place.reshape(d, count).T.reshape(-1), f"heads of {count} side by side where llama.cpp interleaves them", ""
        for groups in (n for n in range(2, count) if count % n == 0):
            grouped = place.reshape(groups, count // groups, d).swapaxes(0, 1).reshape(-1)
            yield grouped, f"its {count} heads in another order: dealt out over {groups} groups", ""
    if size % 2 == 0:
        yield np.roll(place, size // 2), "its two halves exchanged", ""
    yield place[::-1], "its elements in reverse order", ""


def _fits(ours: Rows, ref: Rows, order: Ints, allowed: Allowed) -> bool:
    width = min(ours.values.shape[1], len(order))
    source = order[:width]
    seen = source < ref.values.shape[1]
    if seen.sum() < min(TELLING, len(order)) or (source[seen] == np.flatnonzero(seen)).all():
        return False
    first = agree(ours.values[:1, :width][:, seen], ref.values[:1, source[seen]], allowed.take(np.arange(1)))
    return first and agree(ours.values[:, :width][:, seen], ref.values[:, source[seen]], allowed)


def _consecutive(rows: Rows) -> bool:
    """Whether these are whole rows of at least two positions in a row."""
    return len(rows) > 1 and np.array_equal(rows.token_idx, np.arange(len(rows)) + rows.token_idx[0])


def _positions_last(ours: Rows, ref: Rows, allowed: Allowed) -> Reading | None:
    """The reading as rows of a buffer [elements, positions], taken as if it were [positions, elements]."""
    if not whole(ours, ref) or not _consecutive(ours) or ours.values.shape != ref.values.shape:
        return None
    if not agree(ours.values, ref.values.T.reshape(ref.values.shape), allowed):
        return None
    return Reading(LAYOUT, "positions last: a row of ours is a piece of a buffer [elements, positions], not a position")


def _heads_first(ours: Rows, ref: Rows, allowed: Allowed, head_size: int | None) -> Reading | None:
    """The reading as rows of a buffer in which all positions of the first head come first, taken as if it had one row per position."""
    size, count = common_length(ours, ref), len(ours)
    if size is None or not whole(ours, ref) or not _consecutive(ours) or ours.values.shape != ref.values.shape:
        return None
    for d in dict.fromkeys([*([head_size] if head_size else []), *_SIZES]):
        if size % d == 0 and size > d:
            buffer = ref.values.reshape(count, size // d, d).swapaxes(0, 1).reshape(count, size)
            if agree(ours.values, buffer, allowed):
                return Reading(
                    LAYOUT, f"heads first: a row of ours is a piece of a buffer [heads, positions, {d}], not a position"
                )
    return None


def other_length(ours: Rows, ref: Rows, allowed: Allowed, head_size: int | None) -> Reading | None:
    """The reading as rows that are longer or shorter than the reference's: part of them, padding, or heads that are repeated.

    No operation of the model makes rows of that length, so even rows that cannot be seen to agree count as such records.
    """
    our_length, ref_length = length(ours), length(ref)
    if not our_length or not ref_length or our_length == ref_length:  # damaged rows may have none
        return None
    sentence = f"rows of {our_length:,} elements where llama.cpp has {ref_length:,}"
    for order, what in _parts(our_length, ref_length, head_size):
        if _fits_length(ours, ref, order, allowed):
            return Reading(LENGTH, f"{sentence}: {what}", proof=True)
    return Reading(LENGTH, sentence)


def _parts(our_length: int, ref_length: int, head_size: int | None) -> Iterator[tuple[Ints, str]]:
    """(the element of the reference at each place of ours, -1: padding; what that is)."""
    place = np.arange(ref_length)
    if our_length < ref_length and ref_length % our_length == 0:
        count = ref_length // our_length
        for part in range(count):
            yield (
                place[part * our_length : (part + 1) * our_length],
                f"part {part + 1} of {count}, as one rank of several holds it",
            )
        yield place[::count], f"every {_ordinal(count)} element"
    elif our_length > ref_length and our_length % ref_length == 0:
        copies = our_length // ref_length
        for d in dict.fromkeys([*([head_size] if head_size else []), *_SIZES]):
            if ref_length % d == 0:
                yield place.reshape(-1, 1, d).repeat(copies, axis=1).reshape(-1), f"each head of {d} repeated {copies} times"
        yield np.tile(place, copies), f"the row repeated {copies} times"
    if our_length > ref_length:
        yield (
            np.concatenate([place, np.full(our_length - ref_length, -1)]),
            f"{our_length - ref_length} elements of padding after the row",
        )
        yield (
            np.concatenate([np.full(our_length - ref_length, -1), place]),
            f"{our_length - ref_length} elements before the row",
        )


def _ordinal(number: int) -> str:
    return {2: "second", 3: "third"}.get(number, f"{number}th")


def _fits_length(ours: Rows, ref: Rows, order: Ints, allowed: Allowed) -> bool:
    width = min(ours.values.shape[1], len(order))
    source = order[:width]
    seen = (source >= 0) & (source < ref.values.shape[1])
    if seen.sum() < TELLING:
        return False
    return agree(ours.values[:, :width][:, seen], ref.values[:, source[seen]], allowed)


def _same_statistics(ours: Rows, ref: Rows, allowed: Allowed) -> bool:
    """Whether a reordering is possible: whether all statistics that do not depend on the order agree, as far as rows that are off by what
    is allowed can: neither their l2 nor any element differs by more than the l2 of all differences.
    """
    for name in ("l2", "min", "max"):
        a, b = ours.stats.get(name), ref.stats.get(name)
        if a is not None and b is not None:
            known = ~np.isnan(a) & ~np.isnan(b)
            norm = ref.stats.get("l2", np.abs(b))
            near = np.maximum(_SAME_STATISTIC * np.maximum(np.abs(b), norm * 1e-2), np.sqrt(allowed.nmse) * norm)
            if (np.abs(a - b)[known] > near[known]).any():
                return False
    return True
