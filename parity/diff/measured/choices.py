"""The next token that each side would choose, as far as the dumps really show it."""

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from checkpoints.answers.diff import Choices
from checkpoints.distinct import distinct
from checkpoints.points import LOGITS
from checkpoints.record import Dump, Rows
from checkpoints.tensors import TensorReader, beside

from .align import Pair
from .records import Records

_TOP = 5  # first choices that are compared as a set


class _Tally(Struct):
    """Collects what is known about single positions."""

    known: int = 0
    agree: int = 0
    margin: float = np.inf
    differs: tuple[int, int, int, float | None] | None = None

    def add(self, position: int, ours: int, ref: int, margin: float | None) -> None:
        self.known += 1
        self.agree += ours == ref
        if margin is not None:
            self.margin = min(self.margin, margin)
        if ours != ref and (self.differs is None or position < self.differs[0]):
            self.differs = (position, ours, ref, margin)


def choices(records: Records) -> Choices | None:
    """First choices, KL divergence and margins; None if neither logits nor generated tokens show anything.

    A whole row shows everything. A slice shows the first choice only if the statistics do (the largest
    absolute value is the maximum), or if the generated token's record lists it.
    """
    pair = next((pair for pair in records.pairs if pair.point == LOGITS), None)
    tally = _Tally()
    divergences: list[float] = []
    shares: list[float] = []
    settled: set[tuple[int, int]] = set()
    if pair is not None:
        a, b, rows = _whole(pair, records)
        for r, our_row, ref_row in zip(rows, a, b, strict=True):
            settled.add((int(pair.ref.seq[r]), int(pair.ref.token_idx[r]) + 1))
            if not (np.isfinite(our_row).all() and np.isfinite(ref_row).all()):
                continue
            second, first = np.sort(np.partition(ref_row, -2)[-2:]) if len(ref_row) > 1 else (-np.inf, ref_row[0])
            tally.add(int(pair.ref.token_idx[r]), int(our_row.argmax()), int(ref_row.argmax()), float(first - second))
            divergences.append(kl(ref_row, our_row))
            shares.append(overlap(our_row, ref_row, _TOP))
    _from_tokens(records, settled, tally)
    if pair is not None:
        _from_statistics(pair, settled, tally)
    if not tally.known:
        return None
    differs = tally.differs or (None, None, None, None)
    return Choices(
        known=tally.known,
        agree=tally.agree,
        rows=len(divergences),
        kl=max(divergences) if divergences else None,
        k=_TOP if shares else 0,
        top_k=float(np.mean(shares)) if shares else None,
        margin=tally.margin if np.isfinite(tally.margin) else None,
        differs_at=differs[0],
        ours_id=differs[1],
        ref_id=differs[2],
        differs_margin=differs[3],
    )


def kl(ref: NDArray[np.float32], ours: NDArray[np.float32]) -> float:
    """KL(ref ‖ ours) of two rows of logits [V], in nats; 0 if rounding makes it negative."""
    p, q = log_softmax(ref), log_softmax(ours)
    return max(float(np.sum(np.exp(p) * (p - q))), 0.0)


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """float64 [V]."""
    x = logits.astype(np.float64)
    x -= x.max()
    return np.asarray(x - np.log(np.exp(x).sum()))


def overlap(ours: NDArray[np.float32], ref: NDArray[np.float32], k: int) -> float:
    """The share of the reference's k largest that are among ours."""
    k = min(k, len(ref), len(ours))
    return len(set(np.argpartition(ours, -k)[-k:].tolist()) & set(np.argpartition(ref, -k)[-k:].tolist())) / k


def _whole(pair: Pair, records: Records) -> tuple[list[NDArray[np.float32]], list[NDArray[np.float32]], list[int]]:
    """Both sides' logits, and the rows, if whole rows are available, in the lines or in the tensors beside them."""
    full = pair.ours.full() & pair.ref.full() & (pair.ours.counts == pair.ref.counts)
    rows = np.flatnonzero(full).tolist()
    if rows:
        width = int(pair.ref.counts[rows[0]])
        return [pair.ours.values[r, :width] for r in rows], [pair.ref.values[r, :width] for r in rows], rows
    left, right = _tensors(records.ours, pair.ours), _tensors(records.ref, pair.ref)
    rows = sorted(set(left) & set(right))
    rows = [r for r in rows if left[r].shape == right[r].shape]
    return [left[r] for r in rows], [right[r] for r in rows], rows


def _tensors(dump: Dump, rows: Rows) -> dict[int, NDArray[np.float32]]:
    """Row -> logits [V], if a tensor of its step is stored beside the dump with one row for each recorded position."""
    path = beside(dump.path)
    if not path.is_file():
        return {}
    reader = TensorReader(path)
    recorded = dump.points[LOGITS]
    rows_of: dict[int, NDArray[np.float32]] = {}
    for step in distinct(rows.step).tolist():
        if f"{LOGITS}/{step}" not in reader.names:
            continue
        tensor = reader.get(LOGITS, step)
        positions = np.sort(recorded.token_idx[recorded.step == step])
        if tensor.ndim != 2 or len(tensor) != len(positions):
            continue
        for r in np.flatnonzero(rows.step == step).tolist():
            rows_of[r] = tensor[int(np.searchsorted(positions, rows.token_idx[r]))]
    return rows_of


def _from_tokens(records: Records, settled: set[tuple[int, int]], tally: _Tally) -> None:
    until = records.tokens.until
    our_tokens = {(token.seq, token.token_idx): token for token in records.ours.tokens}
    for token in records.ref.tokens:
        place = (token.seq, token.token_idx)
        other = our_tokens.get(place)
        # The token at `until` was itself still chosen after the same tokens.
        if other is None or place in settled or (until is not None and token.token_idx > until):
            continue
        settled.add(place)
        margin = token.top[0][1] - token.top[1][1] if len(token.top) > 1 else None
        tally.add(token.token_idx - 1, other.first_choice, token.first_choice, margin)


def _from_statistics(pair: Pair, settled: set[tuple[int, int]], tally: _Tally) -> None:
    a, b = _argmax(pair.ours), _argmax(pair.ref)
    for r in np.flatnonzero((a >= 0) & (b >= 0)).tolist():
        place = (int(pair.ref.seq[r]), int(pair.ref.token_idx[r]) + 1)
        if place not in settled:
            tally.add(place[1] - 1, int(a[r]), int(b[r]), None)


def _argmax(rows: Rows) -> NDArray[np.int64]:
    """int64 [R]: the index of the largest element if the statistics show it, otherwise -1."""
    needed = [rows.stats.get(name) for name in ("absmax_at", "max", "min")]
    if any(column is None for column in needed):
        return np.full(len(rows), -1, dtype=np.int64)
    at, high, low = (np.asarray(column) for column in needed)
    known = (high > -low) & np.isfinite(at)
    return np.where(known, np.nan_to_num(at, nan=-1.0), -1).astype(np.int64)
