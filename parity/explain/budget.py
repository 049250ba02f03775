"""How long `parity explain` may search."""

from time import perf_counter


class Budget:
    """A deadline, looked at between any two replays and within those of many candidates at once."""

    def __init__(self, seconds: float) -> None:
        self._until = perf_counter() + seconds
        self.complete = True

    def part(self, share: float) -> "Budget":
        """A budget of its own with this share of the time that is left."""
        return Budget(share * max(0.0, self._until - perf_counter()))

    @property
    def late(self) -> bool:
        """Whether the time is up."""
        return perf_counter() >= self._until

    def over(self) -> bool:
        """`late`, where something is left untried if it is: `complete` is False from then on."""
        self.complete = self.complete and not self.late
        return not self.complete
