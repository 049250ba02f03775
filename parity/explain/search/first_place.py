"""The data with which every search at a state's first differing place begins."""

from .screening import Screening
from .state import Layers, SearchState


class AtFirstPlace:
    """The first place of a state that differs, and the layers in which something is tried there.

    Raises:
        ValueError: the state has no place that differs.
    """

    def __init__(self, screening: Screening, state: SearchState, layers: Layers) -> None:
        if state.first is None:
            raise ValueError("nothing is left to explain")
        self._screening = screening
        self._state = state
        self._layers = layers
        self._first = state.first
        self._entry = screening.entries[state.first.point]
        self._point = self._entry.point
