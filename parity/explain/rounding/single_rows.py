"""Rows that an engine in a lower arithmetic computes in float32: those of passes over one token.

A library multiplies a single row by another kernel than several rows, which need not round its factors: cuBLAS's GEMM takes TF32 where it
is allowed, its GEMV never does. The rows that were rounded show it: their errors are, element by element, those of our own rounding, which
no fault leaves.
"""

from functools import partial

import numpy as np
from numpy.typing import NDArray

from engine.replay.precision import rounded

from ..case import Case
from ..records.records import Expected, first_over
from .mixed import likeness, own_steps, rounded_value
from .precision import KINDS, OURS
from .spared import VISIBLE


def with_single_rows(case: Case) -> Case:
    """The case of an engine whose arithmetic spares the rows that it shows to be in float32; the case itself if there are none."""
    rows = in_float32(case)
    return case.sparing(rows) if rows else case


def in_float32(case: Case) -> tuple[int, ...]:
    """The rows that are as in float32 at the first point that differs, while all others are our own rounding there; none without such.

    None either where records say that one of them is of a pass over several tokens.
    """
    first = first_over(case.entries)
    if first is None or first.over.all():
        return ()
    places = own_steps(case.transformer.steps, first.point, {entry.point for entry in case.entries})
    for kind in KINDS:
        value = rounded_value(case, places, partial(rounded, kind=kind, storage=False), first.point)
        if value is not None and len(rows := _spared(case, first, value)):
            return tuple(rows.tolist()) if _may_be_single(case, first, rows) else ()
    return ()


def _spared(case: Case, first: Expected, value: NDArray[np.float32]) -> NDArray[np.int64]:
    """The rows of a point that this rounded value must have moved and that did not move, if it is the error of all others."""
    right = case.replay.on_host[first.point]
    moved = first.between(value, right, case.positions) > VISIBLE * first.limit
    errors, known = first.errors_beside(right, case.positions)
    rounding = np.where(known, first.taken(value, case.positions) - first.taken(right, case.positions), 0.0)
    if likeness(errors[first.over], rounding[first.over]) < OURS:
        return np.zeros(0, dtype=np.int64)
    return np.setdiff1d(first.rows[moved & ~first.over], first.rows[first.over])


def _may_be_single(case: Case, first: Expected, rows: NDArray[np.int64]) -> bool:
    """Whether each of these rows is a pass of its own, as far as records say in which pass they were computed."""
    if not first.pair.ours.step.any():
        return True
    passes = np.array(case.passes)
    return bool((np.bincount(passes)[passes[rows]] == 1).all())
