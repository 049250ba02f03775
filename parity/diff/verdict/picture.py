"""Turns the numbers of all records into what a report draws."""

from math import sqrt

import numpy as np

from checkpoints.answers.diff import Difference, Verdict
from checkpoints.answers.picture import Grid, Picture, Spread
from checkpoints.record import Rows

from ..measured.align import numbers_of, place_of
from ..measured.records import Records

_SHOWN = 4096  # values of a row that are drawn: more than a picture's width can resolve


def picture(records: Records, verdict: Verdict, truth: Rows | None = None) -> Picture:
    """The grid of all records, and both sides of the first divergence (of the worst record if there is none).

    `truth` is that record in float64, if it is known.
    """
    shown = verdict.first_divergence or verdict.worst
    ours, ref = (_spread(records, shown, ours=which) for which in (True, False))
    return Picture(grid(records), ours, ref, None if truth is None else _of_row(truth, 0))


def grid(records: Records) -> Grid:
    """Every record in its place, points by positions."""
    places, column = np.unique(numbers_of(records.seq, records.token_idx), return_inverse=True)
    shape = (len(records.pairs), len(places))
    layers = {name: np.full(shape, np.nan) for name in ("nmse", "max_abs", "of_limit", "limit")}
    at = (records.point, column)
    for name, values in (
        ("nmse", records.measures.nmse),
        ("max_abs", records.measures.max_abs),
        (
            "of_limit",
            np.where(records.trusted, records.of_limit, 0.0),
        ),
        ("limit", records.limit),
    ):
        layers[name][at] = values
    columns = tuple(map(place_of, places.tolist()))
    tokens = tuple(records.text.get(position) if seq == 0 else None for seq, position in columns)
    return Grid(records.names, columns, tokens, **layers)


def _spread(records: Records, shown: Difference | None, *, ours: bool) -> Spread | None:
    pair = next((pair for pair in records.pairs if shown is not None and pair.point == shown.checkpoint), None)
    if pair is None or shown is None:
        return None
    rows = pair.ours if ours else pair.ref
    at = np.flatnonzero((rows.seq == shown.seq) & (rows.token_idx == shown.token_idx))
    return _of_row(rows, int(at[0])) if len(at) else None


def _of_row(rows: Rows, r: int) -> Spread:
    values = rows.values[r, : int(rows.counts[r])]
    finite = tuple(values[np.isfinite(values)][:_SHOWN].tolist())
    n, total, l2 = (_stat(rows, r, name) for name in ("n", "sum", "l2"))
    mean = deviation = None
    counted = n - (_stat(rows, r, "nonfinite") or 0) if n is not None else None
    if counted and total is not None:
        mean = total / counted
        if l2 is not None:
            deviation = sqrt(max(l2 * l2 / counted - mean * mean, 0.0))
    return Spread(finite, None if n is None else int(n), _stat(rows, r, "min"), _stat(rows, r, "max"), mean, deviation)


def _stat(rows: Rows, r: int, name: str) -> float | None:
    column = rows.stats.get(name)
    return None if column is None or not np.isfinite(column[r]) else float(column[r])
