"""Faults of dequantisation: each changes the bytes of a block format, or the values made from them.

A weight of a type that a fault does not affect is read correctly. Layouts are those of ggml-common.h.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from msgspec.structs import replace

from ..backend import Array
from ..graph import Altered, RowsOf, Step, WeightSource
from ..inapplicable import NotApplicable
from ..weights.dequantize import FORMATS, dequantize
from ..weights.gguf_model import block_of
from .base import AT, Fault, Parameters, Steps, weight_of
from .block_edits import (
    BF16,
    F16,
    Q4_0,
    Q4_K,
    Q5_0,
    Q5_K,
    Q6_K,
    Q8_0,
    Bytes,
    block_offset,
    neighbours_scale,
    nibble_order,
    no_high_bits,
    no_minimum,
    only_k_quants,
    scales_and_mins,
)
from .weights import EXPERTS, MATRICES

Edit = Callable[
    [Bytes, int], "Bytes | None"
]  # blocks [n, bytes], ggml_type -> the blocks as they are misread; None: not affected


def reread(step: Step, edit: Edit) -> Step:
    """The step with its matrix dequantised from edited blocks."""

    def make(source: WeightSource, name: str) -> Any:
        raw, kind, shape = source.raw(name)
        _, size = block_of(kind, name)
        edited = edit(raw.reshape(-1, size), kind)
        if edited is None:
            return source.get(name)
        return source.array(dequantize(edited.reshape(raw.shape), kind, shape[-1]).reshape(shape))

    return remade(step, make)


def remade(step: Step, make: Callable[[WeightSource, str], Array]) -> Step:
    """The step with its matrix, or the rows that it takes of one, made by `make`.

    Raises:
        NotApplicable: the step reads no matrix unchanged from the file.
    """
    first = weight_of(step, 0)
    if isinstance(first, RowsOf):

        def rows(source: WeightSource, name: str) -> Any:
            matrix = make(source, name)
            return lambda ids: matrix[ids]

        return replace(step, weights=(Altered(first.weight, rows), *step.weights[1:]))
    if not isinstance(first, str):
        raise NotApplicable(f"{step.makes} has no plain matrix that could be read differently")
    return replace(step, weights=(Altered(first, make), *step.weights[1:]))


def _by(edit: Callable[[Bytes, int, Parameters], "Bytes | None"]) -> Callable[[Step, Steps, Parameters], Step]:
    def change(step: Step, _right: Steps, parameters: Parameters) -> Step:
        return reread(step, lambda blocks, kind: edit(blocks, kind, parameters))

    return change


def _signedness(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    """Q8_0's int8 read as uint8; Q4_0's and Q5_0's offset of 8 or 16 not subtracted."""

    def make(source: WeightSource, name: str) -> Any:
        raw, kind, shape = source.raw(name)
        offset = {Q4_0: 8, Q5_0: 16}.get(kind)
        if kind != Q8_0 and offset is None:
            return source.get(name)
        blocks = raw.reshape(-1, FORMATS[kind][1])
        scale = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
        unsigned = blocks[:, 2:].astype(np.float32) * scale if kind == Q8_0 else None
        values = FORMATS[kind][2](blocks) + np.float32(offset or 0) * scale if unsigned is None else unsigned
        return source.array(values.reshape(shape))

    return remade(step, make)


def _other_half(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    def make(source: WeightSource, name: str) -> Any:
        raw, kind, shape = source.raw(name)
        if kind not in (F16, BF16):
            return source.get(name)
        blocks = np.ascontiguousarray(raw).reshape(-1, 2)
        with np.errstate(invalid="ignore"):
            values = FORMATS[BF16 if kind == F16 else F16][2](blocks)
        return source.array(values.reshape(shape))

    return remade(step, make)


def _rounded_scale(step: Step, _right: Steps, _parameters: Parameters) -> Step:
    """block_q6_K with the product d · scale of each sub-block rounded to float16 before it meets the quants."""

    def make(source: WeightSource, name: str) -> Any:
        raw, kind, shape = source.raw(name)
        if kind != Q6_K:
            return source.get(name)
        blocks = raw.reshape(-1, FORMATS[kind][1])
        d = np.ascontiguousarray(blocks[:, 208:210]).view(np.float16).astype(np.float32)
        scale = d * blocks[:, 192:208].view(np.int8).astype(np.float32)
        rounded = scale.astype(np.float16).astype(np.float32)
        exact = FORMATS[kind][2](blocks).reshape(-1, 16, 16)
        quants = np.rint(np.where(scale[:, :, None] != 0, exact / np.where(scale == 0, 1, scale)[:, :, None], 0))
        return source.array((rounded[:, :, None] * quants.astype(np.float32)).reshape(shape))

    return remade(step, make)


ALL = (*MATRICES, *EXPERTS, "embd", "logits")
WHERE = {AT: (MATRICES, ALL, ("embd",), ("logits",), EXPERTS)}

FAULTS = (
    Fault(
        name="nibble-order",
        kinds=ALL,
        change=_by(nibble_order),
        what="4-bit quants are taken {order} from their bytes, in {at}",
        symptom="only 4- and 5-bit files are wrong",
        fix="byte i of a block holds element i in the low and i + 16 in the high nibble",
        seen="hand-written Q4_0 kernels",
        parameters={"order": ("high first", "pairwise"), **WHERE},
    ),
    Fault(
        name="q4k-scale-min",
        kinds=ALL,
        change=_by(only_k_quants),
        what="scales and mins of Q4_K and Q5_K are exchanged, in {at}",
        symptom="only Q4_K files are wrong",
        fix="get_scale_min_k4: bytes 0-3 are scales, 4-7 mins, 8-11 the high bits' nibbles of both",
        seen="hand-written K-quant kernels",
        parameters=WHERE,
    ),
    Fault(
        name="scale-min-swapped",
        kinds=ALL,
        change=_by(
            lambda blocks, kind, parameters: None if kind in (Q4_K, Q5_K) else scales_and_mins(blocks, kind, parameters)
        ),
        what="d and m of Q4_1 and Q5_1 are exchanged, in {at}",
        symptom="only Q4_1 and Q5_1 files are wrong",
        fix="a block starts with d, then m",
        seen="Q4_0 kernels to which a minimum was added",
        parameters=WHERE,
    ),
    Fault(
        name="min-ignored",
        kinds=ALL,
        change=_by(no_minimum),
        what="the blocks' minimum is ignored, in {at}",
        symptom="only files of types with a minimum are wrong",
        fix="value = d · q + m (Q4_1, Q5_1), d · scale · q − dmin · min (K-quants)",
        seen="Q4_0 kernels used for Q4_1",
        parameters=WHERE,
    ),
    Fault(
        name="high-bits-dropped",
        kinds=ALL,
        change=_by(no_high_bits),
        what="the high bits of 3-, 5- and 6-bit quants are dropped, in {at}",
        symptom="only Q3_K, Q5 and Q6_K files are wrong",
        fix="OR the high bits from qh (hmask for Q3_K) into the low ones",
        seen="Q4 kernels used for Q5 and Q6",
        parameters=WHERE,
    ),
    Fault(
        name="scale-of-neighbour",
        kinds=ALL,
        change=_by(neighbours_scale),
        what="quants are scaled by the {of}'s scale, in {at}",
        symptom="single values of the wrong size",
        fix="each block (and sub-block) has its own scale",
        seen="an index that is off by one",
        parameters={"of": ("next block", "previous block", "sub-block"), **WHERE},
    ),
    Fault(
        name="block-offset",
        kinds=ALL,
        change=_by(block_offset),
        what="the tensor is read from the wrong place, at an offset of {blocks} block, in {at}",
        symptom="wrong from position 0 on, of plausible size",
        fix="tensor data start at the aligned offset of its info, from the data section's start",
        seen="loaders that forget general.alignment",
        parameters={"blocks": (1, -1), **WHERE},
    ),
    Fault(
        name="quants-signedness",
        kinds=ALL,
        change=_signedness,
        what="quants are read unsigned, in {at}",
        symptom="all weights are positive: values grow without bounds",
        fix="Q8_0 holds int8; Q4_0 subtracts 8, Q5_0 16",
        seen="char, which is unsigned on ARM",
        parameters=WHERE,
    ),
    Fault(
        name="f16-as-bf16",
        kinds=ALL,
        change=_other_half,
        what="F16 weights are read as BF16, or BF16 as F16, in {at}",
        symptom="values absurdly small or large",
        fix="ggml_type 1 is F16, 30 is BF16",
        seen="loaders that know one 16-bit type",
        parameters=WHERE,
    ),
    Fault(
        name="scale-rounded",
        kinds=ALL,
        change=_rounded_scale,
        what="Q6_K's d · scale is rounded to F16 before the product, in {at}",
        symptom="a difference of 1e-7 that looks like rounding",
        fix="multiply in F32",
        seen="half-precision dequantisation kernels",
        parameters=WHERE,
    ),
)
