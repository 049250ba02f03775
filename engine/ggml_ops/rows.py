"""Rows taken from a matrix, and rows put into a matrix."""

from collections.abc import Callable

import numpy as np

from ..backend import Array, module_of
from .params import OpParams, Shape
from .shape import stored


def get_rows(source: Array | Callable[[Array], Array], ids: Array, *, params: OpParams, shape: Shape) -> Array:
    """Rows of each matrix: [n3, n2, rows, n], ids [1, n3, n2, T] -> [n3, n2, T, n]. Mirrors ggml_compute_forward_get_rows.

    The source may be a function from ids [T] to rows [T, n], so that a large quantised weight is dequantised only where it is read.
    """
    places = ids[0].astype(np.int64)
    if callable(source):
        return source(places.reshape(-1)).reshape(shape)
    if source.shape[:2] == (1, 1):
        return source[0, 0][places]
    xp = module_of(source)
    return source[xp.arange(source.shape[0])[:, None, None], xp.arange(source.shape[1])[None, :, None], places]


def set_rows(rows: Array, ids: Array, target: Array, *, params: OpParams, shape: Shape) -> Array:
    """`target` with rows replaced, as its type holds them: [n3, n2, T, n], ids [1, i3, i2, T], [n3, n2, rows, n].

    Mirrors ggml_compute_forward_set_rows. ggml writes into the target; here it is copied.
    """
    written = module_of(target).array(target, copy=True)
    values = stored(rows, params)
    for third in range(target.shape[0]):
        for second in range(target.shape[1]):
            places = ids[0, third % ids.shape[1], second % ids.shape[2]].astype(np.int64)
            written[third, second, places] = values[third, second]
    return written
