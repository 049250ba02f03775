"""Keys and values of the positions seen so far, and recurrent states."""

from typing import Any

from .backend import Array
from .graph import State

_FIRST = 64  # rows of the first allocation; it doubles from there, so that appending stays linear
_ROWS, _STATE = "rows/", "state/"  # of names in `KvCache.held`


class KvCache:
    """Rows of named activations, appended pass by pass, float32.

    `read(name)` gives rows 0…t as one array; the rows of a pass are appended once, however many steps read them.
    """

    def __init__(self, xp: Any) -> None:
        self._xp = xp
        self._buffers: dict[str, Array] = {}
        self._lengths: dict[str, int] = {}
        self._states: dict[str, Array] = {}

    def append(self, name: str, rows: Array) -> None:
        """Add the rows of this pass: [T, n] (or [T])."""
        length = self._lengths.get(name, 0)
        needed = length + rows.shape[0]
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape[0] < needed:
            grown = self._xp.empty((max(_FIRST, 2 * length, needed), *rows.shape[1:]), dtype=rows.dtype)
            if buffer is not None:
                grown[:length] = buffer[:length]
            self._buffers[name] = buffer = grown
        buffer[length:needed] = rows
        self._lengths[name] = needed

    def read(self, name: str) -> Array:
        """Rows 0…t: [S, n], a view that the next append does not change."""
        return self._buffers[name][: self._lengths[name]]

    def state(self, read: State) -> Array:
        """The recurrent state that the last pass left; zeros before the first pass."""
        held = self._states.get(read.of)
        return self._xp.zeros(read.shape, dtype=self._xp.float32) if held is None else held

    def leave(self, name: str, value: Array) -> None:
        """Keep a state for the next pass."""
        self._states[name] = value

    def held(self) -> dict[str, Array]:
        """Everything that it holds, by name: rows of positions and recurrent states, which `hold` takes back."""
        rows = {_ROWS + name: self.read(name) for name in self._buffers}
        return rows | {_STATE + name: value for name, value in self._states.items()}

    def hold(self, values: dict[str, Array]) -> None:
        """Take what `held` gave, into an empty cache."""
        for name, value in values.items():
            if name.startswith(_ROWS):
                self.append(name.removeprefix(_ROWS), value)
            else:
                self.leave(name.removeprefix(_STATE), value)

    def __len__(self) -> int:
        """How many positions are held."""
        return max(self._lengths.values(), default=0)
