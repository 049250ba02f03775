"""The right engine in lower arithmetic: what precision alone costs on this model and prompt."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .. import ops
from ..backend import Array, module_of
from ..graph import Step
from ..weights.rounding import BF16, F16, Q8_0, round_activations

_PRODUCTS = (ops.linear, ops.attention_scores, ops.weighted_values)


def tf32(x: Array) -> Array:
    """To TF32 (10 bits of mantissa, float32's exponent) and back, to nearest even."""
    bits = module_of(x).ascontiguousarray(x).view(np.uint32)
    half = np.uint32((1 << 12) - 1) + ((bits >> np.uint32(13)) & np.uint32(1))
    return ((bits + half) & np.uint32(0xFFFFE000)).view(np.float32)


def q8(x: Array) -> Array:
    """Rows to Q8_0 and back, as a product with quantised weights sees them; rows that are no whole blocks stay."""
    return x if x.shape[-1] % 32 else round_activations(x, Q8_0)


ROUNDINGS: dict[str, Callable[[Array], Array]] = {
    "f16": lambda x: round_activations(x, F16),
    "bf16": lambda x: round_activations(x, BF16),
    "tf32": tf32,
    "q8": q8,
}


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
        rounds = self.storage and self.kind != "q8" and made.dtype.kind == "f"  # ids and positions are no activations
        return rounding(made) if rounds else made


def rounded(steps: Sequence[Step], kind: str, *, storage: bool) -> list[Step]:
    """The steps of a right engine in f16, bf16 or tf32 arithmetic, or with activations quantised to Q8_0 (q8).

    The factors of every matrix product are rounded, sums are float32. With `storage` every activation is kept in that type too.
    """
    return [replace(step, op=_Rounded(step.op, kind, storage)) for step in steps]
