"""The right engine in a lower arithmetic: what precision alone costs on this model and prompt."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from .. import ops
from ..backend import Array, module_of
from ..graph import Step
from ..weights.rounding import BF16, F16, Q8_0, round_activations

_ATTENTION = (ops.attention_scores, ops.weighted_values)
_PRODUCTS = (ops.linear, *_ATTENTION)
_NORMS = (ops.rms_norm, ops.layer_norm)
_GGML_PRODUCTS = ("MUL_MAT", "MUL_MAT_ID")  # products of lifted models that are no operation of `engine.ops`


def tf32(x: Array) -> Array:
    """Round to TF32 (10 bits of mantissa, float32's exponent) and back, to nearest even."""
    bits = module_of(x).ascontiguousarray(x).view(np.uint32)
    half = np.uint32((1 << 12) - 1) + ((bits >> np.uint32(13)) & np.uint32(1))
    return ((bits + half) & np.uint32(0xFFFFE000)).view(np.float32)


def q8(x: Array) -> Array:
    """Quantise rows to Q8_0 and back, as a product with quantised weights sees them; rows that are not whole blocks stay unchanged."""
    return x if x.shape[-1] % 32 else round_activations(x, Q8_0)


ROUNDINGS: dict[str, Callable[[Array], Array]] = {
    "f16": lambda x: round_activations(x, F16),
    "bf16": lambda x: round_activations(x, BF16),
    "tf32": tf32,
    "q8": q8,
}


class _Rounded(Struct, frozen=True):
    """An operation whose factors (and, with `storage`, result) are rounded; of its operands only the first `reads` are activations."""

    op: Callable[..., Array]
    kind: str
    storage: bool
    reads: int
    normed: bool = False  # whether a norm rounds its row before the product with the weight, too

    def __call__(self, *inputs: Any, **params: Any) -> Array:
        rounding = ROUNDINGS[self.kind]
        if self.op in _PRODUCTS or getattr(self.op, "name", "") in _GGML_PRODUCTS:
            if self.kind != "q8":
                inputs = tuple(
                    each(rounding, value) if at < 2 or self.op not in _PRODUCTS else value for at, value in enumerate(inputs)
                )
            elif self.op not in _ATTENTION:  # weights are quantised already; attention runs in floating point
                inputs = tuple(each(rounding, value) if at < self.reads else value for at, value in enumerate(inputs))
        exact = self._normed(*inputs, **params) if self.normed and self.op in _NORMS else self.op(*inputs, **params)
        return each(rounding, exact) if self.storage and self.kind != "q8" else exact

    def _normed(self, x: Array, weight: Array, bias: Array | None = None, **params: Any) -> Array:
        row = self.op(x, module_of(weight).ones_like(weight), **params)
        scaled = (each(ROUNDINGS[self.kind], row).reshape(-1, len(weight)) * weight).reshape(row.shape)
        return scaled if bias is None else scaled + bias


def multiplies(step: Step) -> bool:
    """Whether a step is a matrix product: of its weights the first is a matrix."""
    return step.op in _PRODUCTS or getattr(step.op, "name", "") in _GGML_PRODUCTS


def each(rounding: Callable[[Array], Array], x: Any) -> Any:
    """A rounded operand; one that holds only whole numbers (ids of experts, stored as float32 like every value) stays unchanged."""
    if getattr(x, "dtype", None) != np.float32 or not x.size or bool((x == np.rint(x)).all()):
        return x
    return rounding(x)


def rounded(steps: Sequence[Step], kind: str, *, storage: bool, normed: bool = False) -> list[Step]:
    """The steps of a right engine in f16, bf16 or tf32 arithmetic, or with activations quantised to Q8_0 (q8).

    The factors of every matrix product are rounded, sums are float32. With `storage` every activation is kept in that type too, and with
    `normed` a norm's row is rounded before the product with its weight, as transformers' LlamaRMSNorm and vLLM's kernel do.
    Steps that this does not change are the same objects.
    """
    every = storage and kind != "q8"
    return [
        replace(step, op=_Rounded(step.op, kind, storage, len(step.reads), normed))
        if every or (multiplies(step) and (kind != "q8" or step.op not in _ATTENTION)) or (normed and step.op in _NORMS)
        else step
        for step in steps
    ]


class _Sparing(Struct, frozen=True):
    """An operation in a lower arithmetic, but for some rows of its result, which are those of float32; `total` rows along an axis."""

    lower: _Rounded
    axis: int
    rows: tuple[int, ...]
    total: int

    def __call__(self, *inputs: Any, **params: Any) -> Array:
        lower = self.lower(*inputs, **params)
        if lower.ndim <= self.axis or lower.shape[self.axis] != self.total:
            return lower
        at = (*[slice(None)] * self.axis, list(self.rows))
        value = lower.copy()
        value[at] = self.lower.op(*inputs, **params)[at]
        return value


def sparing(steps: Sequence[Step], rows: Collection[int], total: int) -> list[Step]:
    """The steps of which those that `rounded` changed leave some of all `total` rows in float32.

    Libraries multiply the single row of a pass by another kernel than several, which need not round: cuBLAS's GEMV has no TF32.
    """
    here = tuple(row for row in rows if row < total)
    return [
        replace(step, op=_Sparing(step.op, step.axis, here, total))
        if here and isinstance(step.op, _Rounded) and step.axis is not None
        else step
        for step in steps
    ]


class _Stored(Struct, frozen=True):
    """An operation whose result is rounded."""

    op: Callable[..., Array]
    kind: str

    def __call__(self, *inputs: Any, **params: Any) -> Array:
        return each(ROUNDINGS[self.kind], self.op(*inputs, **params))


def stored(steps: Sequence[Step], kind: str) -> list[Step]:
    """The steps with results kept in f16 or bf16, of operations that compute in float32, whatever they read."""
    return [replace(step, op=_Stored(step.op, kind)) for step in steps]


def is_normed(step: Step) -> bool:
    """Whether a step is a norm with a weight, which may be rounded twice (`rounded`)."""
    return step.op in _NORMS
