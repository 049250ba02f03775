"""Products as ggml's CPU backend computes them from a file's own types, except for the order of summation.

Weights are dequantised a few rows at a time, activations are rounded to the weight type's partner (`vec_dot_type`) if the file's
own types are computed with (`native`), and sums are float64: what is left as a difference is the reference's own float32 sums.
"""

import numpy as np
from msgspec import Struct

from ..backend import Array, module_of
from ..ggml_ops import OpParams
from ..ggml_ops.params import Shape, on_host
from ..graph import WeightSource
from ..weights.dequantize import dequantize
from ..weights.rounding import F16, F32, Q4_1, Q5_1, q8_1_correction, round_activations

_CHUNK = 1 << 22  # weights dequantised at once: 32 MiB as float64
_HADAMARD = 1  # GGML_HINT_SRC0_IS_HADAMARD: ggml transforms the activations themselves, in float32


class QuantizedWeight(Struct, frozen=True):
    """A weight as the file holds it: uint8 [matrices · out, bytes per row], its ggml type, and its shape [..., out, in]."""

    raw: Array
    kind: int
    shape: tuple[int, ...]

    @property
    def columns(self) -> int:
        """The length of a row."""
        return self.shape[-1]

    def rows(self, start: int, stop: int) -> Array:
        """Rows start … stop − 1 of all matrices as float64 [stop − start, in]."""
        return dequantize(self.raw[start:stop], self.kind, self.columns).astype(np.float64)

    def matrix(self, number: int) -> "QuantizedWeight":
        """One of its matrices, numbered through all outer dimensions: [out, in]."""
        out = self.shape[-2]
        return QuantizedWeight(self.raw[number * out : (number + 1) * out], self.kind, self.shape[-2:])

    def reshape(self, shape: tuple[int, ...]) -> "QuantizedWeight":
        """The same rows with other outer dimensions."""
        return QuantizedWeight(self.raw, self.kind, tuple(shape))


def blocks_of(source: WeightSource, name: str) -> QuantizedWeight:
    """A weight's blocks, on the side where the steps compute."""
    raw, kind, shape = source.raw(name)
    return QuantizedWeight(source.array(raw), kind, shape)


def product(x: Array, weight: QuantizedWeight, bias: Array | None = None, *, native: bool) -> Array:
    """x · weightᵀ (+ bias): [T, in], [out, in] -> float32 [T, out].

    With `native` the activations are rounded as ggml_compute_forward_mul_mat rounds src1.

    Raises:
        ModelError: a type that ggml's CPU backend does not multiply, as far as we know.
    """
    wide = (round_activations(x, weight.kind) if native else x).astype(np.float64)
    count = len(weight.raw)
    total = module_of(x).empty((len(x), count), dtype=np.float64)
    step = max(1, _CHUNK // weight.columns)
    for start in range(0, count, step):
        total[:, start : start + step] = wide @ weight.rows(start, min(start + step, count)).T
    if native and weight.kind in (Q4_1, Q5_1):
        total += q8_1_correction(x, weight.raw, weight.kind)
    summed: Array = total.astype(np.float32)
    return summed if bias is None else summed + bias


def mul_mat(
    weight: QuantizedWeight | Array, x: Array, *, params: OpParams, shape: Shape, native: bool, kind: int | None = None
) -> Array:
    """MUL_MAT with any first operand: [a3, a2, out, in], [b3, b2, T, in] -> float32 [b3, b2, T, out].

    Args:
        weight: a weight's blocks, or values, whose ggml type is then `kind` (None: float16 if the array is, else float32).
    """
    native = native and params.int(1) != _HADAMARD
    if not isinstance(weight, QuantizedWeight):
        if kind is None:
            kind = F16 if weight.dtype == np.float16 else F32
        rounded = round_activations(x.astype(np.float32, copy=False), kind) if native else x
        return _batched(weight.astype(np.float64), rounded.astype(np.float64), shape)
    a3, a2 = (1, 1, *weight.shape)[-4:-2]
    b3, b2, _, columns = x.shape
    out = module_of(x).empty(shape, dtype=np.float32)
    for third in range(a3):
        for second in range(a2):
            of_matrix = (
                slice(third * b3 // a3, (third + 1) * b3 // a3),
                slice(second * b2 // a2, (second + 1) * b2 // a2),
            )
            part = x[of_matrix]
            result = product(part.reshape(-1, columns), weight.matrix(third * a2 + second), native=native)
            out[of_matrix] = result.reshape(*part.shape[:-1], -1)
    return out


def _batched(weight: Array, x: Array, shape: Shape) -> Array:
    (a3, a2), (b3, b2, rows, columns) = weight.shape[:2], x.shape
    grouped = x.reshape(a3, b3 // a3, a2, b2 // a2 * rows, columns)
    product: Array = np.matmul(grouped, weight.swapaxes(-1, -2)[:, None]).reshape(shape).astype(np.float32)
    return product


def mul_mat_id(weights: QuantizedWeight, x: Array, ids: Array, *, params: OpParams, shape: Shape, native: bool) -> Array:
    """MUL_MAT_ID: each row with the weights of its expert: [.., E, out, in], [1, T, U or 1, in], [1, 1, T, U] -> [1, T, U, out].

    The activations of each row are rounded as for MUL_MAT (ggml_compute_forward_mul_mat_id).
    """
    xp = module_of(x)
    chosen = ids[0, 0].astype(np.int64)
    tokens, used = chosen.shape
    rows = xp.broadcast_to(x[0], (tokens, used, x.shape[-1])) if x.shape[2] == 1 else x[0]
    result = xp.empty(shape, dtype=np.float32)
    for expert in np.unique(on_host(chosen)).tolist():
        token, slot = np.nonzero(chosen == expert)
        result[0, token, slot] = product(rows[token, slot], weights.matrix(expert), native=native)
    return result
