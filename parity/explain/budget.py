"""How long `parity explain` may search."""

from time import perf_counter


class Budget:
    """A deadline, checked between any two replays and within replays of many candidates at once."""

    def __init__(self, seconds: float) -> None:
        self._until = perf_counter() + seconds
        self.complete = True

    def part(self, share: float) -> "Budget":
        """A separate budget with this share of the time that is left."""
        return Budget(share * max(0.0, self._until - perf_counter()))

    @property
    def late(self) -> bool:
        """Whether the time is up."""
        return perf_counter() >= self._until

    def over(self) -> bool:
        """`late`, asked before something that is left untried if it is: `complete` is then False."""
        self.complete = self.complete and not self.late
        return not self.complete
