"""Places of a slab that one thread fills and another empties, in order."""

import threading
from collections import deque
from collections.abc import Callable


class Ring:
    """Places of a slab, taken in order by the engine and given back in order by the writer, which is hurried when all are taken."""

    def __init__(self, capacity: int, hurry: Callable[[], None]) -> None:
        self.capacity = capacity
        self._hurry = hurry
        self._head = 0
        self._taken: deque[tuple[int, int]] = deque()
        self._change = threading.Condition()

    def take(self, count: int) -> int:
        """The first of `count` neighbouring places; waits until they are free."""
        with self._change:
            start = self._find(count)
            if start is None:
                self._hurry()
                while (start := self._find(count)) is None:
                    self._change.wait()
            self._taken.append((start, count))
            self._head = start + count
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
        """Free the places that were taken earliest."""
        with self._change:
            self._taken.popleft()
            self._change.notify()

    def drain(self) -> None:
        """Wait until all places are free."""
        with self._change:
            if self._taken:
                self._hurry()
            while self._taken:
                self._change.wait()
