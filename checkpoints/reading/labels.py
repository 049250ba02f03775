"""Names as they are printed, and the numbers that represent their points while a file is read."""

from collections.abc import Sequence

from ..errors import DumpError
from ..points import resolve

_MOST = 1 << 15  # names of a file: 500 layers of 60 points each
_LONGEST = 1 << 10  # characters of one


class Labels:
    """Points in the order in which a file (`dump`, for errors) names them. `names` are canonical."""

    def __init__(self, dump: str) -> None:
        self._dump = dump
        self.names: list[str] = []
        self._numbers: dict[str, int] = {}  # by canonical name
        self._printed: dict[str, int] = {}
        self._layers: int | None = None

    def of_model(self, layers: int | None) -> None:
        """How many layers the model has, which decides what some names mean from here on."""
        self._layers = layers
        self._printed.clear()

    def numbers(self, labels: Sequence[str]) -> list[int]:
        """The numbers of the points that these names mean.

        Raises:
            DumpError: a name is too long, or there are too many.
        """
        known = self._printed
        for label in dict.fromkeys(labels):
            if label not in known:
                if len(label) > _LONGEST or len(known) >= _MOST:
                    problem = f"a name of {len(label):,} characters" if len(label) > _LONGEST else f"more than {_MOST:,} names"
                    raise DumpError(
                        f"{self._dump} has {problem}, beginning with {label[:40]!r}.",
                        "Name points by layer and kind, and positions by token_idx.",
                        code="names",
                    )
                name = resolve(label, self._layers)
                number = self._numbers.setdefault(name, len(self.names))
                if number == len(self.names):
                    self.names.append(name)
                known[label] = number
        return [known[label] for label in labels]
