"""Rows of two values at the same positions, and how far each is from the other's."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoints.errors import ModelError
from checkpoints.points import parse

Floats = NDArray[np.float64]

# A row's error is taken over at least this share of the mean energy of all rows: single rows of scores can be all but
# zero by chance. Measured on the embedded model, 32 tokens: without it the worst right operation has 3e-13, with it the same;
# it guards what was not measured.
ROW_FLOOR = 0.01

CACHED = ("k_read", "v_read")  # kinds of points whose rows are the cache's, not the pass's
SCORES = ("kq", "kq_soft_max")


@dataclass(frozen=True)
class Value:
    """One point's value in one forward pass and the positions of its rows: [T, …], [H, T, S], or [S, K·d] for what the cache gave."""

    data: NDArray[Any]
    positions: NDArray[np.int64]


def rows_at(name: str, value: Value, positions: NDArray[np.int64]) -> NDArray[np.float32]:
    """The rows of a value at given positions: [T, n], or [H, T, S] for scores."""
    rows = np.searchsorted(value.positions, positions)
    if parse(name).kind in SCORES:
        return value.data if len(rows) == len(value.positions) else value.data[:, rows]
    data = value.data if value.data.ndim == 1 else value.data.reshape(len(value.positions), -1)
    return data if len(rows) == len(value.positions) else data[rows]


def row_errors(kind: str, ours: NDArray[np.float32], theirs: NDArray[np.float32], positions: NDArray[np.int64]) -> Floats:
    """NMSE of each row (position), over max(the row's energy, 1 % of the mean): float64 [rows].

    Of `kq` only scores of positions up to the row's own count: what is masked afterwards is nobody's business.

    Raises:
        ValueError: another shape.
    """
    if kind in SCORES:
        ours, theirs = ours.transpose(1, 0, 2), theirs.transpose(1, 0, 2)
        if kind == "kq" and ours.shape == theirs.shape:
            first = int(positions[-1]) + 1 - ours.shape[2]
            seen = np.arange(ours.shape[2])[None, None, :] <= (positions - first)[:, None, None]
            ours, theirs = np.where(seen, ours, 0), np.where(seen, theirs, 0)
    if ours.shape[0] != theirs.shape[0] or ours.size != theirs.size:
        raise ModelError(f"{kind} has shape {list(theirs.shape)}, the model's is {list(ours.shape)}.", "Is it of this model?")
    a = ours.reshape(len(ours), -1).astype(np.float64)
    b = theirs.reshape(len(theirs), -1).astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    odd = (~np.isfinite(a) | ~np.isfinite(b)) & ~same
    with np.errstate(invalid="ignore"):
        delta = np.where(same | odd, 0.0, a - b)
    b = np.where(np.isfinite(b), b, 0.0)
    energy = np.einsum("ij,ij->i", b, b)
    error = np.einsum("ij,ij->i", delta, delta)
    with np.errstate(divide="ignore", invalid="ignore"):
        nmse = np.where(error == 0, 0.0, error / np.maximum(energy, ROW_FLOOR * energy.mean()))
    return np.where(odd.any(axis=1), np.inf, nmse)
