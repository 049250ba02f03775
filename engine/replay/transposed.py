"""Derivatives through ggml's own operations and through views in any order: of whole values, where a row has no place of its own.

What is derived has k leading: k elements of a later row by each element of a value, [k, *shape].
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from msgspec import Struct

from checkpoints.graph import Size

from .. import ops
from ..backend import Array, module_of
from ..ggml_ops import OpParams
from ..graph import Read, State, Step, View, WeightSource, viewed, weight_of_step
from ..lift.node import GgmlOperation, Operand, lengths_of

_MOST = 1 << 24  # elements of one derivative: beyond, what goes through such operations is left out
# Of an element, in proportion: in float64 the difference then has some ten digits, and what is beyond first order is one part in 10^10.
DIFFERENCE = 1e-5
_MOVES = (ops.part, ops.cached, ops.positions_first, ops.flat)


class _Node(Struct, frozen=True):
    """A node's operands in ggml's four dimensions, its value, its parameters, and which operands derivatives are wanted of."""

    arguments: Sequence[Any]
    value: Array
    params: OpParams
    wanted: Sequence[bool]


_Back = Callable[[_Node, Array], "Sequence[Array | None]"]


def passes(step: Step) -> bool:
    """Whether derivatives go through a step."""
    if any(isinstance(read, State) for read in step.reads):
        return False
    plain = "moving" not in step.params and "positions" not in step.params
    return (
        step.op in _MOVES or step.op in _OF_ENGINE or (isinstance(step.op, GgmlOperation) and step.op.name in _BACK and plain)
    )


def through(step: Step, back: Array, value: Array, inputs: Sequence[Array], weights: WeightSource) -> Sequence["Array | None"]:
    """The derivatives by what a step that `passes` reads, [k, *shape of the whole value]; None where they are not known.

    Args:
        back: those by its value, [k, *shape]. inputs: the whole values that it reads.
    """
    if back.size > _MOST:
        return [None] * len(inputs)
    seen = [viewed(read, whole) if isinstance(read, View) else whole for read, whole in zip(step.reads, inputs, strict=True)]
    if step.op in _MOVES:
        parts: Sequence[Array | None] = [back]
    elif step.op in _OF_ENGINE:
        parts = _OF_ENGINE[step.op](step, back, seen, [weight_of_step(weight, weights) for weight in step.weights])
    else:
        parts = _of_node(step, back, value, seen, weights)
    return [
        None if part is None else _whole(read, part.reshape(len(back), *x.shape), whole)
        for read, part, x, whole in zip(step.reads, parts, seen, inputs, strict=True)
    ]


def _of_node(step: Step, back: Array, value: Array, seen: Sequence[Array], weights: WeightSource) -> Sequence["Array | None"]:
    single = isinstance(step.op, GgmlOperation) and step.op.takes_matrices
    given = [
        *seen,
        *(weights.matrices(w) if single and isinstance(w, str) else weight_of_step(w, weights) for w in step.weights),
    ]
    operands: Sequence[Operand | None] = step.params["operands"]
    lengths = lengths_of(operands, given)

    def at(sizes: Sequence[Size]) -> tuple[int, ...]:
        return tuple(size.at(*lengths) for size in sizes)

    arguments = [
        None
        if operand is None
        else given[operand.index]
        if operand.shape is None
        else given[operand.index].reshape(at(operand.shape))
        for operand in operands
    ]
    shape = at(step.params["shape"])
    wanted = [operand is not None and operand.index < len(seen) for operand in operands]
    node = _Node(arguments, value.reshape(shape), step.params["params"], wanted)
    parts: list[Array | None] = [None] * len(seen)
    for operand, part in zip(operands, _BACK[step.op.name](node, back.reshape(len(back), *shape)), strict=False):  # type: ignore[attr-defined]
        if operand is not None and operand.index < len(seen) and part is not None:
            before = parts[operand.index]
            parts[operand.index] = part if before is None else before + part
    return parts


def _whole(read: Read, part: Array, whole: Array) -> Array:
    """Derivatives by the elements that are read as those by the whole value."""
    if not isinstance(read, View):
        return part
    xp = module_of(whole)
    places = viewed(read, xp.arange(whole.size).reshape(whole.shape)).reshape(-1)
    result = xp.zeros((whole.size, len(part)), dtype=part.dtype)
    xp.add.at(result, places, part.reshape(len(part), -1).T)
    return result.T.reshape(len(part), *whole.shape)


def _product(node: _Node, back: Array) -> Sequence["Array | None"]:
    """MUL_MAT: matrix h of the second operand takes matrix h // (b2 / a2) of the first."""
    weight, x = node.arguments
    (a3, a2, out, columns), (b3, b2, _, _) = weight.shape, x.shape
    repeated = np.repeat(np.repeat(weight, b3 // a3, axis=0), b2 // a2, axis=1)
    of_x = np.matmul(back, repeated)
    if not node.wanted[0]:
        return [None, of_x]
    each = np.matmul(back.swapaxes(-1, -2), x)
    return [each.reshape(len(back), a3, b3 // a3, a2, b2 // a2, out, columns).sum(axis=(2, 4)), of_x]


def _experts(node: _Node, back: Array) -> Sequence["Array | None"]:
    """MUL_MAT_ID: by the activations; which experts are chosen is taken as given."""
    weights, x, ids = node.arguments
    of_x = module_of(back).zeros((len(back), *x.shape), dtype=back.dtype)
    for token in range(back.shape[2]):
        if back[:, 0, token].any():
            for slot in range(back.shape[3]):
                matrix = weights[0, int(ids[0, 0, token, slot])]
                of_x[:, 0, token, slot if x.shape[2] > 1 else 0] += back[:, 0, token, slot] @ matrix
    return [None, of_x, None]


def _copied(_node: _Node, back: Array) -> Sequence["Array | None"]:
    return [back]


def _padded(node: _Node, back: Array) -> Sequence["Array | None"]:
    if node.params.int(8):  # with its own other end
        return [None]
    sizes = node.arguments[0].shape
    before = [node.params.int(2 * dimension) for dimension in (3, 2, 1, 0)]
    return [back[(slice(None), *(slice(first, first + size) for first, size in zip(before, sizes, strict=True)))]]


def _repeated(node: _Node, back: Array) -> Sequence["Array | None"]:
    split = [n for there, size in zip(back.shape[1:], node.arguments[0].shape, strict=True) for n in (there // size, size)]
    return [back.reshape(len(back), *split).sum(axis=(1, 3, 5, 7)), None][: len(node.arguments)]


def _rows_taken(node: _Node, back: Array) -> Sequence["Array | None"]:
    """GET_ROWS: by the rows; which are chosen is taken as given."""
    if not node.wanted[0]:
        return [None, None]
    source, ids = node.arguments
    xp = module_of(back)
    outer = [xp.arange(size) for size in source.shape[:2]]
    result = xp.zeros((*source.shape, len(back)), dtype=back.dtype)
    places = (outer[0][:, None, None], outer[1][None, :, None], ids[0].astype(np.int64))
    xp.add.at(result, places, xp.moveaxis(back, 0, -1))
    return [xp.moveaxis(result, -1, 0), None]


def _soft_max(node: _Node, back: Array) -> Sequence["Array | None"]:
    """By the scores; a sink is one more of them, whose weight is dropped."""
    of_scores = node.value * (back - (node.value * back).sum(axis=-1, keepdims=True)) * node.params.float(0)
    return [of_scores, *[None] * (len(node.arguments) - 1)]


def _joined(node: _Node, back: Array) -> Sequence["Array | None"]:
    axis = 3 - node.params.int(0)
    return np.split(back, [node.arguments[0].shape[axis]], axis=1 + axis)


def _rms_norm(node: _Node, back: Array) -> Sequence["Array | None"]:
    (x,) = node.arguments
    scale = 1 / np.sqrt((x * x).mean(axis=-1, keepdims=True) + node.params.float(0))
    return [(back - node.value * (back * node.value).mean(axis=-1, keepdims=True)) * scale]


def _norm(node: _Node, back: Array) -> Sequence["Array | None"]:
    (x,) = node.arguments
    scale = 1 / np.sqrt(x.var(axis=-1, keepdims=True) + node.params.float(0))
    along = node.value * (back * node.value).mean(axis=-1, keepdims=True)
    return [(back - back.mean(axis=-1, keepdims=True) - along) * scale]


def _l2_norm(node: _Node, back: Array) -> Sequence["Array | None"]:
    (x,) = node.arguments
    length = np.sqrt((x * x).sum(axis=-1, keepdims=True))
    long = length > node.params.float(0)
    along = np.where(long, node.value * (back * node.value).sum(axis=-1, keepdims=True), 0)
    return [(back - along) / np.where(long, length, node.params.float(0))]


def _sum_of_row(node: _Node, back: Array) -> Sequence["Array | None"]:
    return [np.broadcast_to(back, (len(back), *node.arguments[0].shape))]


def _elements(operation: str) -> _Back:
    """By differences in float64, in which ggml's operations take nothing from their tables; summed where an operand is repeated."""

    def of(node: _Node, back: Array) -> Sequence["Array | None"]:
        operands = [x if x is None else x.astype(np.float64) for x in node.arguments]
        known = [x for x in operands if x is not None]
        shape = node.value.shape
        if any(n not in (1, whole) for x in known for n, whole in zip(x.shape, shape, strict=True)):
            return [None] * len(operands)  # repeated several times, or halves of one operand
        parts: list[Array | None] = []
        for number, x in enumerate(operands):
            if x is None or not node.wanted[number]:
                parts.append(None)
                continue
            step = DIFFERENCE * (1 + abs(x))
            up, down = (
                GgmlOperation(operation).compute(
                    *operands[:number], moved, *operands[number + 1 :], params=node.params, shape=shape
                )
                for moved in (x + step, x - step)
            )
            part = back * ((up - down) / (2 * step)).astype(back.dtype)
            axes = tuple(1 + axis for axis, (n, whole) in enumerate(zip(x.shape, shape, strict=True)) if n != whole)
            parts.append(part.sum(axis=axes, keepdims=True) if axes else part)
        return parts

    return of


def _sum(_step: Step, back: Array, seen: Sequence[Array], _weights: Sequence[Any]) -> Sequence["Array | None"]:
    return [back] * len(seen)


def _scaled_rows(step: Step, back: Array, seen: Sequence[Array], weights: Sequence[Any]) -> Sequence["Array | None"]:
    """RMS norm and its weight, of rows that are read in any order."""
    rows = seen[0].reshape(len(seen[0]), step.params.get("heads", 1), -1)
    scale = 1 / np.sqrt((rows * rows).mean(axis=-1, keepdims=True) + step.params["eps"])
    weighted = back.reshape(len(back), *rows.shape) * weights[0]
    along = (weighted * rows).mean(axis=-1, keepdims=True) * rows * scale**3
    return [weighted * scale - along]


_OF_ENGINE: Mapping[Callable[..., Any], Callable[[Step, Array, Sequence[Array], Sequence[Any]], Sequence["Array | None"]]] = {
    ops.add: _sum,
    ops.rms_norm: _scaled_rows,
}
_BACK: Mapping[str, _Back] = {
    "MUL_MAT": _product,
    "MUL_MAT_ID": _experts,
    "CONT": _copied,
    "CPY": _copied,
    "CONCAT": _joined,
    "RMS_NORM": _rms_norm,
    "NORM": _norm,
    "L2_NORM": _l2_norm,
    "SUM_ROWS": _sum_of_row,
    "PAD": _padded,
    "REPEAT": _repeated,
    "GET_ROWS": _rows_taken,
    "SOFT_MAX": _soft_max,
    **{name: _elements(name) for name in ("ADD", "SUB", "MUL", "DIV", "SCALE", "CLAMP", "SQR", "SQRT", "UNARY", "GLU")},
}
