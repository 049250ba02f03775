"""The distinct values of an array, without what `numpy.unique` alone would import."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def distinct(values: NDArray[Any]) -> NDArray[Any]:
    """The distinct values [k], ascending. Without an option `numpy.unique` imports numpy.ma: 20 ms of every short command."""
    return np.unique(values, return_counts=True)[0]
