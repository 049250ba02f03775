"""Two faults in front of one checkpoint: neither gets past it alone, so they are tried together.

Only the steps up to the first difference are computed, for the first differing position, and only in one layer. What one
fault makes there is computed once, and every other one is planted on top of it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from engine.backend import Array
from engine.faults import AT, Planting
from engine.graph import Step
from engine.replay import Replay

from .explain_screening import NOT_ALLOWED, Screening
from .explain_state import Candidate, Layers, State, unchanged_steps

Pair = tuple[Candidate, Candidate]


@dataclass(frozen=True)
class _Effect:
    """What a candidate alone leaves of the error (NMSE), and all candidates that make the same values."""

    error: float
    alike: list[Candidate]

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of step that it changes."""
        first = self.alike[0]
        return frozenset(first.parameters.get(AT, first.fault.kinds))


class Pairs:
    """Tries two candidates at once at a state's first place: in one layer, or (None) outside the layers.

    Raises:
        ValueError: the state has no place that differs.
    """

    def __init__(self, screening: Screening, state: State, layers: Layers) -> None:
        if state.first is None:
            raise ValueError("nothing is left to explain")
        self._screening = screening
        self._state = state
        self._layers = layers
        self._first = state.first
        self._entry = screening.entries[state.first.point]
        self._limit = float(self._entry.limit[self._entry.rows == state.first.row].max())
        self._middles: dict[tuple[int, int], tuple[State, Replay]] = {}

    def found(self) -> Iterator[list[Pair]]:
        """Pairs that leave nothing at the first place, those of the same values together; the likely ones first."""
        effects = sorted(self._effects(), key=lambda effect: effect.error)
        for total in range(1, 2 * len(effects) - 2):  # those that take most of the error away, by rank, come first
            for one in range(max(0, total - len(effects) + 1), (total + 1) // 2):
                if self._screening.out_of_time():
                    return
                both = self._together(effects, one, total - one)
                if both:
                    yield both

    def _together(self, effects: list[_Effect], one: int, other: int) -> list[Pair]:
        """All pairs of two effects, if they leave nothing; the order of planting counts where both change one step."""
        overlap = not effects[one].kinds.isdisjoint(effects[other].kinds)
        for lower, upper in ((one, other), (other, one))[: 1 + overlap]:
            if self._leaves(effects, lower, upper) <= self._limit:
                return [(a, b) for a in effects[lower].alike for b in effects[upper].alike]
        return []

    def _leaves(self, effects: list[_Effect], lower: int, upper: int) -> float:
        """NMSE that is left with one effect planted on the other."""
        below, above = effects[lower].alike[0], effects[upper].alike[0]
        rows = self._rows(below, above)
        if (lower, rows) not in self._middles:
            steps = below.planted(self._state)
            middle = State((*self._state.faults, below), Planting(steps), self._state.nmse, self._first)
            self._middles[lower, rows] = middle, self._replay(steps, rows)
        middle, replay = self._middles[lower, rows]
        self._screening.tried.variants += 1
        made = self._made(replay, middle, above)
        return float("inf") if made is None else self._screening.left(self._first, made)

    def _effects(self) -> list[_Effect]:
        """What each candidate makes of the first place, where that is something."""
        replays: dict[int, Replay] = {}
        found: dict[tuple[bytes, frozenset[str]], _Effect] = {}
        for candidate in self._screening.candidates(self._state, None):
            here = Candidate(candidate.fault, candidate.parameters, self._layers)
            rows = self._rows(here)
            if rows not in replays:
                replays[rows] = self._replay(self._state.steps, rows)
            made = self._made(replays[rows], self._state, here)
            if made is not None:
                effect = _Effect(self._screening.left(self._first, made), [here])
                known = found.setdefault((made.tobytes(), effect.kinds), effect)
                if known is not effect:
                    known.alike.append(here)
        return list(found.values())

    def _rows(self, *candidates: Candidate) -> int:
        """How many rows show the first place: none after it, but for faults by which later positions act on earlier ones."""
        whole = any(one.fault.whole for one in (*self._state.faults, *candidates))
        return self._screening.rows if whole else self._first.row + 1

    def _replay(self, steps: Sequence[Step], rows: int) -> Replay:
        return self._screening.make(self._until(steps), rows)

    def _until(self, steps: Sequence[Step]) -> Sequence[Step]:
        """The steps up to the one that makes the first place."""
        end = next(number for number, step in enumerate(steps) if step.makes == self._entry.point)
        return steps[: end + 1]

    def _made(self, replay: Replay, state: State, candidate: Candidate) -> Array | None:
        """The candidate's value at the first place; None where it changes nothing there or the model does not allow it."""
        if candidate.fault.shows is not None:  # what the engine computes for the first place is not what the dump shows
            return None
        try:
            steps = candidate.planted(state)
            changed = replay.run(self._until(steps), lambda _name, _made: True, unchanged_steps(steps, state))
        except NOT_ALLOWED:
            return None
        return changed.get(self._entry.point)
