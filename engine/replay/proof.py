"""The same steps, accumulated in float64 and rounded where ggml rounds: what each operation of the reference is compared with.

A model's own steps are meant to run fast. Here each product is replaced by that of `products`, so that what is left as a
difference is the reference's own float32 sums.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from checkpoints.points import parse

from .. import ops
from ..backend import Array
from ..ggml_ops import OpParams
from ..graph import Altered, Step, name_of
from ..lift.node import GgmlOperation
from ..weights.rounding import BF16, F16, F32, Q8_0, round_activations
from .kept import reads_cache
from .precision import q8
from .products import blocks_of, mul_mat, mul_mat_id, product


def _rounded(x: Array, kind: int) -> Array:
    return q8(x) if kind == Q8_0 else round_activations(x, kind)


def _scores(q: Array, k: Array, *, kv_kind: int, **heads: Any) -> Array:
    rounded = _rounded(q, kv_kind)
    return ops.attention_scores(rounded.astype(np.float64), k.astype(np.float64), **heads).astype(np.float32)


def _mixed(weights: Array, v: Array, *, kv_kind: int, kv_heads: int) -> Array:
    rounded = (
        weights if kv_kind == Q8_0 else round_activations(weights, kv_kind)
    )  # flash attention multiplies those of Q8_0 itself
    return ops.weighted_values(rounded.astype(np.float64), v.astype(np.float64), kv_heads=kv_heads).astype(np.float32)


def _stored(history: Array, *, kv_kind: int) -> Array:
    return _rounded(history, kv_kind)


HELD = {"f32": F32, "f16": F16, "bf16": BF16, "q8_0": Q8_0}  # the types of a cache whose rounding is known
_SHOWN = ("k_read", "v_read")  # points that show the cache


class _Product(GgmlOperation, frozen=True):
    """MUL_MAT or MUL_MAT_ID, accumulated in float64; `kind` is the type of values that take the place of the weight."""

    native: bool = False
    kind: int = F32

    def compute(self, *arguments: Any, params: OpParams, shape: Any) -> Array:
        """The product, in ggml's four dimensions."""
        if self.name == "MUL_MAT_ID":
            return mul_mat_id(*arguments, params=params, shape=shape, native=self.native)
        rounds = self.native or self.kind in (F16, BF16)
        return mul_mat(*arguments, params=params, shape=shape, native=rounds, kind=self.kind)


class _FromCache(Struct, frozen=True):
    """An operation some of whose inputs the cache holds as `kind`: they are rounded first."""

    op: Callable[..., Array]
    places: tuple[int, ...]
    kind: int

    def __call__(self, *inputs: Array, **params: Any) -> Array:
        rounded = [_rounded(x, self.kind) if place in self.places else x for place, x in enumerate(inputs)]
        return self.op(*rounded, **params)


def proof_steps(steps: Sequence[Step], *, native: bool, kv_type: str = "f32") -> list[Step]:
    """The steps with each product replaced by one of `products`, and nothing else changed.

    Args:
        kv_type: the cache's type, one of `HELD`. A cache of F16 or BF16 rounds queries and attention weights, too: they are
            the activations of a product whose weights are the cache; one of Q8_0 rounds queries.
    """
    kind = HELD[kv_type]
    return [_proof(step, native=native, kind=kind) for step in steps]


def is_weighed(step: Step) -> bool:
    """Whether one of these steps is a product with weights."""
    return step.op is product or (isinstance(step.op, _Product) and any(step.weights))


def rounds_activations(step: Step) -> bool:
    """Whether one of these steps is a product that rounds its activations to the weight's partner type."""
    return bool(step.params.get("native")) or (isinstance(step.op, _Product) and step.op.native)


def _proof(step: Step, *, native: bool, kind: int) -> Step:
    if step.op is ops.linear and isinstance(step.weights[0], str):
        weights = (Altered(step.weights[0], blocks_of), *step.weights[1:])
        return replace(step, op=product, weights=weights, params={"native": native})
    if step.op in _WIDE:  # an encoder's attention reads no cache
        held = kind if step.op is ops.cached or parse(name_of(step.reads[1])).kind in _SHOWN else F32
        return replace(step, op=_WIDE[step.op], params={**step.params, "kv_kind": held})
    if isinstance(step.op, GgmlOperation):
        if step.op.name in ("MUL_MAT", "MUL_MAT_ID"):
            step = _wide_product(step, step.op.name, native=native, kind=kind)
        places = tuple(place for place, read in enumerate(step.reads) if reads_cache(read))
        if kind != F32 and places:
            return replace(step, op=_FromCache(step.op, places, kind))
    return step


def _wide_product(step: Step, name: str, *, native: bool, kind: int) -> Step:
    first = step.params["operands"][0].index - len(step.reads)
    if first < 0:
        read = step.reads[first]
        held = kind if reads_cache(read) or parse(name_of(read)).kind in _SHOWN else F32
        return replace(step, op=_Product(name, native, held))
    weight = step.weights[first]
    if not isinstance(weight, str):
        return replace(step, op=_Product(name, native))
    weights = (*step.weights[:first], Altered(weight, blocks_of), *step.weights[first + 1 :])
    return replace(step, op=_Product(name, native), weights=weights)


_WIDE: dict[Callable[..., Array], Callable[..., Array]] = {
    ops.attention_scores: _scores,
    ops.weighted_values: _mixed,
    ops.cached: _stored,
}
