"""Neighbouring nodes that together are one of `engine.ops`: norm and weight, product and bias, RoPE, attention, gated activation.

A pattern gets the lifter and the node that begins it; it makes the step and returns True, or changes nothing. What is
not exactly an operation of `engine.ops` stays ggml's.
"""

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from checkpoints.graph import NODE, Size, Tensor
from checkpoints.points import of_scores, parse

from .. import ops
from ..graph import POSITIONS, TOKENS, RowsOf, Step, View
from .attention import attended_name
from .operands import ONE, ZERO, Unliftable, numpy_shape, times

if TYPE_CHECKING:
    from .lifter import Lifter

Pattern = Callable[["Lifter", int, Tensor], bool]
_SWIGLU = 2  # GGML_GLU_OP_SWIGLU
_NORMAL, _NEOX = 0, 2  # GGML_ROPE_TYPE_*


def _float(tensor: Tensor, index: int) -> float:
    number: float = struct.unpack("<f", struct.pack("<i", tensor.params[index]))[0]
    return number


def _named(tensor: Tensor) -> bool:
    """Whether a node's point is one of the vocabulary's, so that it must stay a value of its own."""
    return bool(tensor.point) and parse(tensor.point).known is not None


def _factor(lifter: "Lifter", tensor: Tensor, of: int) -> int | None:
    """The weight that a node combines with the value of node `of`, as a factor or a summand; None if it does not."""
    others = [source for source in tensor.sources if source != of]
    if len(others) != 1 or others[0] is None or not lifter.is_weight(others[0]) or tensor.sources[0] != of:
        return None
    return others[0]


def _vector(lifter: "Lifter", index: int, width: Size) -> bool:
    """Whether a weight is one row of that width."""
    ne = lifter.tensors[index].ne
    return ne[0] == width and ne[1:] == (ONE, ONE, ONE)


def norm(lifter: "Lifter", index: int, tensor: Tensor) -> bool:
    """RMS_NORM or NORM, its weight, and its bias if there is one."""
    source = tensor.sources[0]
    assert source is not None
    reader = lifter.only_reader(index)
    if reader is None or lifter.tensors[reader].op != "MUL":
        return False
    weight = _factor(lifter, lifter.tensors[reader], index)
    width = tensor.ne[0]
    if weight is None or not _vector(lifter, weight, width) or lifter.tensors[reader].ne != tensor.ne:
        return False
    last, bias = reader, None
    after = lifter.only_reader(reader)
    if tensor.op == "NORM" and after is not None and lifter.tensors[after].op == "ADD":
        bias = _factor(lifter, lifter.tensors[after], reader)
        if bias is not None and _vector(lifter, bias, width):
            last = after
        else:
            bias = None
    try:
        read = lifter.rows(source)
        heads = _heads(lifter, index)
    except Unliftable:
        return False
    operation = ops.rms_norm if tensor.op == "RMS_NORM" else ops.layer_norm
    weights = (lifter.tensors[weight].name,) + (() if bias is None else (lifter.tensors[bias].name,))
    params = {"eps": _float(tensor, 0)} | ({} if heads == 1 else {"heads": heads})
    lifter.make(last, Step(lifter.name(last), operation, (read,), weights, params), index, reader)
    return True


def _heads(lifter: "Lifter", index: int) -> int:
    """How many vectors of ne[0] elements each position has."""
    tensor = lifter.tensors[index]
    shape, _ = lifter.memory.layout(index)
    if len(shape) != 2 or shape[0] != lifter.t or not shape[1].constant:
        raise Unliftable("its rows are not the positions")
    return shape[1].fixed // tensor.ne[0].fixed


def product(lifter: "Lifter", index: int, tensor: Tensor) -> bool:
    """A product with a weight of the file, and its bias."""
    weight, source = tensor.sources[0], tensor.sources[1]
    assert weight is not None
    assert source is not None
    info = lifter.tensors[weight]
    if not lifter.is_weight(weight) or info.ne[2:] != (ONE, ONE):
        return False
    if lifter.tensors[source].ne[2:] != (ONE, ONE) or lifter.tensors[source].ne[1] != lifter.t:
        return False
    try:
        read = lifter.rows(source)
    except Unliftable:
        return False
    last, bias = index, None
    reader = lifter.only_reader(index)
    if reader is not None and lifter.tensors[reader].op == "ADD" and not _named(tensor):
        bias = _factor(lifter, lifter.tensors[reader], index)
        if bias is not None and _vector(lifter, bias, tensor.ne[0]):
            last = reader
        else:
            bias = None
    names = (info.name, None if bias is None else lifter.tensors[bias].name)
    lifter.make(last, Step(lifter.name(last), ops.linear, (read,), names), index)
    return True


def rope(lifter: "Lifter", index: int, tensor: Tensor) -> bool:
    """RoPE of whole heads without YaRN: both kinds of pairs, frequency factors, linear scaling."""
    source, positions = tensor.sources[0], tensor.sources[1]
    factors = tensor.sources[2] if len(tensor.sources) > 2 else None
    assert source is not None
    plain = (
        tensor.params[2] in (_NORMAL, _NEOX) and _float(tensor, 7) == 0 and _float(tensor, 8) == 1 and tensor.params[15] == 0
    )
    if not plain or lifter.rule(positions) != "positions" or (factors is not None and not lifter.is_weight(factors)):
        return False
    try:
        read, heads = lifter.rows(source), _heads(lifter, index)
    except Unliftable:
        return False
    params = {
        "heads": heads,
        "dims": tensor.params[1],
        "base": _float(tensor, 5),
        "scale": _float(tensor, 6),
        "pairs": "neox" if tensor.params[2] == _NEOX else "norm",
    }
    names = (None if factors is None else lifter.tensors[factors].name,)
    lifter.make(index, Step(lifter.name(index), ops.rope, (read, POSITIONS), names, params))
    return True


def embedding(lifter: "Lifter", index: int, tensor: Tensor) -> bool:
    """Rows of a matrix of the file by token."""
    matrix, ids = tensor.sources[0], tensor.sources[1]
    if not lifter.is_weight(matrix) or lifter.rule(ids) != "tokens" or lifter.memory.layout(index)[1] != 0:
        return False
    assert matrix is not None
    lifter.make(index, Step(lifter.name(index), ops.get_rows, (TOKENS,), (RowsOf(lifter.tensors[matrix].name),)))
    return True


def scores(lifter: "Lifter", index: int, tensor: Tensor) -> bool:
    """Queries times the keys that the cache holds."""
    keys_read, queries = tensor.sources[0], tensor.sources[1]
    if queries is None or keys_read is None or not of_scores(tensor.point) or lifter.is_weight(keys_read):
        return False
    base = lifter.memory.place(queries).base
    shape = numpy_shape(lifter.tensors[queries].ne)
    name = lifter.names.get(base)
    keys = lifter.tensors[keys_read]
    if name is None or not keys.ne[2].constant or keys.ne[1] != tensor.ne[0] or tensor.ne[0] != lifter.s:
        return False
    heads, d = shape[1], shape[3]
    row = times(heads, d)
    if lifter.memory.layout(base)[0] != (lifter.t, row) or lifter.memory.place(queries).offset != ZERO:
        return False
    wanted = (ZERO, d, row, ONE)
    if any(
        size != ONE and have != want for size, have, want in zip(shape, lifter.memory.strides(queries), wanted, strict=True)
    ):
        return False
    read = attended_name(lifter, tensor, keys=True)
    if read is None:
        return False
    params = {"heads": heads.fixed, "kv_heads": keys.ne[2].fixed}
    lifter.make(index, Step(lifter.name(index), ops.attention_scores, (name, read), (), params, axis=1))
    return True


def soft_max(lifter: "Lifter", index: int, tensor: Tensor) -> bool:
    """The soft max of scores [H, T, S], with any mask, ALiBi and sinks."""
    source = tensor.sources[0]
    mask = tensor.sources[1] if len(tensor.sources) > 1 else None
    sinks = tensor.sources[2] if len(tensor.sources) > 2 else None
    if source is None or mask is None or lifter.rule(mask) != "mask" or (sinks is not None and not lifter.is_weight(sinks)):
        return False
    name = lifter.value(source)
    rule = lifter.tensors[mask].rule
    base = lifter.memory.place(source).base
    if name is None or rule is None or lifter.memory.layout(base)[1] != 1 or len(lifter.memory.layout(base)[0]) != 3:
        return False
    params: dict[str, object] = {"scale": _float(tensor, 0)}
    if rule.parameters["window"] != "causal":
        params |= {"window": rule.parameters["window"], "size": rule.parameters.get("size", 0)}
    if rule.parameters.get("alibi"):
        params["max_bias"] = _float(tensor, 1)
    elif _float(tensor, 1) != 0 and rule.parameters["window"] != "causal":
        return False
    weights = () if sinks is None else (lifter.tensors[sinks].name,)
    reads = (name, POSITIONS, lifter.keys)
    lifter.make(index, Step(lifter.name(index), ops.causal_soft_max, reads, weights, params, axis=1))
    return True


def weighted_values(lifter: "Lifter", index: int, tensor: Tensor) -> bool:
    """Attention's weights times the values that the cache holds, the heads put side by side."""
    weights = tensor.sources[1]
    if (
        weights is None
        or lifter.is_weight(tensor.sources[0])
        or lifter.tensors[lifter.memory.place(weights).base].op != "SOFT_MAX"
    ):
        return False
    name = lifter.value(weights)
    base = lifter.memory.place(weights).base
    permuted = lifter.only_reader(index)
    if name is None or permuted is None or lifter.tensors[permuted].op != "PERMUTE" or len(lifter.memory.layout(base)[0]) != 3:
        return False
    last = lifter.only_reader(permuted)
    if last is None or lifter.tensors[last].op != "CONT":
        return False
    d, _, heads, _ = tensor.ne
    row = times(heads, d)
    shown = lifter.tensors[permuted]
    values = lifter.tensors[tensor.sources[0] or 0]
    if lifter.memory.layout(last)[0] != (lifter.t, row) or shown.ne != (d, heads, lifter.t, ONE) or not values.ne[2].constant:
        return False
    read = attended_name(lifter, tensor, keys=False)
    if read is None:
        return False
    params = {"kv_heads": values.ne[2].fixed}
    reads = (name, read)
    lifter.make(last, Step(lifter.name(last), ops.weighted_values, reads, (), params), index, permuted)
    return True


def addition(lifter: "Lifter", index: int, tensor: Tensor) -> bool:
    """The sum of two values of the same rows: a residual connection."""
    first, second = tensor.sources[0], tensor.sources[1]
    assert first is not None
    assert second is not None
    if lifter.tensors[first].ne != tensor.ne or lifter.tensors[second].ne != tensor.ne:
        return False
    if any(lifter.tensors[lifter.memory.place(source).base].kind != NODE for source in (first, second)):
        return False
    try:
        reads = (lifter.rows(first), lifter.rows(second))
    except Unliftable:
        return False
    lifter.make(index, Step(lifter.name(index), ops.add, reads))
    return True


def gated(lifter: "Lifter", index: int, tensor: Tensor) -> bool:
    """SwiGLU of a gate and a value: of two products, or of the halves of one."""
    if tensor.params[0] != _SWIGLU:
        return False
    gate, up = tensor.sources[0], tensor.sources[1] if len(tensor.sources) > 1 else None
    assert gate is not None
    try:
        if up is not None:
            reads = (lifter.rows(gate), lifter.rows(up))
        else:
            whole = lifter.rows(gate)
            half = lifter.memory.layout(index)[0]
            if not isinstance(whole, str) or half[0] != lifter.t or len(half) != 2:
                return False
            shape, strides = half, (times(half[1], Size(2)), ONE)
            both = tuple(View(whole, (half[0], strides[0]), shape, strides, offset) for offset in (ZERO, half[1]))
            reads = (both[1], both[0]) if tensor.params[1] else (both[0], both[1])
    except Unliftable:
        return False
    lifter.make(index, Step(lifter.name(index), ops.swiglu, reads))
    return True


PATTERNS: dict[str, tuple[Pattern, ...]] = {
    "RMS_NORM": (norm,),
    "NORM": (norm,),
    "MUL_MAT": (scores, weighted_values, product),
    "ROPE": (rope,),
    "GET_ROWS": (embedding,),
    "SOFT_MAX": (soft_max,),
    "ADD": (addition,),
    "GLU": (gated,),
}
