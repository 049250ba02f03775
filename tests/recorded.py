"""Right dumps as another recorder would have written them, for tests of what is then said of the engine."""

from collections.abc import Callable

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from checkpoints.points import parse
from checkpoints.record import Dump
from checkpoints.summary import summarise
from parity.diff.compare import Options

F32 = Options(compute="f32")
Change = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def changed(dump: Dump, change: Change, names: Callable[[str], bool], size: int | None = 16, *, bare: bool = False) -> Dump:
    """A dump whose rows at these points were recorded in another way; `bare`: leading values and nothing else, at all points."""
    points = {}
    for name, rows in dump.points.items():
        if len(set(rows.shapes)) > 1:  # rows that grow with the position
            points[name] = rows
            continue
        values = change(rows.values) if names(name) else rows.values
        summary = summarise(name, np.ascontiguousarray(values), rows.token_idx, slice_size=size)
        points[name] = replace(summary, sketch=None, stats={}, shapes=((),) * len(summary)) if bare else summary
    return replace(dump, points=points)


def kinds(*wanted: str) -> Callable[[str], bool]:
    """Points of these kinds in every layer."""
    return lambda name: parse(name).kind in wanted


def only(dump: Dump, *names: str) -> Dump:
    """Some of a dump's points."""
    return replace(dump, points={name: dump.points[name] for name in names})
