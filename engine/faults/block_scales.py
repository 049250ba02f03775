"""Faults of dequantisation by type of block: MXFP4's scales and quants, Q3_K's scales, blocks that are not all read."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ..backend import Array
from ..graph import Step, WeightSource
from ..weights.dequantize import dequantize
from ..weights.gguf_model import block_of
from .base import AT, Fault, Parameters, Steps
from .block_edits import MXFP4, doubled_scale, few_scale_bits
from .dequantisation import ALL, WHERE, remade, reread
from .weights import EXPERTS, MATRICES

_EXPERTS_OR_ALL = {AT: (EXPERTS, ALL)}
_MATRICES_OR_ALL = {AT: (MATRICES, ALL)}
_E8M0_BIAS = 127
_LEAST = 32  # elements
_SIGNED: dict[str, Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]] = {
    "two's complement": lambda nibble: (nibble.astype(np.int8) ^ 8) - 8,
    "a sign and three bits of an integer": lambda nibble: np.where(nibble & 8, -1, 1) * (nibble & 7).astype(np.int8),
}


def _scale(step: Step, _right: Steps, parameters: Parameters) -> Step:
    return reread(step, lambda blocks, kind: doubled_scale(blocks, kind, parameters))


def _scale_bits(step: Step, _right: Steps, parameters: Parameters) -> Step:
    return reread(step, lambda blocks, kind: few_scale_bits(blocks, kind, parameters))


def _integers(step: Step, _right: Steps, parameters: Parameters) -> Step:
    """E2M1's four bits read as an integer."""
    signed = _SIGNED[parameters["quants"]]

    def make(source: WeightSource, name: str) -> Any:
        raw, kind, shape = source.raw(name)
        if kind != MXFP4:
            return source.get(name)
        blocks = raw.reshape(-1, 17)
        scale = np.ldexp(np.float32(1), blocks[:, :1].astype(np.int32) - _E8M0_BIAS).astype(np.float32)
        quants = np.concatenate([blocks[:, 1:] & 15, blocks[:, 1:] >> 4], axis=1)
        return source.array((signed(quants).astype(np.float32) * scale).reshape(shape))

    return remade(step, make)


def _times(step: Step, _right: Steps, parameters: Parameters) -> Step:
    by = np.float32({"half": 0.5, "twice": 2.0}[parameters["large"]])

    def make(source: WeightSource, name: str) -> Array:
        return source.get(name) * by

    return remade(step, make)


def _first_block(step: Step, _right: Steps, parameters: Parameters) -> Step:
    """Rows that repeat their first block, or have zeros after it; for types without blocks, 32 values count as a block."""

    def make(source: WeightSource, name: str) -> Any:
        raw, kind, shape = source.raw(name)
        size = max(block_of(kind, name)[0], _LEAST)
        if shape[-1] <= size or shape[-1] % size:
            return source.get(name)
        whole = np.asarray(dequantize(raw, kind, shape[-1])).reshape(shape)
        if parameters["rest"] == "repeated":
            return source.array(np.tile(whole[..., :size], shape[-1] // size))
        kept = np.zeros_like(whole)
        kept[..., :size] = whole[..., :size]
        return source.array(kept)

    return remade(step, make)


FAULTS = (
    Fault(
        name="mxfp4-scale",
        kinds=ALL,
        change=_scale,
        what="MXFP4's scales are {scale}, in {at}",
        symptom="only MXFP4 files are wrong: values are off by a factor of two",
        fix="scale = 2^(byte − 127), times E2M1's value (0, 0.5, 1, 1.5, 2, 3, 4, 6); ggml's table has these doubled and halves the scale",
        seen="ggml's table used with the plain scale",
        parameters={"scale": ("twice too large", "half as large"), **_EXPERTS_OR_ALL},
    ),
    Fault(
        name="mxfp4-integers",
        kinds=ALL,
        change=_integers,
        what="MXFP4's quants are read as {quants}, in {at}",
        symptom="only MXFP4 files are wrong, of plausible size",
        fix="four bits are E2M1: sign, two bits of exponent, one of mantissa",
        seen="Q4_0 kernels with another scale",
        parameters={"quants": tuple(_SIGNED), **_EXPERTS_OR_ALL},
    ),
    Fault(
        name="q3k-scales",
        kinds=ALL,
        change=_scale_bits,
        what="Q3_K's scales are read {scales}, in {at}",
        symptom="only Q3_K files are wrong",
        fix="a scale has four bits in bytes 0 to 7 (low nibbles first) and two in bytes 8 to 11, minus 32",
        seen="hand-written K-quant kernels",
        parameters={
            "scales": (
                "without their upper two bits",
                "with their lower halves exchanged",
                "with their upper bits in the other order",
            ),
            **_MATRICES_OR_ALL,
        },
    ),
    Fault(
        name="values-scaled",
        kinds=ALL,
        change=_times,
        what="weights are {large} as large as they should be, in {at}",
        symptom="wrong from position 0 on, by a factor of two in single products",
        fix="use the block's scale unchanged",
        seen="tables of doubled values; scales halved for another layout",
        parameters={"large": ("half", "twice"), AT: (*WHERE[AT], *((kind,) for kind in reversed(EXPERTS)))},
    ),
    Fault(
        name="first-block-only",
        kinds=ALL,
        change=_first_block,
        what="only the first block of each row is read, the rest is {rest}, in {at}",
        symptom="wrong from position 0 on",
        fix="a row has as many blocks as its length divided by the block's",
        seen="a loop over blocks whose index is not used",
        parameters={"rest": ("repeated", "zero"), **WHERE},
    ),
)
