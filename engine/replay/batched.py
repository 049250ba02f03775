"""One step on many versions of its inputs at once: those of different faults, each over the same few positions.

A step that works row by row does not care whose rows they are: the versions are stacked, as if they were
one long sequence; so does one that works element by element. In attention they lie side by side, as if they were more heads. In other
operations of ggml's they lie along its fourth dimension, if the model does not use that.
"""

from collections.abc import Sequence
from math import prod

from checkpoints.graph import Size

from .. import ops
from ..backend import Array, module_of
from ..graph import PASSES, History, Read, State, Step, View, WeightSource, bound, compute, weight_of_step
from ..lift.node import GgmlOperation, lengths_of

_ROW_BY_ROW = (ops.rms_norm, ops.layer_norm, ops.linear, ops.rope, ops.cached, ops.add, ops.swiglu, ops.part)
_ELEMENTWISE = frozenset({"ADD", "SUB", "MUL", "DIV", "SCALE", "CLAMP", "SQR", "SQRT", "UNARY", "GLU"})  # of ggml's operations
# Those that take a row to a row, if positions are what they read in rows: those of routing and experts.
_OF_ROWS = _ELEMENTWISE | {"SOFT_MAX", "ARGSORT", "TOP_K", "GET_ROWS", "SUM_ROWS", "MUL_MAT_ID"}
# Those that do where positions are the slowest dimension of all that they read and make: elements keep their order within a row.
_IN_ORDER = frozenset({"ROPE", "ADD_ID", "CONT", "CONCAT", "REPEAT"})
# Those that treat each part along the fourth dimension alike, and those that only bring a view's elements into order.
_OF_FOURTH = _ELEMENTWISE | {"MUL_MAT", "CONT", "CONCAT", "RMS_NORM", "NORM", "L2_NORM", "SOFT_MAX"}
_MOVES = (ops.part, ops.cached, ops.positions_first)
_POSITIONS, _OF_SECTIONS = Size(0, 1), (Size(0, 4),)  # M-RoPE's positions: those of every section one after the other
_PLAIN = {
    "params",
    "operands",
    "shape",
    "result_shape",
}  # what steps of these operations have, unless something else depends on the length
_ATTENTION = (ops.attention_scores, ops.causal_soft_max, ops.weighted_values)


def by_rows(step: Step) -> bool:
    """Whether each row of a step's value depends on the same row of what it reads alone."""
    plain = step.op in _ROW_BY_ROW and can_batch(step) and not any(isinstance(read, History) for read in step.reads)
    return plain or (step.axis == 0 and elementwise(step)) or _takes_rows(step)


def _takes_rows(step: Step) -> bool:
    """Whether an operation of ggml's makes each row of its value of the same row of what it reads: sizes say what a row is."""
    if not isinstance(step.op, GgmlOperation) or step.op.name not in _OF_ROWS | _IN_ORDER or step.axis != 0:
        return False
    operands = step.params["operands"]
    moving = [operand for operand in operands if operand is not None and operand.variable]
    plain = len(moving) == len(step.reads) and step.params.keys() <= _PLAIN and _in_rows(step.params["result_shape"])
    others = moving[:1] if _has_sections(step) else moving
    if step.op.name in _IN_ORDER:
        plain = plain and all(map(_slowest, (step.params["shape"], *(operand.shape for operand in others))))
    whole = all(isinstance(read, View) or _in_rows(operand.whole) for read, operand in zip(step.reads, others, strict=False))
    return plain and whole and all(map(_is_of_rows, step.reads))


def _has_sections(step: Step) -> bool:
    """Whether a rotation has several positions for each row."""
    operands = step.params.get("operands", ())
    return step.op == GgmlOperation("ROPE") and operands[1] is not None and operands[1].whole == _OF_SECTIONS


def _slowest(shape: Sequence[Size] | None) -> bool:
    """Whether positions are the slowest dimension of a shape, but for those of one element."""
    return shape is not None and next((size for size in shape if size != Size(1)), None) == _POSITIONS


def _in_rows(sizes: Sequence[Size]) -> bool:
    """Whether a shape is a row for each position."""
    return sizes[0] == _POSITIONS and all(size.constant for size in sizes[1:])


def same_part_of_rows(read: Read) -> bool:
    """Whether a step reads a value or a history, or the same part of each row of a value, row by row."""
    return isinstance(read, History) or (_is_of_rows(read) and (not isinstance(read, View) or _slowest(read.shape)))


def _is_of_rows(read: Read) -> bool:
    """Whether a step reads a value, or the same part of each of its rows."""
    if not isinstance(read, View):
        return isinstance(read, str)
    row = Size(prod(size.fixed for size in read.whole[1:]))
    along = [stride for size, stride in zip(read.shape, read.strides, strict=True) if not size.constant]
    rest = (*(size for size in read.shape if size != _POSITIONS), *read.strides, read.offset)
    return isinstance(read.of, str) and _in_rows(read.whole) and along == [row] and all(size.constant for size in rest)


def elementwise(step: Step) -> bool:
    """Whether an operation of ggml's makes each element of its value of the same element of values of its shape, and of nothing else."""
    if not isinstance(step.op, GgmlOperation) or step.op.name not in _ELEMENTWISE or step.weights:
        return False
    shape, of_operands = step.params["shape"], step.params["operands"]
    result = step.params["result_shape"]
    alike = all(operand is not None and operand.shape == shape and operand.whole == result for operand in of_operands)
    read = len(of_operands) == len(step.reads) and all(isinstance(read, str) for read in step.reads)
    return alike and read and step.params.keys() <= _PLAIN


def compute_elementwise(step: Step, inputs: Sequence[Array]) -> Array:
    """The value of an `elementwise` step for inputs of any one shape."""
    flat = [x.reshape(1, 1, 1, -1) for x in inputs]
    value: Array = step.op.compute(*flat, params=step.params["params"], shape=flat[0].shape).reshape(inputs[0].shape)  # type: ignore[attr-defined]
    return value


def can_batch(step: Step) -> bool:
    """Whether `compute_batch` can combine versions of this step's inputs."""
    return elementwise(step) or _takes_rows(step) or _plain(step) or _along_fourth(step)


def _plain(step: Step) -> bool:
    """Whether one of the engine's own operations takes versions as more rows, or as more heads."""
    if PASSES in step.names:
        return False
    if step.op in _ROW_BY_ROW:
        return all(isinstance(read, History) or _is_of_rows(read) for read in step.reads)
    return step.op in _ATTENTION and all(isinstance(read, str | History) for read in step.reads)


def _along_fourth(step: Step) -> bool:
    """Whether versions can lie along ggml's fourth dimension: it is 1 in all that the step reads and makes."""
    if any(isinstance(read, State) for read in step.reads):
        return False
    if step.op in _MOVES:
        return len(step.reads) == 1
    if not isinstance(step.op, GgmlOperation) or step.op.name not in _OF_FOURTH or not step.params.keys() <= _PLAIN:
        return False
    operands = [operand for operand in step.params["operands"] if operand is not None]
    read = {operand.index for operand in operands if operand.index < len(step.reads)}
    shapes = [step.params["shape"], *(operand.shape for operand in operands)]
    joins_fourth = step.op.name == "CONCAT" and step.params["params"].int(0) == 3
    alone = all(shape is not None and shape[0] == Size(1) for shape in shapes) and not joins_fourth
    return alone and len(read) == len(step.reads)


def compute_batch(step: Step, inputs: Sequence[Array], many: int, weights: WeightSource) -> Array:
    """Run a step on M versions of its inputs.

    Args:
        inputs: in the order of `step.reads`, each with its versions one after the other: [M · R, n], [M · H, R, R], positions [M · R].
        many: M, the number of versions.

    Returns:
        [M, R, n] or [M, H, R, R].
    """
    if elementwise(step):
        stacked = compute_elementwise(step, inputs)
    elif step.op in _ATTENTION:
        stacked = _attention(step, inputs, many, weights)
    elif not (_takes_rows(step) or _plain(step)):
        return _fourth(step, inputs, many, weights)
    else:
        stacked = compute(step, _by_section(inputs, many) if _has_sections(step) else inputs, weights)
    return stacked.reshape(many, stacked.shape[0] // many, *stacked.shape[1:])


def _fourth(step: Step, inputs: Sequence[Array], many: int, weights: WeightSource) -> Array:
    """A step that is computed `_along_fourth`: [M, *shape of its value]."""
    seen = [_each_viewed(read, value, many) for read, value in zip(step.reads, inputs, strict=True)]
    if step.op in _MOVES:
        rows = seen[0].shape[1:] if step.op is ops.part else (seen[0].shape[1], -1)
        moved: Array = module_of(seen[0]).ascontiguousarray(seen[0]).reshape(many, *rows)
        return moved
    given = [*seen, *(weight_of_step(weight, weights) for weight in step.weights)]
    lengths = lengths_of(step.params["operands"], [value[0] if at < len(seen) else value for at, value in enumerate(given)])

    def at(shape: Sequence[Size], first: int) -> tuple[int, ...]:
        return (first, *(size.at(*lengths) for size in shape[1:]))

    arguments = [
        None if operand is None else given[operand.index].reshape(at(operand.shape, many if operand.index < len(seen) else 1))
        for operand in step.params["operands"]
    ]
    value = step.op.compute(*arguments, params=step.params["params"], shape=at(step.params["shape"], many))  # type: ignore[attr-defined]
    result: Array = (
        module_of(value).ascontiguousarray(value).reshape(many, *(size.at(*lengths) for size in step.params["result_shape"]))
    )
    return result


def _each_viewed(read: Read, value: Array, many: int) -> Array:
    """What a step reads of each of M versions, that lie one after the other: [M, *shape]."""
    each = value.reshape(many, len(value) // many, *value.shape[1:])
    if not isinstance(read, View):
        return each
    one = read.apply(each[0])
    start = read.offset.at(*bound(read.whole, each.shape[1:]))
    flat = module_of(value).ascontiguousarray(each).reshape(-1)[start:]
    seen: Array = module_of(value).lib.stride_tricks.as_strided(
        flat, (many, *one.shape), (each[0].size * flat.itemsize, *one.strides)
    )
    return seen


def _by_section(inputs: Sequence[Array], many: int) -> Sequence[Array]:
    """The inputs of a rotation, with the positions of each section in all versions one after the other."""
    return inputs[0], inputs[1].reshape(many, _OF_SECTIONS[0].tokens, -1).swapaxes(0, 1).reshape(-1)


def _attention(step: Step, inputs: Sequence[Array], many: int, weights: WeightSource) -> Array:
    if step.op is ops.causal_soft_max:
        return _soft_max(step, inputs, many, weights)
    heads = {name: count * many for name, count in step.params.items()}  # heads, kv_heads
    if step.op is ops.attention_scores:
        return ops.attention_scores(_beside(inputs[0], many), _beside(inputs[1], many), **heads)
    mixed = ops.weighted_values(inputs[0], _beside(inputs[1], many), **heads)
    return mixed.reshape(len(mixed), many, -1).transpose(1, 0, 2).reshape(len(mixed) * many, -1)


def _soft_max(step: Step, inputs: Sequence[Array], many: int, weights: WeightSource) -> Array:
    """Versions as more heads or, where heads differ (sinks, ALiBi), as more queries of each head."""
    scores, rows = inputs[0], len(inputs[1]) // many
    positions, keys = inputs[1][:rows], inputs[2][:rows]
    if not (step.weights or "max_bias" in step.params):
        return ops.causal_soft_max(scores, positions, keys, **step.params)
    of_heads = [weight_of_step(weight, weights) for weight in step.weights]
    queries = scores.reshape(many, -1, *scores.shape[1:]).swapaxes(0, 1)
    flat = queries.reshape(len(queries), -1, scores.shape[2])
    seen = ops.causal_soft_max(flat, module_of(scores).tile(positions, many), keys, *of_heads, **step.params)
    return seen.reshape(queries.shape).swapaxes(0, 1).reshape(scores.shape)


def _beside(x: Array, many: int) -> Array:
    """[M · R, n] -> [R, M · n]."""
    return x.reshape(many, -1, x.shape[1]).transpose(1, 0, 2).copy().reshape(x.shape[0] // many, -1)
