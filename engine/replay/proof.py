"""The same steps, accumulated in float64 and rounded where ggml rounds: what one operation of the reference is held to.

A model's own steps are what an engine runs fast. Here each product dequantises its weight a few rows at a time, brings the
activations to the weight type's partner if the file's own types are computed (`native`), and sums in float64, so that only
the reference's own float32 sums are left as a difference.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .. import ops
from ..backend import Array, module_of
from ..graph import Altered, Step, WeightSource
from ..weights.dequantize import dequantize
from ..weights.rounding import F16, Q4_1, Q5_1, q8_1_correction, round_activations

_CHUNK = 1 << 22  # weights dequantised at once: 32 MiB as float64


@dataclass(frozen=True)
class Blocks:
    """A matrix as the file holds it: uint8 [out, bytes a row], its ggml type, and the length of a row."""

    raw: Array
    kind: int
    columns: int

    def rows(self, start: int, stop: int) -> Array:
        """Rows start … stop − 1 as float64 [stop − start, columns]."""
        return dequantize(self.raw[start:stop], self.kind, self.columns).astype(np.float64)


def blocks_of(source: WeightSource, name: str) -> Blocks:
    """A weight's blocks, on the side where the steps compute."""
    raw, kind, shape = source.raw(name)
    return Blocks(source.array(raw), kind, shape[-1])


def product(x: Array, weight: Blocks, bias: Array | None = None, *, native: bool) -> Array:
    """x · weightᵀ (+ bias), accumulated in float64: [T, in] -> float32 [T, out].

    With `native` the activations are rounded as ggml_compute_forward_mul_mat rounds src1 (`vec_dot_type`).

    Raises:
        ModelError: a type that ggml's CPU backend does not multiply, as far as we know.
    """
    xp = module_of(x)
    wide = (round_activations(x, weight.kind) if native else x).astype(np.float64)
    count = len(weight.raw)
    made = xp.empty((len(x), count), dtype=np.float64)
    step = max(1, _CHUNK // weight.columns)
    for start in range(0, count, step):
        made[:, start : start + step] = wide @ weight.rows(start, min(start + step, count)).T
    if native and weight.kind in (Q4_1, Q5_1):
        made += q8_1_correction(x, weight.raw, weight.kind)
    summed: Array = made.astype(np.float32)
    return summed if bias is None else summed + bias


def _scores(q: Array, k: Array, *, kv_kind: int, **heads: Any) -> Array:
    rounded = round_activations(q, kv_kind)
    return ops.attention_scores(rounded.astype(np.float64), k.astype(np.float64), **heads).astype(np.float32)


def _mixed(weights: Array, v: Array, *, kv_kind: int, kv_heads: int) -> Array:
    rounded = round_activations(weights, kv_kind)
    return ops.weighted_values(rounded.astype(np.float64), v.astype(np.float64), kv_heads=kv_heads).astype(np.float32)


def _stored(history: Array, *, kv_kind: int) -> Array:
    return round_activations(history, kv_kind)


def proof_steps(steps: Sequence[Step], *, native: bool, kv_type: str = "f32") -> list[Step]:
    """The steps with each product replaced by the one above; everything else is what it was.

    Args:
        kv_type: "f32" or "f16", what the cache holds. A cache of F16 rounds queries and attention weights, too: they are
            the activations of a product whose weights are the cache.
    """
    kinds = {"kv_kind": F16 if kv_type == "f16" else 0}
    made = []
    for step in steps:
        if step.op is ops.linear and isinstance(step.weights[0], str):
            weights = (Altered(step.weights[0], blocks_of), *step.weights[1:])
            made.append(replace(step, op=product, weights=weights, params={"native": native}))
        elif step.op in _WIDE:
            made.append(replace(step, op=_WIDE[step.op], params={**step.params, **kinds}))
        else:
            made.append(step)
    return made


_WIDE: dict[Callable[..., Array], Callable[..., Array]] = {
    ops.attention_scores: _scores,
    ops.weighted_values: _mixed,
    ops.cached: _stored,
}
