"""A model's weights as the arrays that steps compute with."""

import random
from collections.abc import Collection
from math import inf, prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoints.room import free_memory

from ..backend import Array, Backend
from .gguf_model import GgufModel
from .matrices import Matrices

_SHARE = 3  # weights that are kept take a third of the free memory; float64 copies of them and other programs need some as well


class Weights:
    """The model's weights as float32 arrays on a backend.

    With `resident` each is dequantised once and kept; without, it is dropped when the step is done, which suits a single
    forward pass: peak memory is then one weight and not the model. `names` are those that will be asked for, None for all. Of a model
    that does not fit into memory as float32, as many weights are kept as fit; on a device, none. `free` is the host's memory in bytes,
    by default what is available now.
    """

    def __init__(
        self,
        model: GgufModel,
        backend: Backend,
        *,
        resident: bool,
        names: Collection[str] | None = None,
        free: int | None = None,
    ) -> None:
        self._model = model
        self._backend = backend
        self._room = self._room_for(model.tensors if names is None else names, free) if resident else 0.0
        self._held: dict[tuple[str, int], Array] = {}
        self._size = 0
        self._draw = random.Random(0)

    @property
    def resident(self) -> bool:
        """Whether weights are kept."""
        return self._room > 0

    def _room_for(self, names: Collection[str], free_host: int | None) -> float:
        """How many bytes of these weights can be kept as float32; the others are streamed, one step's at a time."""
        sizes = [4 * prod(self._model.tensors[name].shape) for name in names]
        if not sizes:
            return inf
        # Twice the largest weight is enough for a step's weight, its result and the products' workspace.
        largest = 2 * max(sizes)
        free = self._backend.free_bytes()
        if free is None:
            room = (free_memory() if free_host is None else free_host) // _SHARE
            return inf if sum(sizes) <= room else max(room - largest, 0)
        self._backend.require(largest, f"the largest weight of {self._model.path.name} as float32")
        return inf if sum(sizes) + largest <= free else 0

    def _keep(self, key: tuple[str, int], weight: Array) -> Array:
        """Keep a weight, if need be in place of others.
        These are chosen at random, so that passes over a model that is too large still find some weights, and passes over a few layers
        soon find all.
        """
        if weight.nbytes <= self._room:
            self._size += weight.nbytes
            self._held[key] = weight
            while self._size > self._room:
                others = [other for other in self._held if other != key]
                self._size -= self._held.pop(self._draw.choice(others)).nbytes
        return weight

    def get(self, name: str) -> Array:
        """The whole weight: float32, row-major (out, in)."""
        if (name, -1) in self._held:
            return self._held[name, -1]
        return self._keep((name, -1), self._backend.array(self._model.load(name)))

    def matrices(self, name: str) -> Matrices:
        """A weight [.., out, in] of which single matrices are taken; each is dequantised when it is, and kept if weights are kept."""

        def matrix(number: int) -> Array:
            if (name, number) in self._held:
                return self._held[name, number]
            return self._keep((name, number), self._backend.array(self._model.load_matrix(name, number)))

        return Matrices(matrix, self._model.tensors[name].shape)

    def raw(self, name: str) -> tuple[NDArray[np.uint8], int, tuple[int, ...]]:
        """The file's own bytes [rows, bytes per row], their ggml type and the weight's shape."""
        info = self._model.tensors[name]
        return self._model.raw(name), info.type, info.shape

    def array(self, host: NDArray[Any]) -> Array:
        """A host array moved to where the steps compute."""
        return self._backend.array(host)

    def rows(self, name: str, ids: Array) -> Array:
        """The given rows of a matrix: [len(ids), in]."""
        return self._backend.array(self._model.load_rows(name, self._backend.to_host(ids)))
