"""Views: how a node reads another node's memory, without computing."""

from collections.abc import Sequence

from ..backend import Array, module_of

VIEWS = frozenset({"NONE", "RESHAPE", "VIEW", "PERMUTE", "TRANSPOSE"})


def strided(memory: Array, ne: Sequence[int], nb: Sequence[int], offset: int, item: int) -> Array:
    """The elements that a ggml view reads from contiguous memory, in NumPy's order, as a view.

    Args:
        memory: the whole tensor that the view looks at, contiguous.
        ne, nb: the view's dimensions and its strides in bytes, in ggml's order.
        offset: bytes from the start of `memory` to the view's first element.
        item: bytes of one element in ggml, of which strides and offset are multiples; elements of `memory` may have another size.
    """
    flat = memory.reshape(-1)[offset // item :]
    strides = tuple(int(stride) // item * flat.itemsize for stride in reversed(nb))
    view: Array = module_of(memory).lib.stride_tricks.as_strided(flat, tuple(reversed(ne)), strides)
    return view
