"""Faults with a wrong number (an epsilon, a scale, a base, a multiplier), which is fitted to the first place's records in a few passes."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from msgspec import Struct

from checkpoints.points import LOGITS, OUTPUT_NORM, parse
from engine.backend import Array
from engine.faults import AT, FITTED, FITTED_PARTS, Fitted
from engine.inapplicable import NotApplicable

from ...laws.beside import AS_NOISE, AS_WELL
from ..records.records import Floats
from .first_place import AtFirstPlace
from .screening import Screening
from .state import Candidate, Layers, SearchState

_STEP = 1e-2  # size of the first step away from a start, on the fit's own scale; from a start near the right number, half the way to it
_ROUNDS = 10  # passes after which a fit ends
# For a fit to continue, a small change of the number must be able to remove this part of the error at the first place: a scale
# that is wrong by a factor of three still has a third of its error along its own derivative.
_PROMISING = 0.3
_KEPT = 12  # fits that continue after the first passes …
_OF_ONE = 2  # … of which so many may be of one fault at one place, from different starts
_SLACK = 10.0  # as `batch._SLACK`: products over few rows round differently
_DIGITS = (1, 2, 3, 4, 5, 6, 8)  # significant digits of a fitted number: the fewest that fit as well are taken
_ZERO = 1e-4  # a fitted factor below this is tried as 0 first
_NEAR = 0.01  # part of the error that a fit may leave for round numbers near it to be tried
_AGAIN = 3  # times that a number is fitted again if it leaves an error at a later place


class _Trial(Struct):
    """One number while it is being fitted, `at` on the fit's scale; residuals are float64 vectors."""

    fit: Fitted
    parameters: dict[str, Any]
    at: float
    step: float = _STEP
    best: float = np.inf
    best_at: float = np.nan
    last: tuple[float, Floats] | None = None
    done: bool = False

    def value(self, at: float) -> float:
        return float(np.exp(at)) if self.fit.positive else at

    def candidate(self, at: float, layers: Layers) -> Candidate:
        return Candidate(self.fit.fault, {self.fit.parameter: self.value(at), **self.parameters}, layers)

    def learn(self, residual: Floats) -> None:
        """Take the residual of the current value, and choose the next value: the secant of the last two, by least squares."""
        error = float(residual @ residual)
        if not np.isfinite(error):
            self.done = True
            return
        if error < self.best:
            self.best, self.best_at = error, self.at
        if self.last is None:
            self.last = self.at, residual
            self.at += self.step
            return
        before, old = self.last
        slope = (residual - old) / (self.at - before) if self.at != before else np.zeros_like(residual)
        steep = float(slope @ slope)
        if steep == 0 or not np.isfinite(steep):
            self.done = True
            return
        move = float(np.clip(-(slope @ residual) / steep, -2.0, 2.0))
        self.last = self.at, residual
        self.at += move
        self.done = abs(move) < 1e-9 * max(1.0, abs(self.at))


class Fitting(AtFirstPlace):
    """Fits numbers at a state's first place, in one scope of layers."""

    def __init__(self, screening: Screening, state: SearchState, layers: Layers, fits: Sequence[Fitted] = FITTED) -> None:
        super().__init__(screening, state, layers)
        self._fits = fits
        looks_ahead = any(candidate.fault.whole for candidate in state.faults)
        self._rows = screening.rows if looks_ahead else screening.enough(self._first.row + 2)

    def states(self) -> Iterator[SearchState]:
        """States that get beyond the first place by a fitted number; each fault once, with as few digits as suffice."""
        entry = self._entry
        if entry.point in self._state.shown or self._state.root is not None:
            return
        for trial in self._converged(self._promising()):
            state = self._checked(trial)
            if state is not None:
                yield state
            if self._screening.budget.over():
                return

    def _trials(self) -> Iterator[_Trial]:
        right = self._state.planting.right
        for fit in self._fits:
            if self._layers is not None and fit.fault.once:
                continue
            first = {fit.of_row: int(self._screening.positions[self._first.row])} if fit.of_row else {}
            if 0 in first.values():
                continue
            for others in fit.variants(right):
                parameters = {**others, **first}
                kinds = parameters.get(AT, fit.fault.kinds)
                if self._layers is not None and not _in_layers(kinds, self._layers, right):
                    continue
                # An expert's fault shows only in the layers that choose it.
                rare = fit in FITTED_PARTS
                if not self._acts(kinds) or (self._layers is None and not rare and self._agrees_elsewhere(kinds)):
                    continue
                wanted = fit.wanted(right, parameters)
                for start in fit.starts(0.0 if wanted is None else wanted):
                    if start > 0 and fit.positive:
                        near = _STEP if not wanted or wanted == start else min(_STEP, abs(float(np.log(start / wanted))) / 2)
                        yield _Trial(fit, parameters, float(np.log(start)), near)
                    elif not fit.positive:
                        yield _Trial(fit, parameters, start)

    def _acts(self, kinds: Sequence[str]) -> bool:
        """Whether a fault of these kinds of step can act at the first place."""
        cone = self._screening.cone(self._state)
        return not cone.sure or not cone.kinds.isdisjoint(kinds)

    def _agrees_elsewhere(self, kinds: Sequence[str]) -> bool:
        """Whether a layer before those in question has such a step: a fault in all layers would have shown there."""
        layers = self._screening.suspects(self._state)
        right = self._state.planting.right
        if not layers and parse(self._entry.point).kind in (OUTPUT_NORM, LOGITS):  # every layer is right
            return any(f"blk.{layer}.{kind}" in right for kind in kinds for layer in range(self._screening.n_layers))
        has_step = [any(f"blk.{layer}.{kind}" in right for kind in kinds) for layer in range(layers[-1] + 1)] if layers else []
        return bool(layers) and layers[0] > 0 and (any(has_step[: layers[0]]) or not any(has_step))

    def _promising(self) -> list[_Trial]:
        """The trials that are worth more passes: those with the least error left, and those that a small change improves most."""
        trials = list(self._trials())
        whole = [trial for trial in trials if trial.fit.whole]
        rest = [trial for trial in trials if not trial.fit.whole]
        wanted = self._residual_of_state()
        energy = float(wanted @ wanted)
        if energy == 0:  # the recorded elements are right to the bit: only a sketch or a sum differs, which cannot be fitted
            return []
        self._pass(whole)
        self._pass(rest)
        first = {id(trial): trial.last[1] for trial in rest if trial.last is not None}
        self._pass(rest)
        promising: list[tuple[float, _Trial]] = [
            (trial.best / energy, trial) for trial in whole if trial.best < (1 - _PROMISING) * energy
        ]
        for trial in rest:
            if trial.last is None or trial.done or id(trial) not in first:
                continue
            left = min(trial.best, energy)
            slope = trial.last[1] - first[id(trial)]
            steep = float(slope @ slope)
            gain = float(slope @ trial.last[1]) ** 2 / steep if steep > 0 else 0.0
            share = max(0.0, float(trial.last[1] @ trial.last[1]) - gain) / energy
            if min(share, left / energy) < 1 - _PROMISING:
                promising.append((min(share, left / energy), trial))
        return _apart([trial for _, trial in sorted(promising, key=lambda pair: pair[0])])[:_KEPT]

    def _converged(self, trials: Sequence[_Trial]) -> list[_Trial]:
        """The trials that leave no error at the first place, one for each fault and its other parameters."""
        for _ in range(_ROUNDS):
            going = [trial for trial in trials if not trial.done and not trial.fit.whole and trial.best > 0]
            if not going or self._screening.budget.over():
                break
            self._pass(going)
        trials_of: dict[str, _Trial] = {}
        wanted = self._residual_of_state()
        for trial in sorted(trials, key=lambda trial: trial.best):
            if not np.isfinite(trial.best) or trial.best > _NEAR * float(wanted @ wanted):
                continue
            at = next((at for at in (trial.best_at, *self._short(trial)) if self._passes(trial, at)), None)
            if at is not None:
                trial.best_at = at
                trials_of.setdefault(f"{trial.fit.fault.name} {trial.parameters}", trial)
        return list(trials_of.values())

    def _short(self, trial: _Trial) -> Iterator[float]:
        """Round numbers near the fitted one: in an operation with steps (a table of F16) only the exact number leaves no error."""
        value = trial.value(trial.best_at)
        numbers = [float(f"{value:.{digits}g}") for digits in _DIGITS[:4]]
        if trial.fit.parameter == "scale" and value > 0:
            numbers.insert(0, round(value**-2) ** -0.5 if value < 1 else value)
        for number in numbers:
            if number and (number > 0 or not trial.fit.positive):
                yield float(np.log(number)) if trial.fit.positive else number

    def _checked(self, trial: _Trial) -> SearchState | None:
        """The state with the fitted number on all rows and points, if it gets beyond the first place."""
        first = self._state.first
        state = self._screening.check(self._state, trial.candidate(trial.best_at, self._layers))
        for _ in range(_AGAIN):
            if state is None or state.first is None or first is None or trial.fit.whole:
                break
            again = Fitting(self._screening, self._state, self._layers)
            again._entry, again._rows = self._screening.entries[state.first.point], self._screening.rows
            finer = again._refined(trial)
            better = None if finer is None else self._screening.check(self._state, finer.candidate(finer.best_at, self._layers))
            if better is None or finer is None or (better.first is not None and not state.first < better.first):
                break
            trial, state = finer, better
        if state is None or not (state.first is None or (first is not None and first < state.first)):
            return None
        return self._rounded(trial, state)

    def _refined(self, trial: _Trial) -> "_Trial | None":
        """The number fitted again at this place, starting from its value."""
        other = _Trial(trial.fit, trial.parameters, trial.best_at)
        scale = abs(trial.best_at) if not trial.fit.positive else 1.0
        self._pass([other])
        other.at = trial.best_at + 1e-4 * (scale or 1.0)
        for _ in range(_ROUNDS):
            if other.done:
                break
            self._pass([other])
        return other if np.isfinite(other.best) else None

    def _rounded(self, trial: _Trial, state: SearchState) -> SearchState:
        """The state with the number of the fewest digits that gets as far."""
        value = trial.value(trial.best_at)
        numbers = [float(f"{value:.{digits}g}") for digits in _DIGITS]
        if not trial.fit.positive and abs(value) < _ZERO:
            numbers.insert(0, 0.0)
        if trial.fit.parameter == "scaling" and 0 < value < 1:  # metadata has the factor by which positions are divided
            numbers.insert(0, 1 / round(1 / value))
        most = self._as_well(trial)
        for short in numbers:
            if short == value or (short == 0.0 and trial.fit.positive):
                continue
            at = float(np.log(short)) if trial.fit.positive else short
            if not self._passes(trial, at, most):
                continue
            parameters = {trial.fit.parameter: short, **trial.parameters}
            other = self._screening.check(self._state, Candidate(trial.fit.fault, parameters, self._layers))
            if other is not None and (other.first is None or (state.first is not None and not other.first < state.first)):
                return other
        return state

    def _as_well(self, trial: _Trial) -> float:
        """The squared error at the first place up to which another number fits as well as the one that was fitted."""
        value = self._values([trial.candidate(trial.best_at, self._layers)])[0]
        if value is None:
            return np.inf
        residual, here = self._residual(value), self._entry.rows < self._rows
        return max(AS_WELL * float(residual @ residual), AS_NOISE * float(self._entry.limit[here].sum()))

    def _passes(self, trial: _Trial, at: float, most: float = np.inf) -> bool:
        """Whether a value leaves no error at the first place but the changed steps' own noise, and at most a squared error of `most`."""
        value = self._values([trial.candidate(at, self._layers)])[0]
        if value is None:
            return False
        residual = self._residual(value)
        if not float(residual @ residual) <= most:
            return False
        entry, positions = self._entry, self._screening.positions[: self._rows]
        errors = entry.nmse(self._screening.backend.to_host(value), positions)
        here = entry.rows < self._rows
        within = bool((errors[here] <= _SLACK * entry.limit[here]).all())
        at_first = entry is self._screening.entries[self._first.point]
        return within or (at_first and self._screening.all_but_noise(self._state, errors))

    def _pass(self, trials: Sequence[_Trial]) -> None:
        """One pass: compute the residual of each trial's value at the first place."""
        values = self._values([trial.candidate(trial.at, self._layers) for trial in trials])
        for trial, value in zip(trials, values, strict=True):
            if value is None:
                trial.done = True
            else:
                trial.learn(self._residual(value))

    def _values(self, candidates: Sequence[Candidate]) -> list[Array | None]:
        """Each candidate's value of the first rows at the first place; None if it changes nothing there, or does not apply."""
        name = self._entry.point
        end = self._state.order[name] + 1
        edits, numbers = [], []
        for number, candidate in enumerate(candidates):
            try:
                edit = self._state.planting.edits(candidate.fault, candidate.layers, candidate.parameters, end)
            except NotApplicable:
                continue
            if edit:
                edits.append(edit)
                numbers.append(number)
        results: list[Array | None] = [None] * len(candidates)
        if not edits or self._screening.budget.over():
            return results
        self._screening.tried.count([candidates[number] for number in numbers])
        replay = self._screening.replay(self._state, self._rows)
        run = replay.run_batch(edits, end, frozenset(), lambda _name, _values: (), self._screening.budget.over)
        for number, values in zip(numbers, run, strict=True):
            results[number] = values.get(name) if values else None
        return results

    def _residual(self, value: Array) -> Floats:
        """The error left at the recorded elements of the first rows, in proportion to each record's size: float64 [n]."""
        return self._entry.residual(self._screening.backend.to_host(value), self._screening.positions[: self._rows])

    def _residual_of_state(self) -> Floats:
        name = self._entry.point
        return self._residual(self._screening.replay(self._state, self._rows).values[name])


def _apart(trials: Sequence[_Trial]) -> list[_Trial]:
    """The trials, without those of the same fault and place that converge to the same number, and at most `_OF_ONE` of each: a factor
    of a result is reached from every start, and would displace other faults.
    """
    kept: list[_Trial] = []
    for trial in trials:
        same = [other for other in kept if other.fit is trial.fit and other.parameters == trial.parameters]
        near = any(abs(other.at - trial.at) <= _STEP * max(1.0, abs(trial.at)) for other in same)
        if not near and len(same) < _OF_ONE:
            kept.append(trial)
    return kept


def _in_layers(kinds: Sequence[str], layers: Sequence[int], right: Any) -> bool:
    """Whether the first of these layers has a step of one of these kinds, or the kinds are operations of ggml's."""
    return any(f"blk.{layers[0]}.{kind}" in right or kind.isupper() for kind in kinds)


def fitted(screening: Screening, state: SearchState, layers: Layers, fits: Sequence[Fitted] = FITTED) -> list[SearchState]:
    """States in which a fitted number gets beyond the state's first place."""
    if state.first is None:
        return []
    return list(Fitting(screening, state, layers, fits).states())


def order_of_number(candidate: Candidate) -> int | None:
    """The index of a candidate's fault in the list of fitted faults; None for other faults."""
    for place, fit in enumerate((*FITTED, *FITTED_PARTS)):
        if fit.fault.name == candidate.fault.name and isinstance(candidate.parameters.get(fit.parameter), float):
            return place
    return None


def remarks(candidate: Candidate, right: Any) -> str:
    """The remarks on a candidate's fitted number; "" for a fault without one."""
    fits = [fit for fit in (*FITTED, *FITTED_PARTS) if fit.fault is candidate.fault] or [
        fit for fit in (*FITTED, *FITTED_PARTS) if fit.fault.name == candidate.fault.name
    ]
    for fit in fits:
        value = candidate.parameters.get(fit.parameter)
        if isinstance(value, float):
            return fit.remarks(value, right, candidate.parameters)
    return ""
