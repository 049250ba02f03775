"""Where a tap's records go in tests: memory, slowly or until the disk is full."""

import time

from checkpoints.record import Rows, Token


class Sink:
    """A sink in memory; `delay` (seconds a call) makes it slow, `fail_at` makes it raise at that call."""

    def __init__(self, delay: float = 0, fail_at: int | None = None) -> None:
        self.taken: list[Rows] = []
        self.tokens: list[Token] = []
        self.delay = delay
        self.fail_at = fail_at

    def rows(self, rows: Rows) -> None:
        """Take rows."""
        time.sleep(self.delay)
        if self.fail_at == len(self.taken):
            raise OSError("disk full")
        self.taken.append(rows)

    def token(self, token: Token) -> None:
        """Take a token."""
        self.tokens.append(token)
