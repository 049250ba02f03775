"""Sizes as expressions of the number of tokens T and of cached positions S, from the numbers of several passes."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def over_a_cache(numbers: NDArray[np.int64], counts: Sequence[int], cached: Sequence[int]) -> NDArray[np.int64]:
    """Sizes as expressions of T and S, from passes over (T1, S1), (T2, S1), (T1, S2), (T2, S2): int64 [tensors, 9, 7]."""
    (a, b, c, d), t, s = numbers[:4], counts[0], cached[0]
    dt, ds = counts[1] - t, max(cached[2] - s, 1)
    product = (d - c - b + a) // (dt * ds)
    tokens = (b - a) // dt - product * s
    held = (c - a) // ds - product * t
    zero = np.zeros_like(a)
    return np.stack([a - tokens * t - held * s - product * t * s, tokens, held, product, zero, zero, zero], axis=-1)


def without_a_cache(numbers: NDArray[np.int64], counts: Sequence[int]) -> NDArray[np.int64]:
    """The same for an encoder, whose keys are those of the pass: from passes of three lengths, with T²."""
    (a, b), c = numbers[:2], numbers[counts.index(max(counts))]
    t, u, v = counts[0], counts[1], max(counts)
    square = ((c - a) * (u - t) - (b - a) * (v - t)) // ((v - t) * (v - u) * (u - t))
    tokens = (b - a) // (u - t) - square * (u + t)
    zero = np.zeros_like(a)
    return np.stack([a - tokens * t - square * t * t, tokens, zero, zero, square, zero, zero], axis=-1)


def over_an_encoder(numbers: NDArray[np.int64], counts: Sequence[int], encoded: Sequence[int]) -> NDArray[np.int64]:
    """The part of the sizes that depends on the rows E of an encoder's output, from the last two passes of a grid and the same passes
    over another output: int64 [tensors, 9, 7], zeros if nothing does."""
    sizes = np.zeros((*numbers.shape[1:], 7), np.int64)
    other = next((i for i, e in enumerate(encoded) if e != encoded[0]), None)
    if other is None:
        return sizes
    (a, b), (c, d) = numbers[2:4], numbers[other : other + 2]
    t, u, rows = counts[2], counts[3], encoded[other] - encoded[0]
    crossed = ((d - c) - (b - a)) // ((u - t) * rows)
    sizes[..., 5], sizes[..., 6] = (c - a) // rows - crossed * t, crossed
    return sizes


def contradicted(sizes: NDArray[np.int64], places: NDArray[np.int64], numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which tensors have other sizes in a pass than these expressions give: bool [tensors]."""
    wrong: NDArray[np.bool_] = (np.moveaxis(sizes @ places, -1, 0) != numbers).any(axis=(0, 2))
    return wrong
