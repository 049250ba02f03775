"""Which candidates may give the same numbers as a fault that explains everything in a layer: those that make the same of its output."""

from collections.abc import Mapping

import numpy as np

from engine.backend import Array, module_of

from .likely import Likely
from .screening import Screening
from .state import SearchState

# Part of a fault's change of its layer's output by which another candidate's output may differ, squared. A choice: equal numbers differ by
# rounding, and those who pass are compared at every record.
_NEAR = 0.25


class Alike:
    """Chooses among candidates as `Likely` does, by what the fault that was found makes of its layer's output."""

    def __init__(self, screening: Screening, state: SearchState, found: SearchState, likely: Likely) -> None:
        self._screening = screening
        #: The numbers of the versions that leave the recorded rows before the first wrong one unchanged.
        self.right_before = likely.right_before
        self._state = state
        self._found = found
        self._outputs: dict[tuple[str, int], Array | None] = {}

    def among(self, name: str, values: Mapping[int, Array], rows: int) -> set[int]:
        """The numbers of the candidates that may give the same numbers, given each one's first rows [rows, n] of a layer's output."""
        wanted = self._output(name, rows)
        if wanted is None or not values:
            return set(self.right_before(name, values))
        right = self._screening.replay(self._state, rows).values[name]
        with np.errstate(all="ignore"):  # faults may overflow
            left = module_of(right).stack(list(values.values())) - wanted
            change = wanted - right
            far = (left * left).reshape(len(values), -1).sum(axis=1) > _NEAR * (change * change).sum()
        return {number for number, other in zip(values, self._screening.backend.to_host(far), strict=True) if not other}

    def _output(self, name: str, rows: int) -> Array | None:
        """The first rows of a layer's output with the fault that was found; None if it leaves them as they are."""
        if (name, rows) not in self._outputs:
            whole = any(candidate.fault.whole for candidate in self._found.faults)
            replay = self._screening.replay(self._state, self._screening.rows if whole else rows)
            changed = replay.run(self._found.steps[: self._found.order[name] + 1], lambda _made, _value: True)
            value = changed.get(name)
            self._outputs[name, rows] = None if value is None else value[:rows]
        return self._outputs[name, rows]
