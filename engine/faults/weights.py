"""Faults of reading weights: layout, order, which tensor, which rows."""

from collections.abc import Callable
from typing import Any

import numpy as np
from msgspec.structs import replace

from .. import ops
from ..backend import Array, module_of
from ..graph import Altered, RowsOf, Step, WeightPart, WeightSource
from ..inapplicable import NotApplicable
from .base import AT, Fault, Parameters, Steps, kind_of, parameter_of, sibling, subsets, weight_of
from .edits import HandsOn

MATRICES = ("q", "k", "v", "attn_out", "ffn_gate", "ffn_up", "ffn_out")
EXPERTS = ("ffn_moe_gate_up", "ffn_moe_gate", "ffn_moe_up", "ffn_moe_down")
_QKV = ("q", "k", "v")
_EACH_MATRIX = (*((kind,) for kind in ("ffn_gate", "q", "k", "v", "attn_out", "ffn_up", "ffn_out", "logits")), MATRICES)


def altered(step: Step, change: Callable[[Array], Array]) -> Step:
    """The step with its matrix changed after it was read; changes of several faults follow each other.

    Raises:
        NotApplicable: the step has no matrix of its own.
    """
    first = weight_of(step, 0)
    if first is None:
        raise NotApplicable(f"{step.makes} has no matrix")
    if isinstance(first, RowsOf):
        name = first.weight

        def rows(source: WeightSource, weight: str) -> Any:
            matrix = change(source.get(weight))
            return lambda ids: matrix[ids]

        return replace(step, weights=(Altered(name, rows), *step.weights[1:]))
    if isinstance(first, WeightPart):
        raise NotApplicable(f"{step.makes} reads a part of its weight")
    before = first.make if isinstance(first, Altered) else _as_it_is
    name = first.weight if isinstance(first, Altered) else first

    def make(source: WeightSource, weight: str) -> Array:
        return change(before(source, weight))

    return replace(step, weights=(Altered(name, make), *step.weights[1:]))


def _as_it_is(source: WeightSource, name: str) -> Array:
    return source.get(name)


def _transposed(weight: Array) -> Array:
    return weight.T.reshape(weight.shape)  # a square matrix needs no copy


def each_transposed(weight: Array) -> Array:
    """The matrices of experts or heads [E, out, in], the memory of each read as [in, out]."""
    count, rows, columns = weight.shape
    return weight.reshape(count, columns, rows).swapaxes(1, 2).copy()


def _transpose(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    return altered(step, _transposed)


def _stride(weight: Array, stride: int) -> Array:
    """The matrix whose row i begins at element i · stride; beyond the end the elements begin anew: [out, in]."""
    rows, columns = weight.shape
    xp, flat = module_of(weight), weight.reshape(-1)
    taken = xp.empty_like(weight)
    begin = 0
    while begin < rows:
        start = begin * stride % weight.size
        count = min(rows - begin, 1 + (weight.size - columns - start) // stride)  # rows that end within the matrix
        if count > 0:
            strides = (stride * flat.itemsize, flat.itemsize)
            taken[begin : begin + count] = xp.lib.stride_tricks.as_strided(flat[start:], (count, columns), strides)
        else:
            count = 1
            taken[begin] = xp.concatenate([flat[start:], flat[: columns - (weight.size - start)]])
        begin += count
    return taken


def _leading(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    return altered(step, lambda weight: _stride(weight, weight.shape[0]))


def with_rows_moved(step: Step, change: Callable[[Array], Array], *, bias: str) -> Step:
    """The product with the rows of its matrix in another order, and those of its bias: `bias` is "moved" or "left"."""
    changed = altered(step, change)
    name = weight_of(step, 1)
    if not isinstance(name, str) or bias == "left":
        return changed
    moved = Altered(name, lambda source, weight: change(source.get(weight)))
    return replace(changed, weights=(changed.weights[0], moved))


def _heads(step: Step, right: Steps) -> int:
    return int(parameter_of(sibling(step, right, f"{kind_of(step)}_rope"), "heads"))


def permuted(rows: Array, heads: int, to: str) -> Array:
    """LlamaModel.permute of convert_hf_to_gguf.py along the first axis, or its inverse."""
    if rows.shape[0] % (2 * heads):
        raise NotApplicable(f"{rows.shape[0]} rows do not form pairs in {heads} heads")
    split = (heads, 2, -1) if to == "gguf" else (heads, -1, 2)
    shaped = rows.reshape(*split, *rows.shape[1:])
    return shaped.swapaxes(1, 2).copy().reshape(rows.shape)


def _permute(step: Step, right: Steps, parameters: Parameters) -> Step:
    heads, to = _heads(step, right), parameters["to"]
    return with_rows_moved(step, lambda rows: permuted(rows, heads, to), bias=parameters["bias"])


def _order(step: Step, right: Steps, parameters: Parameters) -> Step:
    other = parameters["read"][_QKV.index(kind_of(step))]
    return replace(step, weights=sibling(step, right, other).weights)


def _embedding_as_output(step: Step, right: Steps, _parameters: Parameters) -> Step:
    taken = weight_of(right["embd"], 0) if "embd" in right else None
    return replace(step, weights=(taken.weight, *step.weights[1:])) if isinstance(taken, RowsOf) else step


def _count_of(part: str | int, size: int) -> int:
    return int({"half": size // 2, "quarter": size // 4, "eighth": size // 8}.get(str(part), part))


def _zeroed(weight: Array, *, part: str | int, axis: str) -> Array:
    weight = weight.copy()
    view = weight if axis == "rows" else weight.T
    view[len(view) - _count_of(part, len(view)) :] = 0
    return weight


class _WithoutPart(HandsOn, frozen=True):
    """A product with the last rows or columns of its matrix missing: no copy of it is made, zeroed inputs or outputs do the same."""

    part: str | int
    axis: str

    def __call__(self, x: Array, weight: Array, bias: Array | None = None) -> Array:
        """x · weightᵀ (+ bias) with that part of the matrix as zeros: [T, in], [out, in] -> [T, out]."""
        if self.axis == "columns":
            x = x.copy()
            x[:, max(0, x.shape[1] - _count_of(self.part, x.shape[1])) :] = 0
            return self.op(x, weight, bias)
        product = self.op(x, weight)
        product[:, max(0, product.shape[1] - _count_of(self.part, product.shape[1])) :] = 0
        return product if bias is None else product + bias


def _missing(step: Step, _right: Steps, parameters: Parameters) -> Step:
    if step.op is ops.linear and step.weights and isinstance(step.weights[0], str):
        return replace(step, op=_WithoutPart(step.op, parameters["part"], parameters["axis"]))
    return altered(step, lambda weight: _zeroed(weight, part=parameters["part"], axis=parameters["axis"]))


def _neighbour(step: Step, right: Steps, parameters: Parameters) -> Step:
    """The rows of neighbouring ids; beyond the ends, the row of the first or last id."""
    if step.makes == "embd" and "node.embd" in right:
        return step  # it is made from the row, which is changed
    rows, by = weight_of(step, 0), parameters["by"]
    if not isinstance(rows, RowsOf):
        raise NotApplicable(f"{step.makes} takes no rows of a matrix")

    def shifted(source: WeightSource, name: str) -> Any:
        last = source.raw(name)[2][0] - 1
        return lambda ids: source.rows(name, np.clip(ids + by, 0, last))

    return replace(step, weights=(Altered(rows.weight, shifted), *step.weights[1:]))


FAULTS = (
    Fault(
        name="transposed",
        kinds=(*MATRICES, "logits"),
        change=_transpose,
        what="the matrix of {at} is read transposed",
        symptom="wrong from position 0 on, of plausible size",
        fix="GGUF stores a matrix as out rows of in elements: y = x · Wᵀ",
        seen="square matrices, where no shape check helps",
        parameters={AT: (("attn_out",), *(kinds for kinds in _EACH_MATRIX if kinds != ("attn_out",)))},
    ),
    Fault(
        name="leading-dimension",
        kinds=(*MATRICES, "logits"),
        change=_leading,
        what="the matrix of {at} is read with the wrong dimension as the row's length",
        symptom="row 0 is right, the next ones are shifted",
        fix="a row is as long as the input: the leading dimension of row-major W is the input's",
        seen="BLAS calls ported from column-major code",
        parameters={AT: _EACH_MATRIX},
    ),
    Fault(
        name="qk-permuted",
        kinds=("q", "k"),
        change=_permute,
        what="the rows of {at} are permuted as for {to} (bias {bias})",
        symptom="position 0 is right, later ones drift away",
        fix="Hugging Face stores halves, GGUF's llama adjacent pairs: permute once, in the converter, and not for NEOX models",
        seen="converters and loaders that both permute, or neither",
        parameters={"to": ("gguf", "hf"), "bias": ("moved", "left"), AT: subsets("q", "k")},
    ),
    Fault(
        name="qkv-order",
        kinds=_QKV,
        change=_order,
        what="queries, keys and values are read from {read}",
        symptom="wrong from position 0 or 1 on",
        fix="fused QKV is Q, then K, then V",
        seen="fused weights split in the wrong order",
        parameters={
            "read": (
                ("k", "q", "v"),
                ("q", "v", "k"),
                ("v", "k", "q"),
                ("k", "v", "q"),
                ("v", "q", "k"),
                ("q", "k", "k"),
                ("q", "v", "v"),
            )
        },
    ),
    Fault(
        name="output-tied",
        kinds=("logits",),
        change=_embedding_as_output,
        what="the embedding is used as the output matrix, although the file has output.weight",
        symptom="everything but the logits is right",
        fix="use output.weight if the file has it, token_embd.weight only if not",
        seen="engines written for tied models",
        once=True,
    ),
    Fault(
        name="part-missing",
        kinds=(*MATRICES, "logits"),
        change=_missing,
        what="the last {axis} of the matrix of {at} are missing ({part})",
        symptom="single channels are zero, or sums too small",
        fix="read all shards, and the last block even if it is not full",
        seen="grids rounded down; only one of several shards read",
        parameters={"part": ("half", "quarter", "eighth", 1, 32, 64), "axis": ("rows", "columns"), AT: _EACH_MATRIX},
    ),
    Fault(
        name="embedding-row",
        kinds=("embd", "node.embd"),
        change=_neighbour,
        what="the embedding's row is that of {by}",
        symptom="embd is that of another token",
        fix="row i of token_embd.weight is id i, from 0",
        seen="a padding row that is counted on one side only",
        parameters={"by": (1, -1)},
        says={1: "the next id", -1: "the id before"},
        once=True,
    ),
)
