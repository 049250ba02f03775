"""Sorting and selecting: what routing to experts and sparse attention are made of."""

import numpy as np

from ..backend import Array, module_of
from .params import OpParams, Shape


def argsort(x: Array, *, params: OpParams, shape: Shape) -> Array:
    """The indices of each row's elements in ascending (int 0 is 0) or descending order: int32 of the same shape.

    Equal elements keep their order, as ggml_compute_forward_argsort_f32 leaves them in rows of up to 16 elements; in longer rows
    std::sort promises nothing.
    """
    return np.argsort(-x if params.int(0) else x, axis=-1, kind="stable").astype(np.int32)


def top_k(x: Array, *, params: OpParams, shape: Shape) -> Array:
    """The indices of the k largest elements of each row, with the first two swapped: int32 [..., k].

    ggml_compute_forward_top_k_f32 swaps them to show that their order does not matter. Of a row with fewer than k elements
    all are chosen, the last of them more than once: llama.cpp's row ends in the cache's padding, which a mask hides. Which of
    several equal elements are chosen follows std::partial_sort (`_selected`).
    """
    k = shape[-1]
    order = np.argsort(-x, axis=-1, kind="stable")
    places = order[..., :k].astype(np.int32)
    if x.shape[-1] > k:
        _settle_ties(x, order, places)
    if 0 < places.shape[-1] < k:
        return np.concatenate([places, np.repeat(places[..., -1:], k - places.shape[-1], axis=-1)], axis=-1)
    if k > 1:
        places[..., :2] = places[..., 1::-1]
    return places


def _settle_ties(x: Array, order: Array, places: Array) -> None:
    """Choose again in rows whose first k + 1 elements are not all different, such as scores that a ReLU set to 0."""
    k = places.shape[-1]
    first = np.take_along_axis(x, order[..., : k + 1], axis=-1)
    tied = ((first[..., 1:] == first[..., :-1]) & (first[..., 1:] > -np.inf)).any(axis=-1)  # the masked may be chosen or not
    for row in zip(*(axis.tolist() for axis in tied.nonzero()), strict=True):
        values = x[row].tolist()
        places[row] = module_of(x).asarray(_selected(values, k), dtype=np.int32)


def _selected(values: list[float], k: int) -> list[int]:
    """The indices of the k largest values, largest first: a heap of the first k, whose smallest is replaced by larger ones.

    Mirrors std::partial_sort of libstdc++: __heap_select and __sort_heap.
    """
    heap = list(range(k))

    def sift(hole: int, place: int, size: int = k) -> None:
        """__adjust_heap and __push_heap: put `place` at or below `hole` of the first `size`."""
        top = hole
        while 2 * hole + 2 < size:
            child = 2 * hole + 2
            if values[heap[child]] > values[heap[child - 1]]:
                child -= 1
            heap[hole], hole = heap[child], child
        if size % 2 == 0 and hole == (size - 2) // 2:
            heap[hole], hole = heap[2 * hole + 1], 2 * hole + 1
        while hole > top and values[heap[(hole - 1) // 2]] > values[place]:
            heap[hole], hole = heap[(hole - 1) // 2], (hole - 1) // 2
        heap[hole] = place

    for parent in reversed(range(k // 2)):
        sift(parent, heap[parent])
    for place in range(k, len(values)):
        if values[place] > values[heap[0]]:
            sift(0, place)
    for end in reversed(range(1, k)):
        place, heap[end] = heap[end], heap[0]
        sift(0, place, end)
    return heap
