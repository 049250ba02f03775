"""How long `parity explain` may search."""

from time import perf_counter, process_time

_SECONDS = 60.0  # of processor time, where nobody said how long he waits
_PATIENCE = (
    5.0  # an answer without a stated budget takes at most so many times as long, however little of the processor it is given
)
# The part of the time left after which the processor's clock is asked again. A choice: several threads spend it faster than it passes.
_PAUSE = 0.25


class Budget:
    """A deadline, checked between any two replays and within replays of many candidates at once.

    `seconds` are wall-clock time. None: a minute of this process's own processor time, so that a busy machine finds the same causes as
    an idle one, but at most five minutes of wall-clock time.
    """

    def __init__(self, seconds: float | None) -> None:
        self._shared = seconds is None
        self._wall, self._processor = perf_counter(), process_time()
        self._seconds = _SECONDS if seconds is None else seconds
        self._not_before = self._wall + self._seconds
        self.complete = True

    def part(self, share: float) -> "Budget":
        """A separate budget with this share of the time that is left."""
        part = Budget(share * max(0.0, self._seconds - self._spent()))
        part._shared = self._shared
        return part

    @property
    def late(self) -> bool:
        """Whether the time is up. The processor's clock, which takes a call into the system, is asked only where the wall's says that it
        may be."""
        now = perf_counter()
        if now < self._not_before:
            return False
        left = self._seconds - self._spent()
        self._not_before = now + _PAUSE * left
        return left <= 0

    def over(self) -> bool:
        """`late`, asked before a further attempt: if it is true, that is left out, and `complete` becomes False."""
        self.complete = self.complete and not self.late
        return not self.complete

    def _spent(self) -> float:
        passed = perf_counter() - self._wall
        return max(min(passed, process_time() - self._processor), passed / _PATIENCE) if self._shared else passed
