"""Places of a slab that one thread fills and another empties, in order."""

import threading
from collections import deque
from time import monotonic, sleep

_QUIET = 0.002  # seconds without a new batch after which the emptying thread may work: five steps of a 0.5 B model
_NAP = 0.001


class Ring:
    """Places of a slab, taken in order by the engine and given back in order by the writer."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.waits = 0
        self.ending = False
        self._used = 0
        self._last = monotonic()
        self._head = 0
        self._taken: deque[tuple[int, int]] = deque()
        self._change = threading.Condition()

    def take(self, count: int) -> int:
        """The first of `count` neighbouring places; waits, and counts it, until they are free."""
        with self._change:
            start = self._find(count)
            if start is None:
                self.waits += 1
                while (start := self._find(count)) is None:
                    self._change.wait()
            self._taken.append((start, count))
            self._head = start + count
            self._used += count
            self._last = monotonic()
            return start

    def _find(self, count: int) -> int | None:
        if not self._taken:
            return 0 if count <= self.capacity else None
        tail = self._taken[0][0]
        if self._head > tail:
            if self._head + count <= self.capacity:
                return self._head
            return 0 if count <= tail else None
        return self._head if self._head + count <= tail else None

    def give_back(self) -> None:
        """Free the places that were taken first."""
        with self._change:
            self._used -= self._taken.popleft()[1]
            self._change.notify()

    def drain(self) -> None:
        """Wait until all places are free."""
        with self._change:
            while self._taken:
                self._change.wait()

    def turn(self) -> None:
        """Wait for a good moment to empty places: the filling thread is quiet, ends, or has taken half of them.

        Python runs one thread at a time: formatting while steps are launched would hold the launches up.
        """
        while not self.ending and 2 * self._used < self.capacity and monotonic() - self._last < _QUIET:
            sleep(_NAP)
