"""Which of two differing sides is right: both are compared with a float64 computation of the same steps."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from checkpoints.record import Rows
from checkpoints.summary import summarise
from engine.backend import Backend
from engine.engine import Engine
from engine.graph import Step, WeightSource, sees_later
from engine.replay.disturbed import disturbed
from engine.replay.wide import Variant, coarse_points, entry_errors, is_looked_up, values_of, with_next_entries

from ..diff.measured.slices import SLICE_FLOOR

Floats = NDArray[np.float64]
# How many states that passes left behind are computed, each by a run over the tokens up to it: those of a prompt and of some steps.
_STATES = 16
_SAMPLES = 4  # runs with rounding's noise: the largest of as many is within a factor of two of what twice as many give


class Arbiter:
    """Knows the truth about one sequence: what a model's steps give in float64 for its tokens, and what float32 makes of them.

    Each is computed when it is first asked for, up to the last point that is asked for, and only those points are kept.

    Args:
        positions, passes: of each token: its position, and the number of the forward pass that it belongs to.
        given: further values that the steps read and none of them makes, in an arithmetic.
        states: it knows the states that are left behind after the last token, each a single row, and no other points.
        coarse: those of the given values that ggml computed coarsely (`coarse_points`).
    """

    def __init__(
        self,
        steps: Sequence[Step],
        weights: WeightSource,
        backend: Backend,
        tokens: Sequence[int],
        positions: Sequence[int],
        passes: Sequence[int],
        given: Callable[[Variant], Mapping[str, NDArray[Any]]] = lambda _: {},
        *,
        states: bool = False,
        coarse: Collection[str] = (),
    ) -> None:
        self._steps = tuple(steps)
        self._weights = weights
        self._backend = backend
        self._tokens = tuple(tokens)
        self._positions = np.asarray(positions, dtype=np.int64)
        self._passes = tuple(passes)
        self._given = given
        self._coarse_given = frozenset(coarse)
        self._states = states
        self._rows = self._positions[-1:] if states else self._positions  # the position of each row of a value
        self._causal = not sees_later(steps)
        # A state has no row for each position: what a run over the tokens up to a record's leaves behind is another arbiter's.
        shown = [step for step in steps if not step.inner]  # a point of llama.cpp's may be a step that only others read
        left = frozenset(step.makes for step in shown if step.axis is None)
        by_row = frozenset(step.makes for step in shown if step.axis is not None)
        self._points, self._left = (left, frozenset()) if states else (by_row, left)
        self._after: dict[int, Arbiter] = {}
        self._values: dict[Variant, dict[str, NDArray[Any]]] = {variant: {} for variant in Variant}

    @property
    def started(self) -> bool:
        """Whether anything has been computed in float64 yet."""
        return bool(self._values[Variant.WIDE])

    @cached_property
    def coarse(self) -> frozenset[str]:
        """The points that ggml itself computes coarsely (`engine.replay.wide.coarse_points`)."""
        return coarse_points(self._steps, self._coarse_given)

    @classmethod
    def of(cls, engine: Engine, tokens: Sequence[int], first: int = 0, prompt: int | None = None) -> "Arbiter":
        """The arbiter of `prompt` tokens (None: all) and those generated after them, one per pass, from position `first` on."""
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
        return self._distances(points, Variant.WIDE) | self._of_states(Arbiter.distances, points, np.nan)

    def from_table(self, points: Mapping[str, Rows]) -> dict[str, Floats]:
        """As `parity.diff.tolerances.truth.Truth.from_table`."""
        return self._distances(points, Variant.TABLED) | self._of_states(Arbiter.from_table, points, np.nan)

    def own_rounding(self, points: Mapping[str, Rows]) -> dict[str, Floats]:
        """As `parity.diff.tolerances.truth.Truth.own_rounding`."""
        known = self._known(points, Variant.EXACT)
        self._compute(known.keys(), Variant.WIDE)
        of_states = self._of_states(Arbiter.own_rounding, points, np.nan)
        return {name: self._own_rounding(rows) for name, rows in known.items()} | of_states

    def _distances(self, points: Mapping[str, Rows], variant: Variant) -> dict[str, Floats]:
        return {name: self._distance(rows, self._values[variant][name]) for name, rows in self._known(points, variant).items()}

    def _known(self, points: Mapping[str, Rows], variant: Variant) -> dict[str, Rows]:
        """Those of the points that the steps compute; their values are then known in this arithmetic."""
        known = {name: rows for name, rows in points.items() if name in self._points}
        self._compute(known.keys(), variant)
        return known

    def _own_rounding(self, rows: Rows) -> Floats:
        index, here = self._here(rows)
        distances = np.full(len(rows), np.nan)
        if here.any():
            like, rounded, truth = rows.take(here), *(self._values[of][rows.point] for of in (Variant.EXACT, Variant.WIDE))
            rounded_rows = self._recorded(like, index[here], rounded)[0]
            rounded_rows = replace(rounded_rows, sketch=None if rows.sketch is None else rounded_rows.sketch)
            distances[here] = _nmse(rounded_rows, *self._recorded(like, index[here], truth))
        return distances

    def _here(self, rows: Rows) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Which row of the values each record shows, [R], and whether it shows one at all."""
        index = rows.token_idx - self._rows[0]
        return index, (rows.seq == 0) & (index >= 0) & (index < len(self._rows))

    def _of_states(
        self, ask: Callable[["Arbiter", Mapping[str, Rows]], dict[str, Floats]], points: Mapping[str, Rows], unknown: float
    ) -> dict[str, Floats]:
        """The answer to a question for the records of states, [R] for each of their points; `unknown` where there is none."""
        known = {name: rows for name, rows in points.items() if name in self._left}
        answers = {name: np.full(len(rows), unknown) for name, rows in known.items()}
        ends = {int(position) for rows in known.values() for position in rows.token_idx[rows.seq == 0]}
        for end in sorted(ends.intersection(self._positions.tolist()))[:_STATES]:
            at = {name: np.flatnonzero((rows.seq == 0) & (rows.token_idx == end)) for name, rows in known.items()}
            taken = {name: known[name].take(where) for name, where in at.items() if len(where)}
            for name, answer in ask(self._up_to(end), taken).items():
                answers[name][at[name]] = answer
        return answers

    def _up_to(self, end: int) -> "Arbiter":
        """The arbiter of the states that the tokens up to a position leave behind."""
        if end not in self._after:
            count = end - int(self._positions[0]) + 1
            of = self._tokens[:count], self._positions[:count].tolist(), self._passes[:count]
            self._after[end] = Arbiter(self._steps, self._weights, self._backend, *of, self._given, states=True)
        return self._after[end]

    def one_entry(self, points: Mapping[str, Rows]) -> dict[str, Floats]:
        """See `parity.diff.tolerances.truth.Truth.one_entry`; 0 for records whose positions or elements are unknown."""
        return {step.makes: self._one_entry(step, points[step.makes]) for step in self._looked_up(points)}

    def largest_entry(self, points: Mapping[str, Rows]) -> dict[str, Floats]:
        """See `parity.diff.tolerances.truth.Truth.largest_entry`; 0 for records whose positions are unknown."""
        known = self._known(points, Variant.TABLED)
        moved = self._moved(known, with_next_entries(self._steps), Variant.TABLED)
        for step in self._looked_up(known):  # of the whole row, if few elements of it were recorded
            moved[step.makes] = np.fmax(moved[step.makes], self._largest_entry(step, points[step.makes]))
        return moved

    def _looked_up(self, points: Collection[str]) -> list[Step]:
        """The steps that make some of the points with a table of float16."""
        return [step for step in self._steps if step.makes in points and is_looked_up(step)]

    def _entries(self, step: Step) -> Floats:
        """How far apart neighbouring entries of a step's table are at each element, [T, n]."""
        inputs = [self._backend.array(self.value(name)) for name in step.names]
        return self._backend.to_host(entry_errors(step, inputs, self._weights)).reshape(len(self._positions), -1)

    def _largest_entry(self, step: Step, rows: Rows) -> Floats:
        index, here = self._here(rows)
        bound = np.zeros(len(rows))
        if here.any():
            error = np.square(self._entries(step)).max(axis=1)
            energy = np.square(self.value(step.makes).reshape(len(error), -1)).sum(axis=1)
            with np.errstate(divide="ignore", invalid="ignore"):
                bound[here] = np.where(energy > 0, error / energy, 0.0)[index[here]]
        return bound

    def _one_entry(self, step: Step, rows: Rows) -> Floats:
        index, here = self._here(rows)
        bound = np.zeros(len(rows))
        if rows.indices is None and here.any():
            kept = rows.take(here)
            entry = self._entries(step)
            error = np.square(entry[index[here], : kept.values.shape[1]]).sum(axis=1)
            energy = np.square(kept.values.astype(np.float64)).sum(axis=1)
            share = SLICE_FLOOR * kept.values.shape[1] / kept.stats["n"] * kept.stats["l2"] ** 2
            bound[here] = error / np.fmax(energy, share)
        return bound

    def spread(self, points: Mapping[str, Rows]) -> dict[str, Floats]:
        """As `parity.diff.tolerances.truth.Truth.spread`; records whose positions are not known have 0."""
        return self._spread(points, Variant.WIDE) | self._of_states(Arbiter.spread, points, 0.0)

    def table_spread(self, points: Mapping[str, Rows]) -> dict[str, Floats]:
        """As `parity.diff.tolerances.truth.Truth.table_spread`; records whose positions are not known have 0."""
        return self._spread(points, Variant.TABLED) | self._of_states(Arbiter.table_spread, points, 0.0)

    def _spread(self, points: Mapping[str, Rows], variant: Variant) -> dict[str, Floats]:
        """How far rounding noise moves records from the same steps without it, in the worst of some runs."""
        known = self._known(points, variant)
        worst = {name: np.zeros(len(rows)) for name, rows in known.items()}
        for seed in range(_SAMPLES):
            for name, moved in self._moved(known, disturbed(self._steps, seed), variant).items():
                worst[name] = np.fmax(worst[name], moved)
        return worst

    def _moved(self, known: Mapping[str, Rows], steps: Sequence[Step], variant: Variant) -> dict[str, Floats]:
        """How far other steps move records from the right ones: NMSE, [R]; 0 for records whose positions are not known."""
        values = self._computed(variant, steps, known.keys())
        distances = {name: np.zeros(len(rows)) for name, rows in known.items()}
        for name, rows in known.items():
            index, here = self._here(rows)
            if here.any():
                moved, _ = self._recorded(rows.take(here), index[here], values[name])
                distances[name][here] = self._distance(moved, self._values[variant][name])
        return distances

    def value(self, point: str, variant: Variant = Variant.WIDE) -> NDArray[Any]:
        """The whole value of a point in an arithmetic."""
        self._compute({point}, variant)
        return self._values[variant][point]

    def _compute(self, wanted: Collection[str], variant: Variant) -> None:
        if missing := set(wanted) - self._values[variant].keys():
            self._values[variant] |= self._computed(variant, self._steps, missing)

    def _computed(self, variant: Variant, steps: Sequence[Step], wanted: Collection[str]) -> dict[str, NDArray[Any]]:
        positions, given = self._positions.tolist(), self._given(variant)
        of = self._tokens, positions, self._passes, self._weights, self._backend
        values = values_of(variant, steps, *of, wanted, given)
        return {name: value.reshape(1, -1) for name, value in values.items()} if self._states else values

    def record(self, rows: Rows) -> Rows:
        """The truth as a dump would record it, under the keys of some records (one of a state's), rounded to float32.

        Raises:
            KeyError: a point that was not requested before.
        """
        if rows.point in self._left:
            return self._up_to(int(rows.token_idx[0])).record(rows)
        return self._recorded(rows, rows.token_idx - self._rows[0], self._values[Variant.WIDE][rows.point])[0]

    def _distance(self, rows: Rows, truth: NDArray[Any]) -> Floats:
        index, here = self._here(rows)
        distances = np.full(len(rows), np.nan)
        if here.any():
            distances[here] = _nmse(rows.take(here), *self._recorded(rows.take(here), index[here], truth))
        return distances

    def _recorded(self, rows: Rows, index: NDArray[np.int64], values: NDArray[Any]) -> tuple[Rows, Rows | None]:
        """What a dump would record of values, as the sum of two float32 records: the rounded values, and the remainder if there is one."""
        size = None if rows.indices is not None else int(rows.values.shape[1])
        with np.errstate(over="ignore", invalid="ignore"):
            high = values.astype(np.float32)
            low = np.where(np.isfinite(high), values - high, 0.0).astype(np.float32) if values.dtype != np.float32 else None
        first, causal = int(self._rows[0]), self._causal

        def recorded(part: NDArray[np.float32]) -> Rows:
            part = np.ascontiguousarray(part)
            return summarise(rows.point, part, self._rows, slice_size=size, keep=index, first=first, causal=causal)

        return recorded(high), None if low is None else recorded(low)


def _nmse(rows: Rows, high: Rows, low: Rows | None) -> Floats:
    """NMSE of records against the sum of others of the same keys: [R]; the slice's floor is that of `slices`."""
    values = rows.values.astype(np.float64)
    present = np.arange(values.shape[1])[None, :] < rows.counts[:, None]
    wanted = _elements(high, rows) + (0.0 if low is None else _elements(low, rows))
    finite = np.isfinite(values) & np.isfinite(wanted)
    use = present & finite
    delta = np.where(use, values, 0.0) - np.where(use, wanted, 0.0)
    if rows.quantum is not None:
        delta[np.abs(delta) <= rows.quantum / 2] = 0.0
    right = np.where(use, wanted, 0.0)
    n, l2 = high.stats["n"], high.stats["l2"]
    energy = np.fmax(np.einsum("ij,ij->i", right, right), SLICE_FLOOR * use.sum(axis=1) / n * l2**2)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        error = np.where(use.any(axis=1), np.einsum("ij,ij->i", delta, delta) / energy, np.nan)
        if rows.sketch is not None and high.sketch is not None and rows.quantum is None:
            rest = 0.0 if low is None or low.sketch is None else low.sketch
            apart = rows.sketch.astype(np.float64) - (high.sketch.astype(np.float64) + rest)
            error = np.fmax(error, np.mean(apart**2, axis=1) / l2**2)
    one_sided = present & (np.isfinite(values) != np.isfinite(wanted))
    error[one_sided.any(axis=1)] = np.inf
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
