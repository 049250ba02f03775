"""From the numbers of all records to one answer: where the sides first diverge, what explains it, what to record next."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from checkpoints.answers.diff import (
    AGREES,
    DIVERGENCE,
    FRESH,
    GROWN,
    INHERITED,
    OTHERWISE,
    PARITY,
    Origin,
    PointSummary,
    Precision,
    Verdict,
)
from checkpoints.points import LOGITS

from ..limits import EXACT_FLOOR, NATIVE, lowest
from ..measured.choices import choices
from ..measured.records import Records
from ..measured.seen import seen

if TYPE_CHECKING:
    from .first import First

_ORIGINS = 20  # points of origin that a verdict carries; more are counted in a note


def judge(records: Records) -> Verdict:
    """The verdict on measured records."""
    missing = records.missing_ours.records + records.missing_ref.records
    notes = list(records.notes) + list(records.tokens.notes)
    origins = _origins(records)
    if len(origins) > _ORIGINS:
        notes.append(f"{len(origins) - _ORIGINS} further points of origin are not listed")
    rows_seen = tuple(seen(pair) for pair in records.pairs)
    divergence, pattern = records.tokens.divergence, records.tokens.pattern
    first: First | None = None
    if divergence is None and origins:
        from .first import explain_first

        first = explain_first(records, origins[0], rows_seen)
        divergence, pattern = first.divergence, first.pattern
    failed = divergence is not None or bool(records.failed.any()) or (records.strict and missing > 0)
    if records.strict and missing:
        notes.append(f"--strict: {missing} records are missing on one side")
    trusted = np.flatnonzero(records.trusted)
    return Verdict(
        verdict=DIVERGENCE if failed else PARITY,
        compared=len(records) - int(records.open.sum()),
        mode=records.mode,
        limits=records.limits,
        points=_summaries(records),
        worst=records.difference(_worst(records, trusted)) if len(trusted) else None,
        first_divergence=divergence,
        origins=tuple(_origin(records, start) for start in origins[:_ORIGINS]),
        last_agreement=first.agreement if first else None,
        next=first.next if first else "",
        next_slice=first.next_slice if first else None,
        operation=first.operation if first else "",
        pattern=pattern,
        missing_ours=records.missing_ours,
        missing_ref=records.missing_ref,
        uncompared=records.uncompared,
        choices=choices(records),
        left_out=records.left_out,
        excused=records.excused,
        notes=tuple(notes),
        record_faults=records.record_faults,
        seen=rows_seen,
        precision=_precision(records),
    )


def _precision(records: Records) -> Precision | None:
    """The arithmetic in which the sides were judged; if nothing states it, the most precise one that the errors allow."""
    if records.mode == NATIVE or not len(records):
        return None
    trusted = records.trusted
    logits = np.array([name == LOGITS for name in records.names])[records.point] & trusted
    nmse = records.measures.nmse
    worst, worst_logits = (float(nmse[rows].max(initial=0.0)) for rows in (trusted & ~logits, logits))
    exact = np.where(logits, EXACT_FLOOR.logits, EXACT_FLOOR.operations)
    over = np.flatnonzero(trusted & (nmse > np.maximum(exact, np.where(records.limits.assumed, 0.0, records.limit))))
    in_float32 = records.names[int(records.point[over[0]])] if len(over) and records.limits.assumed else ""
    if records.limits.assumed:
        arithmetic = lowest(worst, worst_logits)
        return Precision(arithmetic, arithmetic != "f32", "assumed", in_float32)
    return Precision(records.stated, False, "stated") if records.stated else None


def _origins(records: Records) -> list[int]:
    """The first record of each point of origin: failing, with nothing failing above; by phase, point, position."""
    minimal = np.flatnonzero(records.failed & ~records.upstream.failed)
    if not len(minimal):
        return []
    order = np.lexsort((records.token_idx[minimal], records.seq[minimal], records.point[minimal], records.decode[minimal]))
    _, first = np.unique(records.point[minimal][order], return_index=True)
    starts = [int(i) for i in minimal[order][np.sort(first)]]
    return [start for start in starts if not _under_the_mask(records, minimal, start)]


def _under_the_mask(records: Records, minimal: NDArray[np.int64], start: int) -> bool:
    """Whether an origin's records are all NaN or infinite because a later position of a value that it is made from is: a mask gives
    that position the weight 0, but 0 · NaN is NaN.
    """
    more_nonfinite = records.measures.nonfinite_ours > records.measures.nonfinite_ref
    if not more_nonfinite[minimal[records.point[minimal] == records.point[start]]].all():
        return False
    numbers = {name: number for number, name in enumerate(records.names)}
    above = [numbers[name] for name in records.flow.ancestors(records.names[records.point[start]]) if name in numbers]
    later = (records.token_idx > records.token_idx[start]) & (records.seq == records.seq[start])
    return bool((more_nonfinite & later & np.isin(records.point, above)).any())


def _origin(records: Records, first: int) -> Origin:
    point = records.point[first]
    here = (records.point == point) & (records.seq == records.seq[first]) & records.failed & ~records.upstream.failed
    return Origin(records.difference(first), tuple(records.token_idx[here].tolist()))


def _worst(records: Records, rows: NDArray[np.int64]) -> int:
    """The record with the largest error in proportion to its limit; among equals the larger NMSE, then the first."""
    of_limit, nmse = records.of_limit[rows], records.measures.nmse[rows]
    top = np.flatnonzero(of_limit == of_limit.max())
    return int(rows[top[np.argmax(nmse[top])]])


def _summaries(records: Records) -> tuple[PointSummary, ...]:
    fresh = records.fresh()
    summaries: list[PointSummary] = []
    starts = np.searchsorted(records.point, np.arange(len(records.pairs) + 1))
    for number in range(len(records.pairs)):
        rows = np.arange(starts[number], starts[number + 1])
        failed = records.failed[rows]
        status = AGREES
        if failed.any():
            inherited = records.upstream.failed[rows][failed].any()
            status = FRESH if fresh[rows].any() else (INHERITED if inherited else GROWN)
        elif records.otherwise[rows].any():
            status = OTHERWISE
        comparable = rows[~records.open[rows]]
        worst = records.difference(_worst(records, comparable if len(comparable) else rows))
        summaries.append(PointSummary(worst.checkpoint, worst.layer, len(rows), int(failed.sum()), status, worst))
    return tuple(summaries)
