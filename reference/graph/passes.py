"""A session whose passes are noted or skipped: a cache is filled to a length, and a pass over it noted, without computing."""

import numpy as np

from checkpoints.rules import Pass

from ..llama import Session
from .raw import RawPass, Recorder

_FIRST = 3  # the position of the first token, so that a position is never the number of its row or cell
PAD = 256  # llama_kv_cache::get_n_kv rounds up to it
BATCH = 64


class PassSession:
    """A session whose passes are noted or skipped; nothing is computed in either. `caches`: whether the model keeps positions."""

    def __init__(self, session: Session, weights: frozenset[str], n_ctx: int) -> None:
        self._session, self._weights, self._n_ctx = session, weights, n_ctx
        self._origin = _FIRST
        self._next = _FIRST
        self.caches = True

    def restart(self, first: int) -> None:
        """An empty cache; the next token stands at `first`."""
        self._origin = self._next = first

    def settle(self) -> None:
        """Take up where the sequence ends according to llama.cpp."""
        self._advance(self._next)

    def _advance(self, after: int) -> None:
        last = self._session.last_position()
        self._next = after if last is None else last + 1
        self.caches = last is not None

    def fill(self, count: int) -> None:
        """Let `count` positions count as computed."""
        self._session.skip(_ids(self._next, count, self._session.model.n_vocab), self._next)
        self._advance(self._next + count)

    def fill_to(self, cells: int) -> None:
        """Fill until so many positions are cached."""
        while self.caches and (missing := cells - (self._next - self._origin)) > 0:
            self.fill(min(missing, BATCH))

    def take(self, count: int) -> RawPass:
        """Note a pass over `count` tokens."""
        session, first = self._session, self._next
        tokens = _ids(first, count, session.model.n_vocab)
        used = first - self._origin + count
        if not self.caches:  # each pass stands alone
            first = self._origin = _FIRST
            used = count
        now = Pass(
            np.array(tokens, np.int64),
            np.arange(first, first + count, dtype=np.int64),
            np.arange(self._origin, first + count, dtype=np.int64),
        )
        taken = RawPass(now, min(self._n_ctx, -(-used // PAD) * PAD) if self.caches else 0)
        session.record(tokens, first, Recorder(session.model.library.ggml, self._weights, taken).asked)
        last = session.last_position()
        # The positions of a pass that was stopped are taken back, except from recurrent memories, which cannot.
        self._next = first if last is None else last + 1
        return taken


def _ids(first: int, count: int, n_vocab: int) -> tuple[int, ...]:
    """Ids that are neither positions nor numbers of rows."""
    return tuple((17 * (first + i) + 29) % n_vocab for i in range(count))
