"""The right engine in lower arithmetic: what precision alone costs on this model and prompt."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from . import ops
from .backend import Array
from .graph import Step

_PRODUCTS = (ops.linear, ops.attention_scores, ops.weighted_values)


def f16(x: Array) -> Array:
    """To float16 and back, to nearest even."""
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(np.float32)


def _mantissa(x: Array, dropped: int) -> Array:
    """float32 with the last `dropped` of its 23 bits of mantissa rounded away, to nearest even."""
    bits = x.astype(np.float32).view(np.uint32)
    half = np.uint32((1 << (dropped - 1)) - 1) + ((bits >> np.uint32(dropped)) & np.uint32(1))
    return ((bits + half) & np.uint32((0xFFFFFFFF << dropped) & 0xFFFFFFFF)).view(np.float32)


def bf16(x: Array) -> Array:
    """To bfloat16 (7 bits of mantissa) and back."""
    return _mantissa(x, 16)


def tf32(x: Array) -> Array:
    """To TF32 (10 bits of mantissa, float32's exponent) and back."""
    return _mantissa(x, 13)


def q8(x: Array) -> Array:
    """Rows to Q8_0 and back: blocks of 32 with d = amax / 127 stored as float16 (quantize_row_q8_0)."""
    if x.shape[-1] % 32:
        return x
    blocks = x.reshape(-1, 32)
    d = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    inverse = np.where(d > 0, np.float32(1) / np.where(d > 0, d, np.float32(1)), np.float32(0))
    return (np.rint(blocks * inverse) * f16(d)).reshape(x.shape).astype(np.float32)


ROUNDINGS: dict[str, Callable[[Array], Array]] = {"f16": f16, "bf16": bf16, "tf32": tf32, "q8": q8}


@dataclass(frozen=True)
class _Rounded:
    """An operation whose factors, and with `storage` also whose result, are rounded."""

    op: Callable[..., Array]
    kind: str
    storage: bool

    def __call__(self, *inputs: Any, **params: Any) -> Array:
        rounding = ROUNDINGS[self.kind]
        if self.op in _PRODUCTS:
            if self.kind != "q8":
                inputs = (rounding(inputs[0]), rounding(inputs[1]), *inputs[2:])
            elif self.op is ops.linear:  # weights are quantised already; attention runs in floating point
                inputs = (rounding(inputs[0]), *inputs[1:])
        made = self.op(*inputs, **params)
        return rounding(made) if self.storage and self.kind != "q8" else made


def rounded(steps: Sequence[Step], kind: str, *, storage: bool) -> list[Step]:
    """The steps of a right engine in f16, bf16 or tf32 arithmetic, or with activations quantised to Q8_0 (q8).

    The factors of every matrix product are rounded, sums are float32. With `storage` every activation is kept in that type too.
    """
    return [replace(step, op=_Rounded(step.op, kind, storage)) for step in steps]
