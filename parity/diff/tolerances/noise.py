"""Single positions at which float32's own noise exceeds the exact limit. Unlike faults these are rare, and the error does not jump.

Where two attention scores nearly tie, rounding is amplified from layer to layer, at one position in hundreds.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..limits import JUMP
from ..measured.dataflow import Flow, Upstream, upstream

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

# Measured (benchmarks/noise.py, embedded model): of 24 prompts of 512 random ids one reaches 0.99 of the limit at the layers' outputs.
# At all 459 points, 128 tokens of that prompt have nine records over it: by at most 2.1 times, at most 1.8 times the worst error before
# them, eight of them at one position. This allows five times that.
BEYOND = 10.0
# One such position among 12,288, or among 72 in the shortest beginning of that prompt that shows it; a fault is wrong at more, or jumps.
RARE = 50


def outliers(point: NDArray[np.int64], nmse: Floats, of_limit: Floats, upstream: Upstream) -> Bools:
    """Which records are over their limit by noise alone.

    Args:
        point: int64 [R], the number of each record's point, ascending.
        nmse, of_limit: float64 [R]; `upstream` is that of the same records.

    Returns:
        bool [R]: all failing records of a point if they are at most one in `RARE` of its records (a shorter prompt cannot show how rare
        they are), and each is at most `BEYOND` times over its limit and less than a jump above the worst error that it depends on.
    """
    failed = of_limit > 1
    if not failed.any():
        return failed
    with np.errstate(divide="ignore", invalid="ignore"):
        grown = failed & (of_limit <= BEYOND) & (nmse <= JUMP * upstream.worst)
    records = np.bincount(point)
    over, quiet = (np.bincount(point, weights=rows, minlength=len(records)) for rows in (failed, grown))
    rare = (over == quiet) & ((over * RARE <= records) | (records < RARE))
    outlying: Bools = grown & rare[point]
    return outlying


def excused(
    model: Flow,
    point: NDArray[np.int64],
    seq: NDArray[np.int64],
    token_idx: NDArray[np.int64],
    nmse: Floats,
    of_limit: Floats,
    limit: Floats,
) -> tuple[Floats, tuple[str, ...]]:
    """Every record's limit [R], `BEYOND` times higher for those that `outliers` finds, and the note on them.

    Args:
        model, point, seq, token_idx, nmse: as in `dataflow.upstream`; `of_limit`: [R], the error in proportion to `limit`.
    """
    failed = of_limit > 1
    if not failed.any():
        return limit, ()
    noisy = outliers(point, nmse, of_limit, upstream(model, point, seq, token_idx, nmse, failed))
    return np.where(noisy, BEYOND * limit, limit), _note(point, noisy, model.names, of_limit)


def _note(point: NDArray[np.int64], noisy: Bools, names: Sequence[str], of_limit: Floats) -> tuple[str, ...]:
    """The note on noisy records: how many, at which points, how far over their limit; empty if there are none."""
    if not noisy.any():
        return ()
    listed = [names[number] for number in sorted(set(point[noisy].tolist()))]
    where = ", ".join(listed[:3]) + (", …" if len(listed) > 3 else "")
    records = np.bincount(point)
    rare = bool((np.bincount(point[noisy], minlength=len(records)) * RARE <= records).all())
    places = f"at single positions of {where}" if rare else f"of {where}"
    others = "these points agree everywhere else" if rare else "the prompt is too short to show whether that is rare"
    return (
        f"noise: {int(noisy.sum())} records {places} are up to {of_limit[noisy].max():.1f} × over the limit; nothing jumps there, and "
        f"{others} (an assumption: with --model the same steps in float64 decide)",
    )
