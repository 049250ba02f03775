"""What a sampler adds to single logits, or takes from them: penalties of tokens that were seen, biases of chosen tokens."""

from collections.abc import Mapping, Sequence

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from ..score.measures import Listed, largest, log_sum
from .base import Row

BANNED = -100.0  # OpenAI's logit_bias of a token that must not come
_LAST = 64  # tokens that llama.cpp's penalties look at
_LEAST = 0.05  # a change of a logit that is no noise of quantised weights
_MOST_BIASES = 8
_IMPOSSIBLE = -20.0  # nothing but a ban lowers a logit by so much
_CLEAR = 2.0  # by how much a banned token would have to be more probable than the least of the list


class Seen(Struct, frozen=True):
    """One prediction: the server's candidates, llama.cpp's logits [V] and the tokens before it."""

    server: Listed
    row: Row
    before: Sequence[int]


def repeated(row: Row, seen: Sequence[int], penalty: float) -> Row:
    """A row [V] with llama.cpp's repeat penalty on the last 64 tokens (`llama_sampler_penalties_apply`)."""
    changed = row.copy()
    ids = np.unique(np.array(seen[-_LAST:], dtype=np.int64))
    changed[ids] = np.where(row[ids] > 0, row[ids] / penalty, row[ids] * penalty)
    return changed


def less(row: Row, seen: Sequence[int], presence: float, frequency: float) -> Row:
    """A row [V] with the same function's presence and frequency penalties."""
    changed = row.copy()
    ids, counts = np.unique(np.array(seen[-_LAST:], dtype=np.int64), return_counts=True)
    changed[ids] -= (presence + frequency * counts).astype(np.float32)
    return changed


def with_bias(row: Row, bias: Mapping[int, float]) -> Row:
    """A row [V] with these numbers added."""
    changed = row.copy()
    for token, by in bias.items():
        changed[token] += np.float32(by)
    return changed


def subtracted(sample: Sequence[Seen]) -> tuple[float, float] | None:
    """The presence and the frequency penalty that fit best, by least squares; None where no seen token is listed beside another one."""
    counts, off = [], []
    for item in sample:
        recent = np.array(item.before[-_LAST:])
        count = np.array([(recent == number).sum() for number in item.server.ids])
        if (count > 0).any() and (count == 0).any():
            lowered = _off(item)
            lowered -= np.median(lowered[count == 0])
            counts.append(count[count > 0])
            off.append(-lowered[count > 0])
    if not counts:
        return None
    n, values = np.concatenate(counts), np.concatenate(off)
    terms = np.stack([np.ones(len(n)), n], axis=1)
    kept = [0, 1] if len(set(n.tolist())) > 1 else [0]
    while kept:
        fitted, *_ = np.linalg.lstsq(terms[:, kept], values, rcond=None)
        large = [column for column, value in zip(kept, fitted.tolist(), strict=True) if abs(value) > _LEAST]
        if large == kept:
            both = np.zeros(2)
            both[kept] = fitted
            close = float(np.median(np.abs(terms @ both - values))) < 3 * _LEAST
            return (float(both[0]), float(both[1])) if close else None
        kept = large
    return None


def biases(sample: Sequence[Seen]) -> dict[int, float]:
    """Tokens whose logits are off by the same number wherever they are listed, or that are never listed though probable."""
    by_token: dict[int, list[float]] = {}
    absent: set[int] = set()
    for item in sample:
        off = _off(item)
        middle = float(np.median(off))
        off -= middle
        for token, value in zip(item.server.ids.tolist(), off.tolist(), strict=True):
            by_token.setdefault(token, []).append(value)
        listed = set(item.server.ids.tolist())
        # The least of the list, as a logit; a server that echoes may list the text's own token, however improbable, besides.
        edge = float(np.sort(item.server.logprobs)[:2].max()) - middle + log_sum(item.row)
        for token in largest(item.row, len(listed)).tolist():
            if token not in listed and float(item.row[token]) > edge + _CLEAR:
                absent.add(token)
    bias = {token: BANNED for token in absent if token not in by_token}
    for token, values in by_token.items():
        middle = float(np.median(values))
        # Once is chance, and the median of a position with two biased tokens is wrong: at most positions they must agree.
        if middle < _IMPOSSIBLE:
            bias[token] = BANNED
        elif (
            len(values) > 1
            and abs(middle) > 4 * _LEAST
            and float(np.median(np.abs(np.array(values) - middle))) < abs(middle) / 4
        ):
            bias[token] = middle
    strongest = sorted(bias, key=lambda token: -abs(bias[token]))[:_MOST_BIASES]
    return {token: bias[token] for token in strongest}


def _off(item: Seen) -> NDArray[np.float64]:
    """How far each candidate's log-probability is above llama.cpp's."""
    ours = item.row[item.server.ids].astype(np.float64) - log_sum(item.row)
    return np.asarray(item.server.logprobs - ours)
