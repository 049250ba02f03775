"""Single elements of a product, recomputed directly from the weight's row: without a matrix there is no layout to get wrong.

A product that differs slightly in all elements shows rounding; one with entirely different elements was read with a
wrong leading dimension, layout or row.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from math import prod, sqrt
from typing import Any
from zlib import crc32

import numpy as np
from msgspec import Struct, field
from numpy.typing import NDArray

from checkpoints.answers.isolate import Element
from checkpoints.errors import InputError
from checkpoints.points import LOGITS, parse
from engine.graph import Altered, Step, WeightSource, compute, viewed
from engine.replay.products import product
from engine.weights.rounding import Q4_1, Q5_1, q8_1_correction, round_activations

from .values import RecordedValue, seen_scores

_FEW_OUTPUTS = 16
_SAMPLES = 8  # elements of each product: a wrong layout leaves hardly any element in place


class Sample(Struct, frozen=True):
    """Rows t of the input and rows o of the weight whose dot products are computed: two int64 [n]."""

    t: NDArray[np.int64]
    o: NDArray[np.int64]

    @staticmethod
    def of(name: str, positions: int, width: int) -> "Sample":
        """The elements for a product of this name and size, always the same ones, the corners among them."""
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


def typical_energy(x: NDArray[np.float32], weights: WeightSource, name: str) -> NDArray[np.float64] | None:
    """The average sum of squares over a product's outputs if its terms had random signs: [T, in] -> float64 [T].

    A product with few outputs (a gate of one number per position) may cancel to almost nothing, but its rounding error does not.
    None if there are many outputs, which don't all cancel at once.
    """
    outputs = prod(weights.raw(name)[2][:-1])  # 1 for a weight that is a vector
    if outputs > _FEW_OUTPUTS:
        return None
    squares = weights.rows(name, np.arange(outputs)).astype(np.float64) ** 2
    energy: NDArray[np.float64] = (x.astype(np.float64) ** 2 @ squares.T).sum(axis=1)
    return energy


def energy_of_scores(
    score: Callable[[Sequence[NDArray[Any]]], NDArray[Any]], inputs: Sequence[NDArray[np.float32]], positions: NDArray[np.int64]
) -> NDArray[np.float64] | None:
    """The sum of squares of a position's scores up to its own if their terms had random signs: float64 [T].

    The few scores of the first positions may cancel to almost nothing as well. None if the squares are too large for `score`, which
    makes scores [H, T, S] of queries and keys.
    """
    energy: NDArray[np.float64] = seen_scores(score([np.square(given, dtype=np.float64) for given in inputs]), positions)
    energy = energy.sum(axis=(0, 2), dtype=np.float64)
    return energy if np.isfinite(energy).all() else None


def least_energy(
    step: Step, inputs: Sequence[NDArray[np.float32]], positions: NDArray[np.int64], weights: WeightSource
) -> NDArray[np.float64] | None:
    """What a row's sum of squares would be if the terms of its products had random signs, float64 [T]; None if that is not needed.

    A gate of one number and the few scores of the first positions may cancel to almost nothing, but their rounding error does not.
    """
    if parse(step.makes).kind == "kq" and not any(step.weights):
        return energy_of_scores(partial(compute, step, weights=weights), inputs, positions)
    if step.op is not product or not isinstance(step.weights[0], Altered):
        return None
    return typical_energy(viewed(step.reads[0], inputs[0]), weights, step.weights[0].weight)


def sampled_error(
    step: Step, inputs: Sequence[NDArray[np.float32]], dumped: NDArray[np.float32], weights: WeightSource
) -> float | None:
    """The largest error of single elements of a step's recorded value, as `sample_product` gives it; None if it is no product."""
    if "native" not in step.params or not isinstance(step.weights[0], Altered):
        return None
    chosen = Sample.of(step.makes, *dumped.shape)
    bias = step.weights[1] if len(step.weights) > 1 else None
    added = weights.get(bias) if isinstance(bias, str) else None
    x = viewed(step.reads[0], inputs[0])
    return sample_product(chosen, x, dumped, weights, step.weights[0].weight, added, native=bool(step.params["native"]))


def sample_product(
    chosen: Sample,
    x: NDArray[np.float32],
    dumped: NDArray[np.float32],
    weights: WeightSource,
    name: str,
    bias: NDArray[np.float32] | None,
    *,
    native: bool,
) -> float:
    """The largest error of the chosen elements of a product, relative to ‖x‖·‖w‖."""
    dots, size = dot_products(chosen, x, weights, name, bias, native=native)
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.abs(dumped[chosen.t, chosen.o].astype(np.float64) - dots) / size
    return float(np.nan_to_num(error, nan=0.0, posinf=np.inf).max())


class RowChecks(Struct):
    """Recomputes chosen logits at the last position of each pass (`--rows`).

    Raises:
        InputError: a row that the output matrix doesn't have.
    """

    rows: Sequence[int]
    definitions: Sequence[Sequence[Step]]
    weights: WeightSource
    limit: float
    elements: list[Element] = field(default_factory=list)
    _steps: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.rows:
            return
        heads = [[step for step in steps if step.makes == LOGITS] for steps in self.definitions]
        if not all(steps and "native" in steps[0].params for steps in heads):
            raise InputError(
                "--rows needs logits that are a product with the output matrix; this model computes them differently.",
                "Leave --rows out.",
                code="rows",
            )
        self._steps = [steps[0] for steps in heads]
        count = self.weights.raw(self._matrix(self._steps[0]))[2][0]
        if wrong := [row for row in self.rows if not 0 <= row < count]:
            raise InputError(f"--rows {wrong[0]} is outside the output matrix.", f"Its rows are 0…{count - 1:,}.", code="rows")

    @staticmethod
    def _matrix(step: Step) -> str:
        first = step.weights[0]
        return first.weight if isinstance(first, Altered) else str(first)

    def watch(self, arriving: Iterable[tuple[str, RecordedValue]]) -> Iterator[tuple[str, RecordedValue]]:
        """The same values, with the logits' input kept until they come."""
        wanted = self._steps[0].reads[0] if self.rows else ""
        before: RecordedValue | None = None
        for name, value in arriving:
            if name == wanted:
                before = value
            elif name == LOGITS and self.rows and before is not None and len(before.positions) == len(value.positions):
                self._check(before, value)
            yield name, value

    def _check(self, before: RecordedValue, logits: RecordedValue) -> None:
        chosen = Sample(np.full(len(self.rows), len(logits.positions) - 1), np.array(self.rows, dtype=np.int64))
        dumped = logits.data[chosen.t, chosen.o].astype(np.float64)
        best: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None
        for step in self._steps:
            bias = step.weights[1] if len(step.weights) > 1 else None
            added = self.weights.get(bias) if isinstance(bias, str) else None
            native = bool(step.params.get("native"))
            dots, size = dot_products(chosen, before.data, self.weights, self._matrix(step), added, native=native)
            error = np.nan_to_num(np.abs(dumped - dots) / size, nan=np.inf)
            if best is None or error.max() < best[1].max():
                best = dots, error
        for row, value, dot, off in zip(self.rows, dumped, *(best or ((), ())), strict=True):
            # The limit is of a squared error.
            right = bool(off <= sqrt(self.limit))
            self.elements.append(Element(row, int(logits.positions[-1]), float(value), float(dot), float(off), right))
