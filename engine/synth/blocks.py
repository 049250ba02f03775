"""Weights drawn from a store of quantised blocks: a model of billions of weights in the time that it takes to write it.

llama.cpp's search for the scales of a K-quant takes 40 to 110 ns a weight, a quarter of an hour of a core for eight billion. Here it is
done for some blocks of 256 weights, and every matrix draws its blocks from these by a seed of its own. With 65,536 blocks no two rows
of four or more blocks are alike, nor two layers, and the scale is that of any other synthetic model.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray

from .data import PORTION, Convert, Part, TensorData

SIZE = 256  # weights of a block here: a multiple of every ggml type's own


class BlockStore:
    """Blocks of N(0, scale²), `number` of each ggml type and scale, made when the first matrix asks for them."""

    def __init__(self, number: int, seed: int, convert: Convert) -> None:
        self._number, self._seed, self._convert = number, seed, convert
        self._stored: dict[tuple[int, float], NDArray[np.uint8]] = {}

    def tensor(self, kind: int, scale: float, elements: int, seed: list[int]) -> TensorData:
        """A matrix of a ggml type whose rows are a multiple of `SIZE` long."""
        return TensorData(elements, partial(self._parts, kind, scale, elements // SIZE, seed))

    def _parts(self, kind: int, scale: float, blocks: int, seed: list[int]) -> Iterator[Part]:
        stored = self._blocks(kind, scale)
        rng = np.random.default_rng(seed)
        step = PORTION // SIZE
        for first in range(0, blocks, step):
            chosen = rng.integers(0, self._number, min(step, blocks - first))
            yield len(chosen) * SIZE, partial(_taken, stored, chosen)

    def _blocks(self, kind: int, scale: float) -> NDArray[np.uint8]:
        key = (kind, scale)
        if key not in self._stored:
            rng = np.random.default_rng([self._seed, kind, int(np.float64(scale).view(np.uint64))])
            rows = rng.standard_normal((self._number, SIZE), dtype=np.float32)
            rows *= np.float32(scale)
            self._stored[key] = np.ascontiguousarray(self._convert(rows, kind)).view(np.uint8).reshape(self._number, -1)
        return self._stored[key]


def _taken(blocks: NDArray[np.uint8], chosen: NDArray[np.int64]) -> NDArray[np.uint8]:
    return blocks.take(chosen, axis=0)
