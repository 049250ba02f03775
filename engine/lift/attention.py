"""Keys and values as attention reads them: each is a step of its own, wherever the data come from."""

from typing import TYPE_CHECKING

from checkpoints.graph import Size, Tensor

from .. import ops
from ..graph import History, Read, Step, View
from .operands import ONE, ZERO, Unliftable, numpy_shape, times

if TYPE_CHECKING:
    from .lifter import Lifter


def attended_name(lifter: "Lifter", tensor: Tensor, *, keys: bool) -> str | None:
    """The value [S, K · d] that holds the keys or values of a product of attention; None if there is none.

    The cache's contents are shown by a step of their own; where nothing is cached, they are the keys or values of the pass.
    """
    if 0 in tensor.operand_points:
        attended(lifter, tensor, 0)
        return tensor.operand_points[0]
    source = tensor.sources[0]
    base = lifter.memory.place(source).base if source is not None else None
    if not keys and base is not None and lifter.tensors[base].op == "CONT" and lifter.memory.whole(source or 0):
        source = lifter.tensors[base].sources[0]  # llama.cpp transposes the values before the product
        base = lifter.memory.place(source).base if source is not None else None
    if source is None or base not in lifter.names:
        return None
    shape, strides = numpy_shape(lifter.tensors[source].ne), lifter.memory.strides(source)
    heads, width, seen = (shape[1], shape[3], shape[2]) if keys else (shape[1], shape[2], shape[3])
    row = times(heads, width)
    wanted = (ZERO, width, row, ONE) if keys else (ZERO, width, ONE, row)
    rows = lifter.memory.layout(base)[0] == (seen, row) and lifter.memory.place(source).offset == ZERO
    if rows and all(size == ONE or a == b for size, a, b in zip(shape, strides, wanted, strict=True)):
        return lifter.names[base]
    return None


def attended(lifter: "Lifter", tensor: Tensor, number: int) -> View:
    """The keys [1, K, S, d] or values [1, K, d, S] of a product of attention, from the step that shows them as [S, K · d]."""
    source = tensor.sources[number]
    assert source is not None
    name = tensor.operand_points[number]
    read, _, _ = lifter.read(source)
    shape = numpy_shape(lifter.tensors[source].ne)
    keys = name.endswith("k_read")
    heads, width, seen = (shape[1], shape[3], shape[2]) if keys else (shape[1], shape[2], shape[3])
    if shape[0] != ONE:
        raise Unliftable("it attends to several streams")
    of, whole, strides, offset = _memory_of(lifter, source, read)
    by_head, by_element, by_position = (strides[1], strides[3], strides[2]) if keys else (strides[1], strides[2], strides[3])
    row = times(heads, width)
    dense = ONE in (width, by_element) and (heads == ONE or by_head == width)
    rows: Read
    if dense and whole == (seen, row) and offset == ZERO and by_position == row:
        rows = of
    elif dense:
        rows = View(of, whole, (seen, row), (by_position, ONE), offset)
    else:
        rows = View(of, whole, (seen, heads, width), (by_position, by_head, by_element), offset)
    lifter.add_value(Step(name, ops.cached, (rows,)))
    if keys:
        return View(name, (seen, row), shape, (ZERO, width, row, ONE))
    return View(name, (seen, row), shape, (ZERO, width, ONE, row))


def _memory_of(lifter: "Lifter", source: int, read: Read) -> tuple[str | History, tuple[Size, ...], tuple[Size, ...], Size]:
    if isinstance(read, View):
        return read.of, read.whole, read.strides, read.offset
    if not isinstance(read, str):
        raise Unliftable("it attends to a state")
    base = lifter.memory.place(source).base
    return read, lifter.memory.layout(base)[0], lifter.memory.strides(source), ZERO
