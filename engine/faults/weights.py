"""Faults of reading weights: layout, order, which tensor, which rows."""

import re
from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np
from msgspec.structs import replace

from .. import ops
from ..backend import Array, module_of
from ..graph import Altered, RowsOf, Step, WeightPart, WeightSource
from ..inapplicable import NotApplicable
from .base import AT, Fault, Parameters, Steps, Values, kind_of, layer_near, parameter_of, sibling, subsets, weight_of
from .edits import HandsOn

MATRICES = ("q", "k", "v", "attn_out", "ffn_gate", "ffn_up", "ffn_out")
EXPERTS = ("ffn_moe_gate_up", "ffn_moe_gate", "ffn_moe_up", "ffn_moe_down")
_QKV = ("q", "k", "v")
# Operations that read weights of a layer.
_WITH_WEIGHTS = ("MUL_MAT", "RMS_NORM", "NORM", "SOFT_MAX", "MUL_MAT_ID", "ADD_ID", "ADD", "MUL", "SSM_CONV", "SSM_SCAN")
_WHOLE_LAYER = (*MATRICES, "attn_norm", "ffn_norm")
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


def _named(weight: Any, name: Any) -> Any:
    """A weight, whatever is made of it, read from the tensor of that name."""
    return name if weight is None or isinstance(weight, str) else replace(weight, weight=_named(weight.weight, name))


def _of_layer(step: Step, right: Steps, to: Callable[[int], int]) -> Step:
    """The step with another layer's weights; unchanged if that layer has no such step, or its step has other kinds of weights."""
    layer = layer_near(step)
    if layer is None or not step.weights or to(layer) == layer:
        return step
    names = _names_of(step)
    other_step = right.get(f"blk.{to(layer)}.{kind_of(step)}")
    if other_step is None and step.inner:  # a step without a name of its own is identified by its weights
        wanted = [name and name.replace(f"blk.{layer}.", f"blk.{to(layer)}.", 1) for name in names]
        other_step = next((other for other in right.values() if other.op == step.op and _names_of(other) == wanted), None)
    # Where layers are computed several times, a weight has another number than its step.
    if other_step is None or [_in_any_layer(name) for name in names] != [_in_any_layer(name) for name in _names_of(other_step)]:
        return step
    return replace(step, weights=tuple(map(_named, step.weights, _names_of(other_step))))


def _in_any_layer(name: str | None) -> str | None:
    return name and re.sub(r"\bblk\.\d+\.", "blk.*.", name)


def _names_of(step: Step) -> list[Any]:
    return [_name_of(weight) for weight in step.weights]


def _name_of(weight: Any) -> Any:
    """The name of a weight in the file, even if the weight is altered."""
    return weight if weight is None or isinstance(weight, str) else _name_of(weight.weight)


def _n_layers(right: Steps) -> int:
    return next(layer for layer in count() if f"blk.{layer}.l_out" not in right)


def _offset(step: Step, right: Steps, parameters: Parameters) -> Step:
    return _of_layer(step, right, lambda layer: layer + parameters["by"])


def _parts_of_layer(right: Steps) -> Values:
    """Values of `at`: a whole layer, its usual norms, each norm and each matrix that may be off by itself."""
    norms = {kind_of(step): None for step in right.values() if step.op in (ops.rms_norm, ops.layer_norm)}
    others = [kind for kind in norms if kind not in ("attn_norm", "ffn_norm", "output_norm")]
    usual = (("attn_norm",), ("ffn_norm",), ("attn_norm", "ffn_norm"))
    return (_WITH_WEIGHTS, _WHOLE_LAYER, *usual, *((kind,) for kind in (*others, *MATRICES)))


def _swap_layers(step: Step, right: Steps, parameters: Parameters) -> Step:
    both = (parameters["first"], parameters["first"] + 1)
    return _of_layer(step, right, lambda layer: sum(both) - layer if layer in both else layer)


def _first_of_two(right: Steps) -> Values:
    return tuple(range(_n_layers(right) - 1))


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
    """The rows of ids nearby; beyond the ends, that of the first or last id."""
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
        name="layer-offset",
        kinds=(*_WITH_WEIGHTS, *_WHOLE_LAYER),
        change=_offset,
        what="{at}: the weights are taken from the layer at an offset of {by}",
        symptom="wrong from layer 0 on, of plausible size",
        fix="layer i reads blk.i.*, from 0",
        seen="loops from 1",
        parameters={
            "by": (1, -1),
            AT: _parts_of_layer,
        },
        says={_WITH_WEIGHTS: "each layer", _WHOLE_LAYER: "each layer"},
    ),
    Fault(
        name="layers-swapped",
        kinds=_WITH_WEIGHTS,
        change=_swap_layers,
        what="layer {first} and the next one are exchanged",
        symptom="wrong from that layer on, of plausible size",
        fix="sort tensors by their layer's number, not by name (blk.10 before blk.2)",
        seen="names sorted as text",
        parameters={"first": _first_of_two},
        once=True,
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
        what="the embedding's row is looked up at an id offset of {by}",
        symptom="embd is that of another token",
        fix="row i of token_embd.weight is id i, from 0",
        seen="a padding row that is counted on one side only",
        parameters={"by": (1, -1)},
        once=True,
    ),
)
