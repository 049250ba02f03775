"""Orders and choices, which routing to experts and sparse attention are made of."""

import numpy as np

from ..backend import Array
from .params import OpParams, Shape


def argsort(x: Array, *, params: OpParams, shape: Shape) -> Array:
    """The places of each row's elements in ascending (int 0 is 0) or descending order: int32 of the same shape.

    Equal elements keep their order, as ggml_compute_forward_argsort_f32 leaves them in rows of up to 16 elements; in longer rows
    std::sort does not promise anything.
    """
    return np.argsort(-x if params.int(0) else x, axis=-1, kind="stable").astype(np.int32)


def top_k(x: Array, *, params: OpParams, shape: Shape) -> Array:
    """The places of the largest elements of each row, with the first two exchanged: int32 [..., k].

    ggml_compute_forward_top_k_f32 exchanges them to show that their order is of no importance.
    """
    places = np.argsort(-x, axis=-1, kind="stable")[..., : shape[-1]].astype(np.int32)
    if shape[-1] > 1:
        places[..., :2] = places[..., 1::-1]
    return places
