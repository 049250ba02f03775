"""A model's weights as the arrays that steps compute with."""

from collections.abc import Collection
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backend import Array, Backend
from .gguf_model import GgufModel
from .matrices import Matrices


class Weights:
    """The model's weights as float32 arrays on a backend.

    With `resident` each is dequantised once and kept; without, it is dropped when the step is done, which suits a single
    forward pass: peak memory is then one weight and not the model. `names` are those that will be asked for, None for all.
    """

    def __init__(self, model: GgufModel, backend: Backend, *, resident: bool, names: Collection[str] | None = None) -> None:
        self._model = model
        self._backend = backend
        self._resident = resident and self._all_fit(model.tensors if names is None else names)
        self._held: dict[str, Array] = {}
        self._matrices: dict[tuple[str, int], Array] = {}

    @property
    def resident(self) -> bool:
        """Whether weights are kept."""
        return self._resident

    def _all_fit(self, names: Collection[str]) -> bool:
        """Whether these weights fit on the device as float32; else they are streamed, one step's at a time."""
        free = self._backend.free_bytes()
        sizes = [4 * prod(self._model.tensors[name].shape) for name in names]
        if free is None or not sizes:
            return True
        # Twice the largest weight is enough for a step's weight, its result and the products' workspace.
        self._backend.require(2 * max(sizes), f"the largest weight of {self._model.path.name} as float32")
        return sum(sizes) + 2 * max(sizes) <= free

    def get(self, name: str) -> Array:
        """The whole weight: float32, row-major (out, in)."""
        if name in self._held:
            return self._held[name]
        weight = self._backend.array(self._model.load(name))
        if self._resident:
            self._held[name] = weight
        return weight

    def matrices(self, name: str) -> Matrices:
        """A weight [.., out, in] of which single matrices are taken; each is dequantised when it is, and kept if weights are kept."""

        def matrix(number: int) -> Array:
            if (name, number) in self._matrices:
                return self._matrices[name, number]
            weight = self._backend.array(self._model.load_matrix(name, number))
            if self._resident:
                self._matrices[name, number] = weight
            return weight

        return Matrices(matrix, self._model.tensors[name].shape)

    def raw(self, name: str) -> tuple[NDArray[np.uint8], int, tuple[int, ...]]:
        """The file's own bytes [rows, bytes a row], their ggml type and the weight's shape."""
        info = self._model.tensors[name]
        return self._model.raw(name), info.type, info.shape

    def array(self, host: NDArray[Any]) -> Array:
        """A host array moved to where the steps compute."""
        return self._backend.array(host)

    def rows(self, name: str, ids: Array) -> Array:
        """The given rows of a matrix: [len(ids), in]."""
        return self._backend.array(self._model.load_rows(name, self._backend.to_host(ids)))
