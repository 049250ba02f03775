"""Which candidates in an unknown layer are likely, before they are carried to the first place: residuals pass on what they change.

What is added to one layer's output is still in a later layer's, besides what the layers between make of it. Of 157 faults, planted one by
one in four layers of three 24-layer models, all but one changed the recorded elements of their own layer's output with a cosine of 0.41 or
more to what the dump shows up to twelve layers later. Of the changes of other faults one in ten reaches that by chance, if sixteen
elements are recorded. Unlikely candidates are tried too, but later.
"""

from collections.abc import Mapping

import numpy as np

from checkpoints.points import parse
from engine.backend import Array, module_of
from engine.graph import POSITIONS, WeightSource

from .carry import carry, steps_between
from .records import Floats
from .screening import Screening
from .state import SearchState

_ALIKE = 0.3  # least cosine of two changes that may come from one fault
_SAME = 1e-8  # most squared change, in proportion, of rows before the first wrong one: where the dump is right the candidate must be, too


class Likely:
    """Compares candidates' changes of a layer's output with the error at a state's first place.

    Raises:
        ValueError: the state has no place that differs.
    """

    def __init__(self, screening: Screening, state: SearchState) -> None:
        if state.first is None:
            raise ValueError("nothing is left to explain")
        self._screening = screening
        self._state = state
        entry = screening.entries[state.first.point]
        known = parse(entry.point)
        self._row, self._point = state.first.row, entry.point
        # The layer's output at the end of the residual stream, and the steps from it to the place.
        self._last = entry.point if known.kind == "l_out" else f"blk.{screening.n_layers - 1}.l_out"
        self._after = [] if known.kind == "l_out" else steps_between(state, screening.n_layers - 1, entry.point)
        here = entry.rows == self._row
        present = entry.present[here][0]
        index = np.arange(len(present)) if entry.index is None else entry.index[here][0]
        self._index = index[present]
        self._wanted = entry.values[here][0][present]
        #: Whether the two can be compared at all.
        self.able = bool(
            (known.kind == "l_out" or (known.layer is None and self._after))
            and self._last in state.order
            and np.isfinite(self._wanted).all()
        )

    def among(self, name: str, values: Mapping[int, Array], rows: int) -> set[int]:
        """The numbers of the likely candidates, given each one's first rows [rows, D] of a layer's output."""
        replay = self._screening.replay(self._state, rows)
        right = replay.values[name]
        with np.errstate(all="ignore"):  # faults may overflow
            numbers = [number for number, value in values.items() if self._right_before(value, right)]
            if rows <= self._row or not numbers:
                return set(numbers)
            changes = module_of(right).stack([values[number][self._row] for number in numbers]) - right[self._row]
            changed = self._logits_of(replay.values[self._last][self._row] + changes, replay.values[POSITIONS], replay.weights)
            was = self._screening.backend.to_host(replay.values[self._point][self._row])[self._index].astype(np.float64)
            mine = self._screening.backend.to_host(changed)[:, self._index] - was
            cosines = _cosines(mine, self._wanted - was)
        return {number for number, cosine in zip(numbers, cosines, strict=True) if not cosine < _ALIKE}

    def _right_before(self, value: Array, right: Array) -> bool:
        """Whether a candidate leaves the rows before the first wrong one unchanged."""
        before = right[: self._row]
        changed = value[: self._row] - before
        return bool((changed * changed).sum() <= _SAME * (before * before).sum())

    def _logits_of(self, rows: Array, positions: Array, weights: WeightSource) -> Array:
        """The values at the first place that follow from these rows of the last layer's output: [M, D] -> [M, n]."""
        if not self._after:
            return rows
        outputs = carry(self._after, self._last, [row[None] for row in rows], positions[:1], weights)
        return module_of(rows).concatenate(list(outputs))


def _cosines(changes: Floats, wanted: Floats) -> Floats:
    """The cosine of each of some changes [M, k] to the wanted one [k]."""
    sizes = np.linalg.norm(changes, axis=1) * np.linalg.norm(wanted)
    return np.asarray((changes @ wanted) / sizes)
