"""How a step reads what is kept from pass to pass: rows of a cache, and recurrent states."""

from typing import TYPE_CHECKING

from checkpoints.graph import NODE, STATE, Size, Tensor

from .. import ops
from ..graph import History, State, Step, View
from .operands import ONE, ZERO, Unliftable, numpy_shape, product

if TYPE_CHECKING:
    from .lifted import GraphLifter


def history(lifter: "GraphLifter", index: int) -> View:
    """What is read from a cache: the rows of all positions, one position a row however llama.cpp stores them."""
    tensor, place = lifter.tensors[index], lifter.memory.place(index)
    leaf = place.base
    if leaf not in lifter.written:
        raise Unliftable(f"it reads {lifter.tensors[leaf].name}, to which nothing was written")
    name, width = lifter.written[leaf]
    cells = lifter.cells.get(leaf, 0)
    offset = place.offset.fixed // 4
    strides = []
    for size, stride in zip(tensor.ne, tensor.nb, strict=True):
        if size == ONE:
            strides.append(ZERO)
        elif not stride.constant:
            raise Unliftable("its view of the cache depends on the length")
        elif cells:  # a row of the cache is a channel
            strides.append(width if stride.fixed == 4 else Size(stride.fixed // 4 // cells))
        else:
            strides.append(Size(stride.fixed // 4))
    if cells:
        if offset % cells:
            raise Unliftable("its view of the cache begins after the first cell")
        offset //= cells
    return View(History(name), (Size(0, 0, 1), width), numpy_shape(tensor.ne), tuple(reversed(strides)), Size(offset))


def state(lifter: "GraphLifter", index: int) -> View:
    """What is read from a recurrent state: the state as the last pass left it."""
    leaf = lifter.memory.place(index).base
    size = product(numpy_shape(lifter.tensors[leaf].ne))
    if not size.constant:
        raise Unliftable("its state depends on the length")
    name = lifter.add_value(
        Step(
            f"state.{lifter.tensors[leaf].name}",
            ops.part,
            (State(next_state(lifter, leaf), (size.fixed,)),),
            axis=None,
            inner=True,
        )
    )
    return lifter.memory.view(index, name, (size,))


def next_state(lifter: "GraphLifter", leaf: int) -> str:
    """The name of the value that a pass leaves in a state."""
    return f"next.{lifter.tensors[leaf].name}"


def selects(lifter: "GraphLifter", index: int, tensor: Tensor) -> bool:
    """Whether a node only selects all rows, as the last layer does if the logits of every row were asked for."""
    if tensor.op != "GET_ROWS":
        return False
    source, ids = tensor.sources[0], tensor.sources[1]
    assert source is not None
    assert ids is not None
    base = lifter.memory.place(source).base
    whole_state = lifter.tensors[base].kind == STATE and lifter.rule(lifter.memory.place(ids).base) == "zero"
    if whole_state:
        lifter.memory.same[index] = source
        return True
    if (
        lifter.rule(ids) == "rows"
        and lifter.tensors[source].kind == NODE
        and lifter.memory.whole(source)
        and base in lifter.names
    ):
        lifter.memory.same[index] = source
        return True
    return False
