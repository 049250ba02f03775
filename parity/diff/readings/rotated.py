"""Rows whose pairs have the reference's lengths at other angles: recorded before RoPE, say."""

from collections.abc import Iterator

import numpy as np

from checkpoints.record import Rows

from .readings import MOMENT, Allowed, Floats, Ints, Reading, agree, wide

_PAIRS = 4  # that have to be seen: equal lengths of as many, at every position, are no chance
_HALVES = (64, 128, 32, 96, 80, 16, 256, 112, 48, 40, 24, 8)  # sizes of what is rotated by halves, the usual ones first
# NMSE that the rotation makes at one position at least. A choice: without RoPE's first angle, of one radian, rows of 64 pairs are 6e-2 off
# at position 1. A slightly wrong base or position changes little, and may not be seen in what attention makes of it.
_ROTATION = 1e-2


def before_rope(ours: Rows, ref: Rows, allowed: Allowed, every: Rows) -> Reading | None:
    """The reading as rows that RoPE has not yet rotated: it changes no pair's length, and nothing at position 0.

    A wrong rotation makes such rows, too: only what is made from all of them tells. `every`: all records of the reference's point.
    """
    first = {int(sequence) for sequence in every.seq[every.token_idx == 0]}
    if (ours.token_idx == 0).any() or not first.issuperset(ours.seq.tolist()):
        return None
    width = int(min(ours.counts.min(), ref.counts.min()))
    a, b = wide(ours.values[:, :width]), wide(ref.values[:, :width])
    if not _far(a, b):
        return None
    for pairs, left, right in _pairs(width):
        if agree(np.hypot(a[:, left], a[:, right]), np.hypot(b[:, left], b[:, right]), allowed):
            sentence = f"its pairs ({pairs}) have the right lengths and other angles: before RoPE, or after another rotation"
            return Reading(MOMENT, sentence, relation="before RoPE", own=False, weak=True)
    return None


def _far(a: Floats, b: Floats) -> bool:
    """Whether a row differs by more than a slightly other rotation makes, and not in its signs alone."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        errors = (
            np.sum((left - right) ** 2, axis=1) / np.sum(b * b, axis=1) for left, right in ((a, b), (np.abs(a), np.abs(b)))
        )
        return all(float(np.nanmax(error, initial=0.0)) > _ROTATION for error in errors)


def _pairs(width: int) -> Iterator[tuple[str, Ints, Ints]]:
    """(what is paired, the one elements, the other ones): neighbours, then halves of what is rotated."""
    place = np.arange(width)
    if width // 2 >= _PAIRS:
        even = place[: width // 2 * 2 : 2]
        yield "x[2i] with x[2i + 1]", even, even + 1
    for size in _HALVES:
        if size <= width:
            left = place[: width // size * size].reshape(-1, size)[:, : size // 2].reshape(-1)
            yield f"x[i] with x[i + {size // 2}]", left, left + size // 2
