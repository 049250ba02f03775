"""Log-probabilities after a sampler that keeps only the likeliest tokens and makes their probabilities sum to 1."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from .base import Row

_MOST = 1000  # tokens that a sampler keeps
_TOP_P = np.concatenate([np.arange(0.05, 0.995, 0.01), [0.995, 0.999]])
_MIN_P = np.concatenate([[0.001, 0.002, 0.005], np.arange(0.01, 0.91, 0.01)])
_NEVER = 80.0  # a logit that far below the largest has no probability in float32

Floats = NDArray[np.float64]


class Truncated(Struct, frozen=True):
    """A sampler in front of the server's numbers: what it is called, and which of llama.cpp's logits it leaves."""

    what: str
    left: Callable[[Row], Row]


def truncations(rows: Sequence[Row], offsets: Sequence[float]) -> Iterator[Truncated]:
    """The top-k, the top-p and the min-p that fit best how far the server's log-probabilities are above llama.cpp's, at each position.

    `rows`: llama.cpp's logits [V] of each position.
    """
    above = np.array(offsets)
    likeliest = [_likeliest(row) for row in rows]
    least = min(map(len, likeliest))
    sums = [-np.log(np.cumsum(p)) for p in likeliest]
    by_count = np.array([each[:least] for each in sums])
    count = int(np.abs(by_count - above[:, None]).mean(axis=0).argmin()) + 1
    yield Truncated(f"a top-k of {count}", lambda row: _cut(row, count))
    by_mass = np.array([[each[_within(p, mass) - 1] for mass in _TOP_P] for p, each in zip(likeliest, sums, strict=True)])
    mass = float(_TOP_P[np.abs(by_mass - above[:, None]).mean(axis=0).argmin()])
    yield Truncated(f"a top-p of {mass:.3g}", lambda row: _cut(row, _within(_likeliest(row), mass)))
    by_share = np.array([[each[_over(p, share) - 1] for share in _MIN_P] for p, each in zip(likeliest, sums, strict=True)])
    share = float(_MIN_P[np.abs(by_share - above[:, None]).mean(axis=0).argmin()])
    yield Truncated(f"a min-p of {share:.3g}", lambda row: _cut(row, _over(_likeliest(row), share)))


def _likeliest(row: Row) -> Floats:
    """The largest probabilities of a row, largest first."""
    wide = row.astype(np.float64)
    p = np.exp(wide - wide.max())
    p /= p.sum()
    return np.asarray(-np.sort(-p)[:_MOST])


def _within(p: Floats, mass: float) -> int:
    """How many of the likeliest tokens together have this probability: top-p keeps them."""
    return min(int(np.searchsorted(np.cumsum(p), mass)) + 1, len(p))


def _over(p: Floats, share: float) -> int:
    """How many tokens have at least this share of the likeliest one's probability: min-p keeps them."""
    return int((p >= share * p[0]).sum())


def _cut(row: Row, count: int) -> Row:
    """A row in which only its `count` largest logits are left."""
    if count >= len(row):
        return row
    edge = np.partition(row, len(row) - count)[len(row) - count]
    return np.where(row >= edge, row, row.max() - np.float32(_NEVER)).astype(np.float32)
