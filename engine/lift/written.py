"""How nodes write what is kept from pass to pass: rows of a cache, and recurrent states."""

from typing import TYPE_CHECKING

from msgspec.structs import replace

from checkpoints.graph import CACHE, NODE, STATE, VIEWS, Tensor

from .. import ops
from ..graph import Read, State, Step
from .kept import next_state
from .operands import ONE, Unliftable, numpy_shape, product, row_strides, times

if TYPE_CHECKING:
    from .lifter import Lifter


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
        name = lifter.add_value(
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
        lifter.add_value(Step(tensor.point, ops.flat, (read,), axis=None))
    lifter.done.add(index)


def leave_states(lifter: "Lifter") -> None:
    """Add the steps that put a state's new parts together, in the order in which they are written."""
    for leaf, parts in lifter.left.items():
        last = next_state(lifter, leaf)
        size = product(numpy_shape(lifter.tensors[leaf].ne)).fixed
        before: Read = State(last, (size,))
        for number, (start, read) in enumerate(parts, 1):
            name = last if number == len(parts) else f"{last}.{number}"
            lifter.added_steps.append(
                Step(name, ops.left_in_state, (before, read), (), {"start": start, "size": size}, axis=None, inner=True)
            )
            before = name
