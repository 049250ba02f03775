"""What is kept from pass to pass, rows of a cache and recurrent states: how it is written, and how it is read."""

from dataclasses import replace
from typing import TYPE_CHECKING

from checkpoints.graph import CACHE, NODE, STATE, VIEWS, Size, Tensor

from .. import ops
from ..graph import History, Read, State, Step, View
from .operands import ONE, ZERO, Unliftable, numpy_shape, product, row_strides, times

if TYPE_CHECKING:
    from .lifter import Lifter


def history(lifter: "Lifter", index: int) -> View:
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


def state(lifter: "Lifter", index: int) -> View:
    """What is read from a recurrent state: the state as the last pass left it."""
    leaf = lifter.memory.place(index).base
    size = product(numpy_shape(lifter.tensors[leaf].ne))
    if not size.constant:
        raise Unliftable("its state depends on the length")
    name = lifter.helper(
        Step(
            f"state.{lifter.tensors[leaf].name}",
            ops.part,
            (State(_next_state(lifter, leaf), (size.fixed,)),),
            axis=None,
            inner=True,
        )
    )
    return lifter.memory.view(index, name, (size,))


def _next_state(lifter: "Lifter", leaf: int) -> str:
    return f"next.{lifter.tensors[leaf].name}"


def writes(lifter: "Lifter", index: int, tensor: Tensor) -> bool:
    """Whether a node writes into a cache or a state; if so, note what it writes."""
    if tensor.op not in ("SET_ROWS", "CPY") or tensor.root is None:
        # The engine's states start at zero anyway.
        return tensor.root is not None and lifter.tensors[lifter.graph.root_of(index)].kind == STATE
    root = lifter.graph.root_of(index)
    kind = lifter.tensors[root].kind
    if kind == STATE:
        _write_state(lifter, index, tensor, root)
        return True
    if kind == NODE and tensor.op == "SET_ROWS" and not _read_after(lifter, root, index):
        return False  # a value of its own: nothing reads the old one afterwards
    if kind != CACHE or tensor.op != "SET_ROWS":
        raise Unliftable("it writes into another value")
    source, ids = tensor.sources[0], tensor.sources[1]
    assert source is not None
    rule = lifter.tensors[ids].rule if ids is not None else None
    if rule is None or rule.kind not in ("cells", "cells_transposed"):
        raise Unliftable("the cells that it writes follow no rule")
    # Transposed or not, the rows are those of the source before it was cut into single elements.
    if rule.kind == "cells_transposed":
        lifter.cells[root] = int(rule.parameters["cells"])
    width = lifter.tensors[root].ne[0]
    base = lifter.memory.place(source).base
    name = lifter.value(source)
    if name is None or lifter.memory.layout(base)[0] != (lifter.t, width):
        shown = lifter.memory.view(source, lifter.names[base], lifter.memory.layout(base)[0])
        if product(shown.shape) != times(lifter.t, width):
            raise Unliftable("it writes rows whose width is not the cache's")
        rows, inner = row_strides(shown.shape, shown.strides, lifter.t) if lifter.tensors[source].ne[0] != ONE else (width, ONE)
        name = lifter.helper(
            Step(
                f"rows.{lifter.tensors[root].name}",
                ops.part,
                (replace(shown, shape=(lifter.t, width), strides=(rows, inner)),),
                inner=True,
            )
        )
    lifter.written[root] = (name, width)
    lifter.done.add(index)
    return True


def _read_after(lifter: "Lifter", base: int, writer: int) -> bool:
    """Whether a node reads a value, itself or through views, after another has written into it."""
    for reader in lifter.graph.consumers.get(base, ()):
        if reader == writer:
            continue
        if _read_after(lifter, reader, writer) if lifter.tensors[reader].op in VIEWS else reader > writer:
            return True
    return False


def _write_state(lifter: "Lifter", index: int, tensor: Tensor, root: int) -> None:
    """Note what a node leaves in a state; the steps that write it come after all others."""
    source = tensor.sources[0]
    assert source is not None
    read, _, _ = lifter.read(source)
    start = tensor.offset.divided(4)
    if tensor.op != "CPY" or not (start.constant and product(tensor.ne).constant):
        raise Unliftable("the state that it leaves depends on the length")
    lifter.left.setdefault(root, []).append((start.fixed, read))
    if tensor.point:  # a row that belongs to the last position
        lifter.helper(Step(tensor.point, ops.flat, (read,), axis=None))
    lifter.done.add(index)


def leave_states(lifter: "Lifter") -> None:
    """Add the steps that put a state's new parts together, in the order in which they are written."""
    for leaf, parts in lifter.left.items():
        last = _next_state(lifter, leaf)
        size = product(numpy_shape(lifter.tensors[leaf].ne)).fixed
        before: Read = State(last, (size,))
        for number, (start, read) in enumerate(parts, 1):
            name = last if number == len(parts) else f"{last}.{number}"
            lifter.made.append(
                Step(name, ops.left_in_state, (before, read), (), {"start": start, "size": size}, axis=None, inner=True)
            )
            before = name


def selects(lifter: "Lifter", index: int, tensor: Tensor) -> bool:
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
