"""Log-probabilities after a sampler that keeps only some tokens, mostly the likeliest, and makes their probabilities sum to 1."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from ..score.measures import log_sum
from .base import Row

_MOST = 1000  # tokens that a sampler keeps
_TOP_P = np.concatenate([np.arange(0.05, 0.995, 0.01), [0.995, 0.999]])
_MIN_P = np.concatenate([[0.001, 0.002, 0.005], np.arange(0.01, 0.91, 0.01)])
_SIGMAS = np.arange(0.1, 5.01, 0.05)
_TYPICAL = np.concatenate([np.arange(0.05, 0.995, 0.01), [0.99]])
_XTC = np.arange(0.02, 0.5, 0.01)
_TAU = np.arange(0.25, 8.01, 0.05)  # bits
_SAME = 1e-12  # log-probability: values of a sampler that are off by the same
_NEVER = 80.0  # a logit that far below the largest has no probability in float32

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


class Truncated(Struct, frozen=True):
    """A sampler that the server may apply: its name, and which of llama.cpp's logits it keeps."""

    what: str
    left: Callable[[Row], Row]


def truncations(rows: Sequence[Row], offsets: Sequence[float]) -> Iterator[Truncated]:
    """Of each kind of truncation the one that fits best how far the server's log-probabilities are above llama.cpp's, at each position.

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
    mass = _fitting(_TOP_P, np.abs(by_mass - above[:, None]).mean(axis=0))
    yield Truncated(f"a top-p of {mass:.3g}", lambda row: _cut(row, _within(_likeliest(row), mass)))
    by_share = np.array([[each[_over(p, share) - 1] for share in _MIN_P] for p, each in zip(likeliest, sums, strict=True)])
    share = _fitting(_MIN_P, np.abs(by_share - above[:, None]).mean(axis=0))
    yield Truncated(f"a min-p of {share:.3g}", lambda row: _cut(row, _over(_likeliest(row), share)))
    kinds: tuple[tuple[str, Floats, Callable[[Row, float], Bools]], ...] = (
        ("a top-n-sigma", _SIGMAS, _near_largest),
        ("an XTC threshold", _XTC, _without_top),
        ("Mirostat 2 with a tau", _TAU, _unsurprising),
    )
    for name, values, kept in kinds:
        off = [np.abs(np.array([_gain(row, kept(row, value)) for row in rows]) - above).mean() for value in values.tolist()]
        yield _best(name, values, np.array(off), kept)
    by_typical = np.array([_typical_gains(row, _TYPICAL) for row in rows])
    yield _best("a typical-p", _TYPICAL, np.abs(by_typical - above[:, None]).mean(axis=0), _typical)


def _fitting(values: Floats, off: Floats) -> float:
    """The value with the least error; of several that keep the same tokens, the middle one."""
    least = np.flatnonzero(off <= off.min() + _SAME)
    return float(values[least[len(least) // 2]])


def _best(name: str, values: Floats, off: Floats, kept: Callable[[Row, float], Bools]) -> Truncated:
    value = _fitting(values, off)
    return Truncated(f"{name} of {value:.3g}", partial(_masked, kept=kept, value=value))


def _masked(row: Row, kept: Callable[[Row, float], Bools], value: float) -> Row:
    """A row with only some of its logits; the others are −∞."""
    return np.where(kept(row, value), row, row.max() - np.float32(_NEVER)).astype(np.float32)


def _gain(row: Row, kept: Bools) -> float:
    """By how much the log-probabilities of these tokens grow if only they are kept."""
    return log_sum(row) - log_sum(row[kept])


def _near_largest(row: Row, sigmas: float) -> Bools:
    """`llama_sampler_top_n_sigma`: the logits less than so many standard deviations below the largest; −∞ counts in neither."""
    return np.asarray(row >= row.max() - sigmas * row[np.isfinite(row)].std(dtype=np.float64))


def _typical(row: Row, mass: float) -> Bools:
    """`llama_sampler_typical`: the tokens whose surprise is nearest to the entropy, until they have this probability together."""
    order, sums = _by_surprise(row)
    kept = np.zeros(len(row), dtype=np.bool_)
    kept[order[: int(np.searchsorted(sums, mass, side="right")) + 1]] = True
    return kept


def _typical_gains(row: Row, masses: Floats) -> Floats:
    """`_gain` of `_typical` at each mass, from one sorting."""
    _, sums = _by_surprise(row)
    return np.asarray(-np.log(sums[np.minimum(np.searchsorted(sums, masses, side="right"), len(sums) - 1)]))


def _by_surprise(row: Row) -> tuple[NDArray[np.int64], Floats]:
    """The tokens in the order in which their surprise is near to the entropy, and the sums of their probabilities."""
    surprise = log_sum(row) - row.astype(np.float64)
    p = np.exp(-surprise)
    order = np.argsort(np.abs(surprise - float(p[p > 0] @ surprise[p > 0])), kind="stable")
    return order, np.cumsum(p[order])


def _unsurprising(row: Row, tau: float) -> Bools:
    """`llama_sampler_mirostat_v2` at its first token: those of at most 2 tau bits of surprise, and the likeliest."""
    bits = (log_sum(row) - row.astype(np.float64)) / np.log(2)
    return np.asarray((bits <= 2 * tau) | (row == row.max()))


def _without_top(row: Row, threshold: float) -> Bools:
    """`llama_sampler_xtc`: of the tokens that reach the threshold only the least probable is left, and all below it."""
    above = np.flatnonzero(row.astype(np.float64) - log_sum(row) >= np.log(threshold))
    kept = np.ones(len(row), dtype=np.bool_)
    if len(above) > 1:
        kept[above] = False
        kept[above[row[above].argmin()]] = True
    return kept


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
