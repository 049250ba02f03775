"""A session whose passes are recorded or skipped: a cache is filled to a length, and a pass over it recorded, without computing."""

import numpy as np
from numpy.typing import NDArray

from checkpoints.points import ENCODER
from checkpoints.rules import ForwardPass

from ..naming import Planned
from ..rows import survey
from ..session import Session
from .raw import GraphRecorder, RawPass

_FIRST = 3  # the position of the first token, so that a position is never the number of its row or cell
PAD = 256  # llama_kv_cache::get_n_kv rounds up to it
BATCH = 64
CROSSING = 12  # tokens of a pass across a window's edge
_BLOCK = 32  # positions that are cached at the beginning, and just before that edge


class PassSession:
    """A session whose passes are recorded or skipped; either way nothing is computed. `caches` says whether the model keeps positions.

    `encode` says whether the passes are those of an encoder; `encoded` is an encoder's output, for a decoder's passes.
    """

    def __init__(self, session: Session, weights: frozenset[str], n_ctx: int, *, encode: bool = False) -> None:
        self._session, self._weights, self._n_ctx, self._encode = session, weights, n_ctx, encode
        self.encoded: NDArray[np.float32] | None = None
        self._origin = _FIRST
        self._next = _FIRST
        self._gap = (_FIRST, 0)  # positions that are not cached: the position after them, and how many they are
        self.caches = not encode

    def restart(self, first: int) -> None:
        """Empty the cache; the next token has position `first`."""
        self._origin = self._next = first
        self._gap = (first, 0)

    def settle(self) -> None:
        """Continue where llama.cpp says that the sequence ends."""
        self._advance(self._next)

    def _advance(self, after: int) -> None:
        last = self._session.last_position()
        self._next = after if last is None else last + 1
        self.caches = last is not None

    def fill(self, count: int) -> None:
        """Have llama.cpp regard `count` further positions as computed."""
        self._session.skip(_ids(self._next, count, self._session.model.n_vocab), self._next)
        self._advance(self._next + count)

    def fill_to(self, cells: int) -> None:
        """Fill the cache until `cells` positions are in it."""
        while self.caches and (missing := cells - (self._next - self._origin)) > 0:
            self.fill(min(missing, BATCH))

    def spread(self, window: int) -> bool:
        """Cache the first positions and those just before `window`, none in between, so that the next pass over `CROSSING` tokens
        crosses the edge of a window of that length, counted from the query as well as in chunks.

        The pass begins before the edge: llama.cpp puts what it adds into cells that no later position will see.

        Returns:
            False if llama.cpp cannot move cached positions; nothing was done then.
        """
        if not self.caches or not self._session.can_move_positions():
            return False
        self._session.clear()
        self.restart(_FIRST)
        self.fill(_BLOCK)
        before = self._next
        self.fill(_BLOCK)
        by = window - CROSSING // 2 - 1 - self._next
        self._session.move_positions(before, by)
        self._gap = (before, by)
        self._next += by
        self.fill(1)  # a graph of its own rotates the keys again, before that of this pass
        return True

    def _keys(self, stop: int) -> NDArray[np.int64]:
        """The positions that are cached before `stop`."""
        before, by = self._gap
        positions = np.arange(self._origin, stop, dtype=np.int64)
        return positions[(positions < before) | (positions >= before + by)]

    def take(self, count: int) -> RawPass:
        """Record a pass over `count` tokens."""
        session, first = self._session, self._next
        tokens = _ids(first, count, session.model.n_vocab)
        keys = self._keys(first + count)
        if not self.caches:  # each pass stands alone
            first = self._origin = _FIRST
            keys = np.arange(first, first + count, dtype=np.int64)
        now = ForwardPass(
            np.array(tokens, np.int64),
            np.arange(first, first + count, dtype=np.int64),
            keys,
            self.encoded,
        )
        taken = RawPass(now, min(self._n_ctx, -(-len(keys) // PAD) * PAD) if self.caches else 0)
        session.record(
            tokens, first, GraphRecorder(session.model.library.ggml, self._weights, taken).record, encode=self._encode
        )
        last = session.last_position()
        # llama.cpp takes back the positions of a pass that was stopped, but recurrent memories cannot do so.
        self._next = first if last is None else last + 1
        return taken


def output_of_encoder(session: Session) -> Planned:
    """The last value of an encoder's pass; the cache is emptied."""
    *_, last = survey(session, _ids(_FIRST, 4, session.model.n_vocab), prefix=ENCODER, encode=True).known
    return last


def encode(session: Session, output: Planned, count: int) -> NDArray[np.float32]:
    """The output of an encoder for `count` tokens, which it computes, as the decoder's next passes will read it: float32 [E, D]."""
    tokens = _ids(_FIRST, count, session.model.n_vocab)
    last = session.last_position()
    rows: list[NDArray[np.float32]] = []
    session.decode(tokens, 0 if last is None else last + 1, [output], lambda _planned, value: rows.append(value), encode=True)
    return rows[0].reshape(count, -1)


def _ids(first: int, count: int, n_vocab: int) -> tuple[int, ...]:
    """Token ids that differ from all positions and row numbers."""
    return tuple((17 * (first + i) + 29) % n_vocab for i in range(count))
