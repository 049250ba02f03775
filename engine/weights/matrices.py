"""A weight of several matrices, each of which is dequantised when it is asked for."""

from collections.abc import Callable
from math import prod

import numpy as np

from ..backend import Array


class Matrices:
    """The matrices of a layer's experts, [.., out, in]: a pass over few tokens chooses few of them.

    Indexed with one number for each leading dimension, it is the matrix, float32; it has no other use of an array's.
    """

    def __init__(self, matrix: Callable[[int], Array], shape: tuple[int, ...]) -> None:
        self._matrix = matrix
        self.shape = shape

    def reshape(self, shape: tuple[int, ...]) -> "Matrices":
        """The same matrices under other leading dimensions.

        Raises:
            ValueError: they are other matrices in that shape, or of another number.
        """
        if shape[-2:] != self.shape[-2:] or prod(shape) != prod(self.shape):
            raise ValueError(f"matrices of shape {self.shape} cannot be regarded as {shape}")
        return Matrices(self._matrix, shape)

    def __getitem__(self, index: tuple[int, ...]) -> Array:
        return self._matrix(int(np.ravel_multi_index(index, self.shape[:-2])))
