"""Single elements of a product recomputed straight from the weight's row: no matrix, no layout, nothing to get wrong.

A product that differs in all elements by a little is rounding; one whose single elements are other numbers was read with a
wrong leading dimension, layout or row.
"""

from dataclasses import dataclass
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from engine.graph import Altered, Step, WeightSource
from engine.rounding import Q4_1, Q5_1, q8_1_correction, round_activations

_TRANSPOSE = 1 << 24  # elements of a weight that is tried as read transposed: 64 MiB
# Rounding of activations to 8 bits costs 2e-5 … 3e-4 (NMSE of one product, every 4- to 8-bit type): this is ten times that.
_ROUNDING = 3e-3
_SAMPLES = 8  # of each product: a wrong layout leaves hardly one element in place


@dataclass(frozen=True)
class Sample:
    """Rows t of the input and rows o of the weight whose dot products are looked at: two int64 [n]."""

    t: NDArray[np.int64]
    o: NDArray[np.int64]

    @staticmethod
    def of(name: str, positions: int, width: int) -> "Sample":
        """The same elements each time for a product of this name and size, the corners among them."""
        rng = np.random.default_rng(crc32(name.encode()))
        t, o = rng.integers(0, positions, _SAMPLES), rng.integers(0, width, _SAMPLES)
        t[:2], o[:2] = (0, positions - 1), (width - 1, 0)
        return Sample(t, o)


def dot_products(
    chosen: Sample, x: NDArray[np.float32], weights: WeightSource, name: str, bias: NDArray[np.float32] | None, *, native: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Chosen elements of x · weightᵀ (+ bias) in float64, and ‖x‖·‖w‖ of each: [T, in] -> two float64 [n]."""
    raw, kind, _ = weights.raw(name)
    rows = weights.rows(name, chosen.o).astype(np.float64)
    inputs = x[chosen.t]
    rounded = (round_activations(inputs, kind) if native else inputs).astype(np.float64)
    dots = np.einsum("ij,ij->i", rounded, rows)
    if native and kind in (Q4_1, Q5_1):
        dots += np.diagonal(q8_1_correction(inputs, raw[chosen.o], kind))
    if bias is not None:
        dots += bias[chosen.o]
    return dots, np.linalg.norm(rounded, axis=1) * np.linalg.norm(rows, axis=1)


def sample_product(
    chosen: Sample,
    x: NDArray[np.float32],
    theirs: NDArray[np.float32],
    weights: WeightSource,
    name: str,
    bias: NDArray[np.float32] | None,
    *,
    native: bool,
) -> float:
    """The largest error of the chosen elements of a product, relative to ‖x‖·‖w‖."""
    dots, size = dot_products(chosen, x, weights, name, bias, native=native)
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.abs(theirs[chosen.t, chosen.o].astype(np.float64) - dots) / size
    return float(np.nan_to_num(error, nan=0.0, posinf=np.inf).max())


def look_of(
    step: Step, x: NDArray[np.float32], theirs: NDArray[np.float32], weights: WeightSource, nmse: float, limit: float
) -> str:
    """In words, what distinguishes a wrong product x · weightᵀ from the right one; empty where nothing does."""
    first = step.weights[0] if step.weights else None
    if "native" not in step.params or not isinstance(first, Altered):
        return ""
    shape = weights.raw(first.weight)[2]
    if shape[0] * shape[1] <= _TRANSPOSE:
        weight = weights.get(first.weight)
        bias = step.weights[1] if len(step.weights) > 1 else None
        added = weights.get(bias) if isinstance(bias, str) else np.float32(0)
        turned = x.astype(np.float64) @ np.ascontiguousarray(weight.T).reshape(shape).T.astype(np.float64) + added
        error = np.sum((turned - theirs) ** 2) / max(float(np.sum(theirs.astype(np.float64) ** 2)), 1e-300)
        # The activations' rounding, if they have one, is not known: far nearer than the right layout is near enough.
        if error <= max(limit, nmse * 1e-3):
            return f"it is the product with {first.weight} read transposed"
        without = x.astype(np.float64) @ weight.T.astype(np.float64)
        if isinstance(bias, str) and np.sum((without - theirs) ** 2) <= max(limit, nmse * 1e-3) * np.sum(without**2):
            return f"it is the product without {bias}"
    if nmse <= _ROUNDING:
        return "every element is near: rounding of inputs, or a detail of the weight's format, not its layout"
    return "not rounding: rows, layout or format of the weight, or its bias"
