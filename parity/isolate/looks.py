"""Describes a wrong operation in words: which other operation would give its values."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoints.points import parse
from engine import ops
from engine.graph import Altered, Step, WeightSource

_LARGEST = 1 << 24  # most elements of a weight for which other readings are tried: 128 MiB as float64
_MOST_TRIED = 8 * _LARGEST  # elements of other weights that are tried for one operation
# The largest share of the error that a look may leave. A choice: the right one leaves only rounding, any other nearly all of it.
_FAR_NEARER = 1e-3
# Rounding of activations to 8 bits costs 2e-5 … 3e-4 (NMSE of one product, every 4- to 8-bit type): this is ten times that.
_ROUNDING = 3e-3
# A few outputs are wrong by themselves if so small a share of them holds so large a share of the error, and each is far off: rounding
# is spread over all outputs, or in proportion to their own values. The shares are choices.
_FEW, _MOST = 0.1, 0.9
_NAMED = 4  # outputs that are named
OF_THE_WEIGHT = "not rounding: rows, layout or format of the weight, or its bias"


@np.errstate(all="ignore")  # a foreign engine's values may be infinite, or as large as they like
def look_of(
    step: Step,
    x: NDArray[np.float32],
    dumped: NDArray[np.float32],
    weights: WeightSource,
    nmse: float,
    limit: float,
    siblings: Sequence[str] = (),
) -> str:
    """What distinguishes a wrong operation from the right one, given its first input [T, n]; empty if nothing is found.

    `siblings` are other weights, one of which may have been taken instead, the likeliest first.
    """
    if not np.isfinite(dumped).all():
        return ""
    if "native" in step.params:
        return _product(step, x, dumped, weights, nmse, limit, siblings)
    if step.op in (ops.rms_norm, ops.layer_norm) and x.size == dumped.size:
        return _norm(step, x, dumped, weights, limit, siblings)
    return ""


def siblings(step: Step, steps: Sequence[Step]) -> list[str]:
    """Weights of other operations of a step's kind: of the same layer, then of the same place in the nearest layers."""
    here, product = parse(step.makes), isinstance(next(iter(step.weights), None), Altered)
    near: list[tuple[int, str]] = []
    for other in steps:
        first, place = next(iter(other.weights), None), parse(other.makes)
        if other is step or (place.layer != here.layer and (place.kind != here.kind or None in (place.layer, here.layer))):
            continue
        away = abs((place.layer or 0) - (here.layer or 0))
        if product and isinstance(first, Altered):
            near.append((away, first.weight))
        elif not product and isinstance(first, str) and other.op is step.op:
            near.append((away, first))
    return [name for _, name in sorted(near, key=lambda pair: pair[0])]


def _norm(
    step: Step,
    x: NDArray[np.float32],
    dumped: NDArray[np.float32],
    weights: WeightSource,
    limit: float,
    siblings: Sequence[str],
) -> str:
    if _error(x.reshape(dumped.shape), dumped) <= limit:
        return "its output is its input: not normalised"
    eps = other_epsilon(step, x, dumped, weights, limit)
    if eps is not None and eps != float(f"{step.params['eps']:.2g}"):
        return f"it is right with an epsilon of {eps:.2g} instead of {step.params['eps']:.2g}"
    weight, *bias = (weights.get(str(name)) for name in step.weights if name is not None)
    x, dumped = x.reshape(-1, weight.size), dumped.reshape(-1, weight.size)  # each head by itself

    def is_norm(weight: NDArray[np.float32], bias: Sequence[NDArray[np.float32]]) -> bool:
        return _error(step.op(x, weight, *bias, eps=step.params["eps"]), dumped) <= limit

    if is_norm(np.ones_like(weight), bias):
        return f"it is right without {step.weights[0]}"
    if bias and is_norm(weight, ()):
        return f"it is right without {step.weights[1]}"
    if is_norm(weight + np.float32(1), bias):
        return f"it is right with 1 + {step.weights[0]}"
    for name in siblings:
        if (other := weights.get(name)).size == weight.size and is_norm(other, bias):
            return f"it is right with {name}"
    return ""


def _error(values: NDArray[Any], dumped: NDArray[np.float32]) -> float:
    """NMSE of the recorded values: Σ(values − dumped)² / Σ dumped²."""
    wide = dumped.astype(np.float64)
    return float(np.sum((values - wide) ** 2)) / max(float(np.sum(wide**2)), 1e-300)


@np.errstate(all="ignore")
def other_epsilon(
    step: Step, x: NDArray[np.float32], dumped: NDArray[np.float32], weights: WeightSource, limit: float
) -> float | None:
    """The epsilon with which a norm gives these rows, to two digits; None if none does.

    Solves 1 / sqrt(mean(x²) + ε) for ε, row by row; of a LayerNorm for the row without its mean, whose bias is taken off first.
    """
    if not np.isfinite(dumped).all():
        return None
    weight, *bias = (weights.get(str(name)) for name in step.weights if name is not None)
    x, dumped = x.reshape(-1, weight.size), dumped.reshape(-1, weight.size)  # each head by itself
    wide = x.astype(np.float64)
    if step.op is ops.layer_norm:
        wide = wide - wide.mean(axis=1, keepdims=True)
    scaled = wide * weight
    unbiased = dumped.astype(np.float64) - (bias[0] if bias else 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = np.einsum("ij,ij->i", unbiased, scaled) / np.einsum("ij,ij->i", scaled, scaled)
        eps = float(np.median(1 / scale**2 - np.mean(wide**2, axis=1)))
    if not np.isfinite(eps):
        return None
    error = _error(step.op(x, weight, *bias, eps=max(eps, 0.0)), dumped)
    return float(f"{max(eps, 0.0):.2g}") if error <= limit else None


def _product(
    step: Step,
    x: NDArray[np.float32],
    dumped: NDArray[np.float32],
    weights: WeightSource,
    nmse: float,
    limit: float,
    siblings: Sequence[str],
) -> str:
    first = step.weights[0]
    if not isinstance(first, Altered):
        return ""
    name, shape = first.weight, weights.raw(first.weight)[2]
    # It is not known whether they round activations: much closer than with the right weight is close enough.
    near = max(limit, nmse * _FAR_NEARER)
    bias = step.weights[1] if len(step.weights) > 1 else None
    wide = x.astype(np.float64)

    def is_product(weight: NDArray[np.float32], added: str | None) -> bool:
        product = wide @ weight.T.astype(np.float64) + (weights.get(added) if added is not None else 0.0)
        return _error(product, dumped) <= near

    if len(shape) == 2 and shape[0] * shape[1] <= _LARGEST:
        weight, added = weights.get(name), bias if isinstance(bias, str) else None
        if is_product(np.ascontiguousarray(weight.T).reshape(shape), added):
            return f"it is the product with {name} read transposed"
        if added is not None and is_product(weight, None):
            return f"it is the product without {added}"
        alike = [other for other in siblings if weights.raw(other)[2] == shape]
        for other in alike[: _MOST_TRIED // weight.size]:
            if is_product(weights.get(other), added):
                return f"it is the product with {other}"
    return ""


@np.errstate(all="ignore")
def error_in_words(
    step: Step, x: NDArray[np.float32], dumped: NDArray[np.float32], weights: WeightSource, nmse: float, where: str = ""
) -> str:
    """How far off a wrong operation is, if nothing says how it came about, given its first input [T, n]; empty if that says nothing.

    `where` says which elements are wrong, if that is known: the rows of a weight say more.
    """
    if not np.isfinite(dumped).all():
        return where or ("it is NaN or infinite where its inputs give numbers" if np.isfinite(x).all() else "")
    first = next(iter(step.weights), None)
    if "native" not in step.params or not isinstance(first, Altered):
        return where
    shape = weights.raw(first.weight)[2]
    if len(shape) == 2 and shape[0] * shape[1] <= _LARGEST:
        bias = step.weights[1] if len(step.weights) > 1 else None
        right = x.astype(np.float64) @ weights.get(first.weight).T.astype(np.float64)
        if few := _few_outputs(right + (weights.get(bias) if isinstance(bias, str) else 0.0), dumped):
            return few
        if nmse <= _ROUNDING and not where:
            return "every element is close: rounding of inputs, or a detail of the weight's format, not its layout"
    if where:
        return where
    if nmse <= _ROUNDING:
        return "close as a whole: rounding of inputs, a detail of the weight's format, or few of its rows; not its layout"
    return OF_THE_WEIGHT


def _few_outputs(right: NDArray[np.float64], dumped: NDArray[np.float32]) -> str:
    """Which outputs are wrong while all others are close, given the right product and the recorded one [T, out]; else empty."""
    errors = np.sum((dumped - right) ** 2, axis=0)
    if not (np.isfinite(errors).all() and errors.any()):
        return ""
    falling = np.argsort(-errors, kind="stable")
    number = int(np.searchsorted(np.cumsum(errors[falling]), _MOST * errors.sum())) + 1
    wrong = np.sort(falling[:number])
    if number > _FEW * len(errors) or (errors[wrong] <= _ROUNDING * np.sum(right[:, wrong] ** 2, axis=0)).any():
        return ""
    named = ", ".join(map(str, wrong[:_NAMED].tolist())) + (", …" if number > _NAMED else "")
    are = "is" if number == 1 else "are"
    return f"only {number:,} of {len(errors):,} outputs {are} far off ({named}): rows of the weight, or of its bias"
