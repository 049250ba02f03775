"""What a wrong operation looks like, in words: which other operation it would be."""

import numpy as np
from numpy.typing import NDArray

from engine import ops
from engine.graph import Altered, Step, WeightSource

_TRANSPOSE = 1 << 24  # elements of a weight that is tried as read transposed: 64 MiB
# Rounding of activations to 8 bits costs 2e-5 … 3e-4 (NMSE of one product, every 4- to 8-bit type): this is ten times that.
_ROUNDING = 3e-3


def look_of(
    step: Step, x: NDArray[np.float32], theirs: NDArray[np.float32], weights: WeightSource, nmse: float, limit: float
) -> str:
    """What distinguishes a wrong operation from the right one, given its first input [T, n]; empty where nothing does."""
    if "native" in step.params:
        return _product(step, x, theirs, weights, nmse, limit)
    if step.op is ops.rms_norm:
        return _norm(step, x, theirs, weights, limit)
    return ""


def _norm(step: Step, x: NDArray[np.float32], theirs: NDArray[np.float32], weights: WeightSource, limit: float) -> str:
    """Solves 1 / sqrt(mean(x²) + ε) for ε, row by row."""
    if float(np.sum((x.astype(np.float64) - theirs) ** 2)) <= limit * float(np.sum(theirs.astype(np.float64) ** 2)):
        return "its output is its input: not normalised"
    wide = x.astype(np.float64)
    scaled = wide * weights.get(str(step.weights[0]))
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = np.einsum("ij,ij->i", theirs.astype(np.float64), scaled) / np.einsum("ij,ij->i", scaled, scaled)
        eps = float(np.median(1 / scale**2 - np.mean(wide**2, axis=1)))
    if not np.isfinite(eps):
        return ""
    again = ops.rms_norm(x, weights.get(str(step.weights[0])), eps=max(eps, 0.0))
    error = np.sum((again.astype(np.float64) - theirs) ** 2) / max(float(np.sum(theirs.astype(np.float64) ** 2)), 1e-300)
    if error > limit:
        return ""
    return f"it is right with an epsilon of {eps:.2g} instead of {step.params['eps']:.2g}"


def _product(
    step: Step, x: NDArray[np.float32], theirs: NDArray[np.float32], weights: WeightSource, nmse: float, limit: float
) -> str:
    """In words, what distinguishes a wrong product x · weightᵀ from the right one; empty where nothing does."""
    first = step.weights[0]
    if not isinstance(first, Altered):
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
