"""Values that `parity run` hands an engine to go on with in place of its own."""

import os

import numpy as np
from numpy.typing import NDArray


def to_inject(path: str) -> "dict[str, tuple[int, NDArray[np.float32]]]":
    """Point -> first position and rows [T, n] of a file of values to inject: a line "PARITY-INJECT 1", then for each point a line
    "name first rows width" and rows × width float32, little-endian.

    Raises:
        OSError, ValueError: it cannot be read, or is not such a file.
    """
    values: dict[str, tuple[int, NDArray[np.float32]]] = {}
    if not path:
        return values
    with open(path, "rb") as file:  # noqa: PTH123
        if file.readline(128) != b"PARITY-INJECT 1\n":
            raise ValueError(f"{path}: not a file of values to inject")
        size = os.fstat(file.fileno()).st_size
        while line := file.readline(128):
            words = line.split()
            if len(words) != 4 or not all(word.isdigit() for word in words[1:]):
                raise ValueError(f"{path}: damaged")
            first, rows, width = (int(word) for word in words[1:])
            if not 0 < 4 * rows * width <= size - file.tell():
                raise ValueError(f"{path}: cut short")
            data = file.read(4 * rows * width)
            values[words[0].decode()] = (first, np.frombuffer(data, "<f4").reshape(rows, width))
    return values
