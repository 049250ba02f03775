"""What a report draws besides the verdict: a grid of all compared records, and the first divergence's values. Pure data."""

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray


class Grid(Struct, frozen=True):
    """Errors of all compared records, [P, T]: points in dataflow order by positions.

    NaN if there is no such record or its error is unknown. `columns` are (seq, token_idx), `tokens` their texts if
    known; `limit` [P, T] is each record's NMSE limit.
    """

    points: tuple[str, ...]
    columns: tuple[tuple[int, int], ...]
    tokens: tuple[str | None, ...]
    nmse: NDArray[np.float64]
    max_abs: NDArray[np.float64]
    of_limit: NDArray[np.float64]
    limit: NDArray[np.float64]


class Spread(Struct, frozen=True):
    """How one side's row is distributed: `values` recorded values of `n`, and its statistics (None: unknown)."""

    values: tuple[float, ...]
    n: int | None = None
    low: float | None = None
    high: float | None = None
    mean: float | None = None
    deviation: float | None = None


class Picture(Struct, frozen=True):
    """`ours` and `ref` are the spreads of the record that the report is about: the first divergence, else the worst.

    `truth` is the spread in float64, if it was computed.
    """

    grid: Grid
    ours: Spread | None = None
    ref: Spread | None = None
    truth: Spread | None = None
