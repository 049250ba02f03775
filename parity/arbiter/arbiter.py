"""Which of two differing sides is right: both are compared with a float64 computation of the same steps."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoints.record import Rows
from checkpoints.summary import summarise
from engine.backend import Backend
from engine.engine import Engine
from engine.graph import Step, WeightSource, sees_later
from engine.replay.disturbed import disturbed
from engine.replay.wide import coarse_points, entry_errors, is_looked_up, wide_values

from ..diff.slices import SLICE_FLOOR

Floats = NDArray[np.float64]
_SAMPLES = 4  # runs with rounding's noise: the largest of as many is within a factor of two of what twice as many give


class Arbiter:
    """Knows the truth about one sequence: the values of a model's steps for its tokens, in float64.

    It is computed on the first request, up to the last point requested, and only the requested points are kept.

    Args:
        positions, passes: for each token, its position and the number of its forward pass.
        given: further float64 values that the steps read and none of them computes.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        weights: WeightSource,
        backend: Backend,
        tokens: Sequence[int],
        positions: Sequence[int],
        passes: Sequence[int],
        given: Callable[[], Mapping[str, NDArray[Any]]] = dict,
    ) -> None:
        self._steps = tuple(steps)
        self._weights = weights
        self._backend = backend
        self._tokens = tuple(tokens)
        self._positions = np.asarray(positions, dtype=np.int64)
        self._passes = tuple(passes)
        self._given = given
        # A state after a pass has no row for each position, and other passes leave it at other positions; an encoder's scores have rows
        # of other lengths than a decoder's.
        whole = sees_later(steps)
        self._points = frozenset(step.makes for step in steps if step.axis == 0 or (step.axis == 1 and not whole))
        self._truth: dict[str, NDArray[np.float64]] = {}

    @property
    def asked(self) -> bool:
        """Whether anything has been computed in float64 yet."""
        return bool(self._truth)

    @cached_property
    def coarse(self) -> frozenset[str]:
        """The points that ggml itself computes coarsely (`engine.replay.wide.coarse_points`)."""
        return coarse_points(self._steps)

    @classmethod
    def of(cls, engine: Engine, tokens: Sequence[int], first: int = 0, prompt: int | None = None) -> "Arbiter":
        """The arbiter of a prompt of so many tokens (None: all) and the tokens generated after it, one a pass, from position `first` on."""
        length = len(tokens) if prompt is None else prompt
        passes = [max(0, row - length + 1) for row in range(len(tokens))]
        positions = range(first, first + len(tokens))
        return cls(engine.steps, engine.weights, engine.backend, tokens, positions, passes)

    def distances(self, points: Mapping[str, Rows]) -> dict[str, Floats]:
        """How far records are from the truth: their NMSE, float64 [R] for each point.

        It is the NMSE of the recorded elements or, if larger, the estimate for the whole row from the sketch; infinite if
        a value is not finite and the truth is. NaN for a record of another sequence or of a position without a token. Points
        that the steps do not compute are left out.
        """
        known = {name: rows for name, rows in points.items() if name in self._points}
        self._compute(known.keys() - self._truth.keys())
        return {name: self._distance(rows, self._truth[name]) for name, rows in known.items()}

    def one_entry(self, points: Mapping[str, Rows]) -> dict[str, Floats]:
        """See `parity.diff.truth.Truth.one_entry`; 0 for records whose positions or elements are unknown."""
        tables = {step.makes: step for step in self._steps if step.makes in points and is_looked_up(step)}
        return {name: self._one_entry(step, points[name]) for name, step in tables.items()}

    def _one_entry(self, step: Step, rows: Rows) -> Floats:
        index = rows.token_idx - self._positions[0]
        here = (rows.seq == 0) & (index >= 0) & (index < len(self._positions))
        bound = np.zeros(len(rows))
        if rows.indices is None and here.any():
            kept = rows.take(here)
            inputs = [self._backend.array(self.value(name)) for name in step.names]
            entry = self._backend.to_host(entry_errors(step, inputs, self._weights)).reshape(len(self._positions), -1)
            error = np.square(entry[index[here], : kept.values.shape[1]]).sum(axis=1)
            energy = np.square(kept.values.astype(np.float64)).sum(axis=1)
            share = SLICE_FLOOR * kept.values.shape[1] / kept.stats["n"] * kept.stats["l2"] ** 2
            bound[here] = error / np.fmax(energy, share)
        return bound

    def spread(self, points: Mapping[str, Rows]) -> dict[str, Floats]:
        """As `parity.diff.truth.Truth.spread`; records whose positions are not known have 0."""
        known = {name: rows for name, rows in points.items() if name in self._points}
        self._compute(known.keys() - self._truth.keys())
        worst = {name: np.zeros(len(rows)) for name, rows in known.items()}
        for seed in range(_SAMPLES):
            values = self._wide(disturbed(self._steps, seed), known.keys())
            for name, rows in known.items():
                index = rows.token_idx - self._positions[0]
                here = (rows.seq == 0) & (index >= 0) & (index < len(self._positions))
                if here.any():
                    moved, _ = self._recorded(rows.take(here), index[here], values[name])
                    worst[name][here] = np.fmax(worst[name][here], self._distance(moved, self._truth[name]))
        return worst

    def value(self, point: str) -> NDArray[np.float64]:
        """The whole value of a point."""
        self._compute({point} - self._truth.keys())
        return self._truth[point]

    def _compute(self, missing: Collection[str]) -> None:
        if missing:
            self._truth |= self._wide(self._steps, missing)

    def _wide(self, steps: Sequence[Step], wanted: Collection[str]) -> dict[str, NDArray[Any]]:
        positions, given = self._positions.tolist(), self._given()
        return wide_values(steps, self._tokens, positions, self._passes, self._weights, self._backend, wanted, given)

    def record(self, rows: Rows) -> Rows:
        """The truth as a dump would record it, under the keys of some records, rounded to float32.

        Raises:
            KeyError: a point that was not requested before.
        """
        return self._recorded(rows, rows.token_idx - self._positions[0], self._truth[rows.point])[0]

    def _distance(self, rows: Rows, truth: NDArray[np.float64]) -> Floats:
        index = rows.token_idx - self._positions[0]
        here = (rows.seq == 0) & (index >= 0) & (index < len(self._positions))
        distances = np.full(len(rows), np.nan)
        if here.any():
            distances[here] = _nmse(rows.take(here), *self._recorded(rows.take(here), index[here], truth))
        return distances

    def _recorded(self, rows: Rows, index: NDArray[np.int64], truth: NDArray[np.float64]) -> tuple[Rows, Rows]:
        """The truth as a dump would record it, as the sum of two float32 records: the rounded value and the rest."""
        size = None if rows.indices is not None else int(rows.values.shape[1])
        with np.errstate(over="ignore", invalid="ignore"):
            high = truth.astype(np.float32)
            low = np.where(np.isfinite(high), truth - high, 0.0).astype(np.float32)
        first = int(self._positions[0])
        recorded = [
            summarise(rows.point, np.ascontiguousarray(part), self._positions, slice_size=size, keep=index, first=first)
            for part in (high, low)
        ]
        return recorded[0], recorded[1]


def _nmse(rows: Rows, high: Rows, low: Rows) -> Floats:
    """NMSE of records against the sum of two others of the same keys: [R]; the slice's floor is the one in `slices`."""
    values = rows.values.astype(np.float64)
    present = np.arange(values.shape[1])[None, :] < rows.counts[:, None]
    wanted = _elements(high, rows) + _elements(low, rows)
    finite = np.isfinite(values) & np.isfinite(wanted)
    use = present & finite
    delta = np.where(use, values - wanted, 0.0)
    if rows.quantum is not None:
        delta[np.abs(delta) <= rows.quantum / 2] = 0.0
    right = np.where(use, wanted, 0.0)
    n, l2 = high.stats["n"], high.stats["l2"]
    energy = np.fmax(np.einsum("ij,ij->i", right, right), SLICE_FLOOR * use.sum(axis=1) / n * l2**2)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        error = np.where(use.any(axis=1), np.einsum("ij,ij->i", delta, delta) / energy, np.nan)
        if rows.sketch is not None and high.sketch is not None and low.sketch is not None and rows.quantum is None:
            apart = rows.sketch.astype(np.float64) - (high.sketch.astype(np.float64) + low.sketch)
            error = np.fmax(error, np.mean(apart**2, axis=1) / l2**2)
    odd = present & (np.isfinite(values) != np.isfinite(wanted))
    error[odd.any(axis=1)] = np.inf
    return error


def _elements(whole: Rows, like: Rows) -> Floats:
    """The elements of some records at the places recorded by others: float64 [R, k]; NaN where there are none."""
    width = like.values.shape[1]
    if like.indices is not None:
        index = np.clip(like.indices, 0, whole.values.shape[1] - 1)
        return np.take_along_axis(whole.values, index, axis=1).astype(np.float64)
    elements = np.full((len(like), width), np.nan)
    elements[:, : whole.values.shape[1]] = whole.values
    return elements
