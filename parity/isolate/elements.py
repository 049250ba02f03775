"""Single elements of a product recomputed straight from the weight's row: no matrix, no layout, nothing to get wrong.

A product that differs in all elements by a little is rounding; one whose single elements are other numbers was read with a
wrong leading dimension, layout or row.
"""

from dataclasses import dataclass
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from engine.graph import WeightSource
from engine.weights.rounding import Q4_1, Q5_1, q8_1_correction, round_activations

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
