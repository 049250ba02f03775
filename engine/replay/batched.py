"""One step on many versions of its inputs at once: those of different faults, each over the same few positions.

A step that works row by row does not care whose rows they are: the versions are stacked, as if they were
one long sequence; so does one that works element by element. In attention they lie side by side, as if they were more heads.
"""

from collections.abc import Sequence

from .. import ops
from ..backend import Array
from ..graph import PASSES, History, Step, WeightSource, compute
from ..lift.node import GgmlOperation

_ROW_BY_ROW = (ops.rms_norm, ops.layer_norm, ops.linear, ops.rope, ops.cached, ops.add, ops.swiglu)
_ELEMENTWISE = frozenset({"ADD", "SUB", "MUL", "DIV", "SCALE", "CLAMP", "SQR", "SQRT", "UNARY", "GLU"})  # of ggml's operations
_ATTENTION = (ops.attention_scores, ops.causal_soft_max, ops.weighted_values)


def by_rows(step: Step) -> bool:
    """Whether each row of a step's value depends on the same row of what it reads alone."""
    plain = step.op in _ROW_BY_ROW and can_batch(step) and not any(isinstance(read, History) for read in step.reads)
    return plain or (step.axis == 0 and elementwise(step))


def elementwise(step: Step) -> bool:
    """Whether an operation of ggml's makes each element of its value of the same element of values of its shape, and of nothing else."""
    if not isinstance(step.op, GgmlOperation) or step.op.name not in _ELEMENTWISE or step.weights:
        return False
    shape, of_operands, known = step.params["shape"], step.params["operands"], {"params", "operands", "shape", "result_shape"}
    whole = all(operand is not None and operand.shape == shape for operand in of_operands) and len(of_operands) == len(
        step.reads
    )
    return whole and step.params.keys() <= known and all(isinstance(read, str) for read in step.reads)


def compute_elementwise(step: Step, inputs: Sequence[Array]) -> Array:
    """The value of an `elementwise` step for inputs of any one shape."""
    flat = [x.reshape(1, 1, 1, -1) for x in inputs]
    value: Array = step.op.compute(*flat, params=step.params["params"], shape=flat[0].shape).reshape(inputs[0].shape)  # type: ignore[attr-defined]
    return value


def can_batch(step: Step) -> bool:
    """Whether `compute_batch` can combine versions of this step's inputs."""
    if elementwise(step):
        return True
    by_head = step.op is ops.causal_soft_max and (step.weights or "max_bias" in step.params)  # sinks, ALiBi
    plain = all(isinstance(read, str | History) for read in step.reads) and not by_head
    return plain and step.op in (*_ROW_BY_ROW, *_ATTENTION) and PASSES not in step.names


def compute_batch(step: Step, inputs: Sequence[Array], many: int, weights: WeightSource) -> Array:
    """Run a step on M versions of its inputs.

    Args:
        inputs: in the order of `step.reads`, each with its versions one after the other: [M · R, n], [M · H, R, R], positions [M · R].
        many: M, the number of versions.

    Returns:
        [M, R, n] or [M, H, R, R].
    """
    if isinstance(step.op, GgmlOperation):
        stacked = compute_elementwise(step, inputs)
    else:
        stacked = _attention(step, inputs, many) if step.op in _ATTENTION else compute(step, inputs, weights)
    return stacked.reshape(many, stacked.shape[0] // many, *stacked.shape[1:])


def _attention(step: Step, inputs: Sequence[Array], many: int) -> Array:
    if step.op is ops.causal_soft_max:
        rows = len(inputs[1]) // many
        return ops.causal_soft_max(inputs[0], inputs[1][:rows], inputs[2][:rows], **step.params)
    heads = {name: count * many for name, count in step.params.items()}  # heads, kv_heads
    if step.op is ops.attention_scores:
        return ops.attention_scores(_beside(inputs[0], many), _beside(inputs[1], many), **heads)
    mixed = ops.weighted_values(inputs[0], _beside(inputs[1], many), **heads)
    return mixed.reshape(len(mixed), many, -1).transpose(1, 0, 2).reshape(len(mixed) * many, -1)


def _beside(x: Array, many: int) -> Array:
    """[M · R, n] -> [R, M · n]."""
    return x.reshape(many, -1, x.shape[1]).transpose(1, 0, 2).copy().reshape(x.shape[0] // many, -1)
