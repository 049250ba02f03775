"""The figures that the report's pictures are drawn from, as compact JSON. Observable Plot draws them in the browser.

A grid of a quarter of a million records would be megabytes of text: each error is a 16-bit code on a logarithmic scale,
base64 of little-endian integers. `templates/report.js` reads the same code.
"""

import base64
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoints.answers.diff import Verdict
from checkpoints.answers.picture import Grid, Picture, Spread
from checkpoints.points import parse
from checkpoints.record import Dump

from .flow import flows
from .numbers import clean, token

UNKNOWN, ZERO, FIRST, INFINITE = 0, 1, 2, 65535
# Errors of float32 values lie within 1e-90 (the square of the smallest subnormal over the largest square) and 1e90; the
# codes between are 0.6 % apart, and errors are shown with two digits.
DECADES = 90.0
_STEPS = (INFINITE - 1 - FIRST) / (2 * DECADES)  # codes a decade
_PROPORTION_TOLERANCE = 0.01  # codes are 0.6 % apart: what differs more from nmse / limit is no rounding


def encode(values: NDArray[np.float64]) -> NDArray[np.uint16]:
    """uint16, of the same shape: 0 unknown (NaN), 1 zero, 65535 infinite, else 2 + (log10 |x| + 90) · 364.07."""
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = (np.log10(np.abs(values)) + DECADES) * _STEPS + FIRST
    whole = np.nan_to_num(np.rint(scaled), nan=0, posinf=0, neginf=0)
    codes: NDArray[np.uint16] = np.clip(whole, FIRST, INFINITE - 1).astype(np.uint16)
    codes[np.isnan(values)] = UNKNOWN
    codes[values == 0] = ZERO
    codes[np.isinf(values)] = INFINITE
    return codes


def decode(codes: NDArray[np.uint16]) -> NDArray[np.float64]:
    """The values that `encode` stands for, as the browser reads them."""
    values = 10.0 ** ((codes.astype(np.float64) - FIRST) / _STEPS - DECADES)
    values[codes == UNKNOWN] = np.nan
    values[codes == ZERO] = 0.0
    values[codes == INFINITE] = np.inf
    return values


def figures(verdict: Verdict, picture: Picture, sides: Sequence[Dump] = ()) -> dict[str, Any]:
    """Everything that `templates/report.js` draws; NaN and infinities are null. `sides` are the dumps, for their dataflow."""
    grid = picture.grid
    first = verdict.first_divergence
    truth = {point.checkpoint: point for point in verdict.truth_points}
    return {
        "code": {"first": FIRST, "steps": _STEPS, "decades": DECADES},
        "grid": _grid(grid),
        "flow": flows(verdict, grid.points, sides),
        "mark": _mark(grid, first.checkpoint, first.seq, first.token_idx) if first is not None else None,
        "points": [
            {
                "nmse": _finite(point.worst.nmse),
                "limit": point.worst.limit,
                "status": point.status,
                "token_idx": point.worst.token_idx,
                "truth": [_finite(far.ours), _finite(far.ref)] if (far := truth.get(point.checkpoint)) is not None else None,
            }
            for point in verdict.points
        ],
        "spreads": [
            {"side": side, **_spread(rows)}
            for side, rows in (("ours", picture.ours), ("reference", picture.ref), ("float64", picture.truth))
            if rows is not None
        ],
    }


def _grid(grid: Grid) -> dict[str, Any]:
    names = [clean(name) for name in grid.points]
    limits = np.nanmax(grid.limit, axis=1, initial=0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = grid.nmse / limits[:, None]
        unexpected = ~(np.isclose(grid.of_limit, expected, rtol=_PROPORTION_TOLERANCE, equal_nan=True) | (grid.nmse == 0))
        unexpected |= (grid.nmse == 0) & (grid.of_limit > 0)
    return {
        "points": names,
        "layers": _layers(grid.points),
        "positions": [position for _, position in grid.columns],
        "sequences": [seq for seq, _ in grid.columns] if any(seq for seq, _ in grid.columns) else None,
        "tokens": [token(text) for text in grid.tokens],
        "limits": limits.tolist(),
        "nmse": _base64(encode(grid.nmse)),
        "max_abs": _base64(encode(grid.max_abs)),
        # Where the proportion is not nmse / limit: weight given to later positions, a limit of its own.
        "of_limit": [[int(i), _finite(float(grid.of_limit.flat[i]))] for i in np.flatnonzero(unexpected)],
    }


def _layers(points: tuple[str, ...]) -> list[list[Any]]:
    """[first row, name] of each stretch of points of one layer."""
    layers: list[list[Any]] = []
    row = 0
    for layer, members in groupby(points, lambda name: parse(name).layer):
        names = list(members)
        if layer is not None:
            layers.append([row, f"blk.{layer}"])
        else:
            layers += [[row + number, clean(name)] for number, name in enumerate(names)]
        row += len(names)
    return layers


def _mark(grid: Grid, checkpoint: str, seq: int, position: int) -> list[int] | None:
    if checkpoint not in grid.points or (seq, position) not in grid.columns:
        return None
    return [grid.points.index(checkpoint), grid.columns.index((seq, position))]


def _spread(spread: Spread) -> dict[str, Any]:
    return {
        "values": list(spread.values),
        "low": spread.low,
        "high": spread.high,
        "mean": spread.mean,
        "deviation": spread.deviation,
    }


def _base64(codes: NDArray[np.uint16]) -> str:
    return base64.b64encode(codes.astype("<u2").tobytes()).decode("ascii")


def _finite(value: float | None) -> float | None:
    return value if value is not None and np.isfinite(value) else None
