"""A step of a node's own ggml operation, for nodes that are no operation of `engine.ops`."""

from math import isfinite
from typing import TYPE_CHECKING

from checkpoints.graph import WEIGHT, Size, Tensor

from ..ggml_ops import OPERATIONS, OpParams
from ..graph import POSITIONS, Read, RowsOf, Step, WeightPart
from . import inputs
from .attention import attended
from .node import GgmlOperation, Operand
from .operands import ONE, Unliftable, numpy_shape

if TYPE_CHECKING:
    from .lifter import Lifter

_COPIES = frozenset({"CPY", "DUP", "CONT"})


def generic(lifter: "Lifter", index: int, tensor: Tensor) -> None:
    """A step of the node's own ggml operation."""
    if tensor.op not in OPERATIONS:
        raise Unliftable("it has no such operation")
    own = OpParams(tensor.params, tensor.type)
    # 1 / 0, as of an attention soft cap of 0. llama.cpp scales keys that the mask hides too, the zeros of an empty cache among them, and
    # NaN is not hidden by adding -inf: its own values are NaN at every position.
    if tensor.op == "SCALE" and not isfinite(own.float(0)):
        raise Unliftable(f"llama.cpp multiplies by {own.float(0)} there, as for a soft cap of 0, and its values are not finite")
    # Clamped to one number a value is that number, whatever it was: memory that nothing has been written to.
    name = "FILL" if tensor.op == "CLAMP" and own.float(0) == own.float(1) else tensor.op
    reads: list[Read] = []
    weights: list[str | RowsOf | WeightPart] = []
    operands_read: list[tuple[str, int, tuple[Size, ...], tuple[Size, ...] | None] | None] = []
    for number, source in enumerate(tensor.sources):
        if source is None:
            operands_read.append(None)
            continue
        place = lifter.memory.place(source)
        if lifter.tensors[place.base].kind == WEIGHT:
            operands_read.append(_weight(lifter, tensor, source, number, weights))
            continue
        if tensor.op in _COPIES and number == 1:  # of the target only the shape matters
            operands_read.append(None)
            continue
        if name == "FILL":  # of the operand only the shape matters
            cached = any(size.cached for size in tensor.ne)
            lengths = (lifter.t, lifter.s) if cached else (lifter.t,)
            operands_read.append(("read", len(reads), lengths, lengths))
            reads.append(inputs.of_lengths(lifter) if cached else POSITIONS)
            continue
        if number in tensor.operand_points:
            operands_read.append(("read", len(reads), *_operand_point(lifter, tensor, number, reads)))
            continue
        read, whole, shape = lifter.read(source)
        operands_read.append(("read", len(reads), whole, shape))
        reads.append(read)
    result_shape, axis = lifter.memory.layout(index)
    shape = numpy_shape(tensor.ne)
    positions = None
    if (tensor.moving or any(not size.constant for size in shape)) and not any(
        entry and any(not size.constant for size in entry[2]) for entry in operands_read
    ):
        positions = len(reads)
        reads.append(POSITIONS)
    operands = tuple(
        None if entry is None else Operand(entry[1] + (len(reads) if entry[0] == "weight" else 0), entry[2], entry[3])
        for entry in operands_read
    )
    params = {
        "params": own,
        "operands": operands,
        "shape": shape,
        "result_shape": result_shape,
    }
    if positions is not None:
        params["positions"] = positions
    if tensor.moving:
        params["moving"] = tensor.moving
    # The value has neither a row for each position nor one for all; or llama.cpp's padding is a part of its rows.
    inner = not tensor.point or (axis is None and len(result_shape) != 2) or lifter.memory.padded(index)
    lifter.make_rows(
        index,
        Step(lifter.name(index), GgmlOperation(name), tuple(reads), tuple(weights), params, axis=axis, inner=inner),
    )


def _weight(
    lifter: "Lifter", tensor: Tensor, source: int, number: int, weights: list[str | RowsOf | WeightPart]
) -> tuple[str, int, tuple[Size, ...], tuple[Size, ...] | None]:
    base = lifter.memory.place(source).base
    info, shown = lifter.tensors[base], lifter.tensors[source]
    shape = numpy_shape(shown.ne)
    entry = ("weight", len(weights), shape, shape)
    if source == base and tensor.op == "GET_ROWS" and number == 0 and info.ne[2] == info.ne[3] == ONE:
        weights.append(RowsOf(info.name))
        return ("weight", entry[1], shape, None)
    if lifter.memory.whole(source):
        weights.append(info.name)
    else:
        view = lifter.memory.view(source, info.name, numpy_shape(info.ne))
        weights.append(
            WeightPart(info.name, tuple(s.fixed for s in view.shape), tuple(s.fixed for s in view.strides), view.offset.fixed)
        )
    return entry


def _operand_point(
    lifter: "Lifter", tensor: Tensor, number: int, reads: list[Read]
) -> tuple[tuple[Size, ...], tuple[Size, ...]]:
    """Make and read the step of an operand that is a point of its own: keys or values as attention reads them."""
    read = attended(lifter, tensor, number)
    reads.append(read)
    shape = numpy_shape(lifter.tensors[tensor.sources[number] or 0].ne)
    return shape, shape
