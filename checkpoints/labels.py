"""Names as they are printed, and the numbers that stand for their points while a file is read."""

from .points import resolve


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

    def number(self, label: str) -> int:
        """The number of the point that this name means."""
        number = self._printed.get(label)
        if number is None:
            name = resolve(label, self._layers)
            number = self._numbers.setdefault(name, len(self.names))
            if number == len(self.names):
                self.names.append(name)
            self._printed[label] = number
        return number
