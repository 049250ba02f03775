"""A weight of several matrices, each of which is dequantised only when needed."""

from collections.abc import Callable
from math import prod

import numpy as np

from ..backend import Array


class Matrices:
    """The matrices of a layer's experts, [.., out, in]: a pass over few tokens chooses few of them.

    Indexed with one number for each leading dimension it gives that matrix, float32; nothing else that an array can do works.
    """

    def __init__(self, matrix: Callable[[int], Array], shape: tuple[int, ...]) -> None:
        self._matrix = matrix
        self.shape = shape

    def reshape(self, shape: tuple[int, ...]) -> "Matrices":
        """The same matrices under other leading dimensions.

        Raises:
            ValueError: that shape has other matrices, or another number of them.
        """
        if shape[-2:] != self.shape[-2:] or prod(shape) != prod(self.shape):
            raise ValueError(f"matrices of shape {self.shape} cannot be regarded as {shape}")
        return Matrices(self._matrix, shape)

    def __getitem__(self, index: tuple[int, ...]) -> Array:
        return self._matrix(int(np.ravel_multi_index(index, self.shape[:-2])))
