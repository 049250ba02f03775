"""Names as they are printed, and the numbers that stand for their points while a file is read."""

from collections.abc import Sequence

from ..points import resolve


class Labels:
    """Points in the order in which a file names them. `names` are canonical."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._numbers: dict[str, int] = {}  # by canonical name
        self._printed: dict[str, int] = {}
        self._layers: int | None = None

    def of_model(self, layers: int | None) -> None:
        """How many layers the model has, which decides what some names mean from here on."""
        self._layers = layers
        self._printed.clear()

    def numbers(self, labels: Sequence[str]) -> list[int]:
        """The numbers of the points that these names mean."""
        known = self._printed
        for label in dict.fromkeys(labels):
            if label not in known:
                name = resolve(label, self._layers)
                number = self._numbers.setdefault(name, len(self.names))
                if number == len(self.names):
                    self.names.append(name)
                known[label] = number
        return [known[label] for label in labels]
