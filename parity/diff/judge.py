"""From the numbers of all records to one answer: where the sides first part, what explains it, what to record next."""

import numpy as np
from numpy.typing import NDArray

from checkpoints.answers.diff import (
    AGREES,
    DIVERGENCE,
    FRESH,
    GROWN,
    INHERITED,
    PARITY,
    Agreement,
    Origin,
    PointSummary,
    Verdict,
)
from checkpoints.points import EMBD

from .choices import choices
from .dataflow import Stretch
from .limits import FUTURE_MASS
from .next_points import next_points
from .pattern import Evidence, diagnose
from .records import Records

_ORIGINS = 20  # points of origin that a verdict carries; more are counted in a note


def judge(records: Records) -> Verdict:
    """The verdict on measured records."""
    missing = records.missing_ours.records + records.missing_ref.records
    notes = list(records.notes) + list(records.tokens.notes)
    origins = _origins(records)
    if len(origins) > _ORIGINS:
        notes.append(f"{len(origins) - _ORIGINS} further points of origin are not listed")
    divergence, pattern = records.tokens.divergence, records.tokens.pattern
    agreement: Agreement | None = None
    advice = named = ""
    if divergence is None and origins:
        first = origins[0]
        divergence = records.difference(first)
        agreement = _last_agreement(records, first)
        found = records.flow.between(divergence.checkpoint)
        advice = next_points(divergence.checkpoint, agreement.checkpoint if agreement else None, found, records.names)
        named = _operation(divergence.checkpoint, found)
        pattern = diagnose(_evidence(records, first, found))
    failed = divergence is not None or bool(records.failed.any()) or (records.strict and missing > 0)
    if records.strict and missing:
        notes.append(f"--strict: {missing} records are missing on one side")
    return Verdict(
        verdict=DIVERGENCE if failed else PARITY,
        compared=len(records),
        mode=records.mode,
        limits=records.limits,
        points=_summaries(records),
        worst=records.difference(_worst(records, np.arange(len(records)))) if len(records) else None,
        first_divergence=divergence,
        origins=tuple(_origin(records, first) for first in origins[:_ORIGINS]),
        last_agreement=agreement,
        next=advice,
        operation=named,
        pattern=pattern,
        missing_ours=records.missing_ours,
        missing_ref=records.missing_ref,
        choices=choices(records),
        left_out=records.left_out,
        notes=tuple(notes),
    )


def _origins(records: Records) -> list[int]:
    """The first record of each point of origin: failing, with nothing failing above; by phase, point, position."""
    minimal = np.flatnonzero(records.failed & ~records.upstream.failed)
    if not len(minimal):
        return []
    order = np.lexsort((records.token_idx[minimal], records.seq[minimal], records.point[minimal], records.decode[minimal]))
    _, first = np.unique(records.point[minimal][order], return_index=True)
    return [int(i) for i in minimal[order][np.sort(first)]]


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
    made: list[PointSummary] = []
    starts = np.searchsorted(records.point, np.arange(len(records.pairs) + 1))
    for number in range(len(records.pairs)):
        rows = np.arange(starts[number], starts[number + 1])
        failed = records.failed[rows]
        status = AGREES
        if failed.any():
            inherited = records.upstream.failed[rows][failed].any()
            status = FRESH if fresh[rows].any() else (INHERITED if inherited else GROWN)
        worst = records.difference(_worst(records, rows))
        made.append(PointSummary(worst.checkpoint, worst.layer, len(rows), int(failed.sum()), status, worst))
    return tuple(made)


def _last_agreement(records: Records, first: int) -> Agreement | None:
    """The last point above the first divergence; above it nothing fails at positions up to it, or it were not the first."""
    name, position = records.names[records.point[first]], records.token_idx[first]
    above = records.flow.ancestors(name)
    for number in range(int(records.point[first]) - 1, -1, -1):
        if records.names[number] not in above:
            continue
        here = (records.point == number) & (records.seq == records.seq[first])
        reach = here & (records.token_idx <= position)
        if reach.any():
            whole = not records.failed[here].any()
            return Agreement(records.names[number], int((here if whole else reach).sum()), whole)
    return None


def _operation(name: str, found: Stretch | None) -> str:
    if found is None or found.unrecorded:
        return ""
    if not found.inputs:
        return f"{name} is looked up by token: the table or the row is wrong"
    agree = "which agrees" if len(found.inputs) == 1 else "which agree"
    return f"{name} is made from {' and '.join(found.inputs)}, {agree}: this operation is wrong"


def _evidence(records: Records, first: int, found: Stretch | None) -> Evidence:
    """What the first diverging point shows at the positions that nothing above has spoiled."""
    name = records.names[records.point[first]]
    here = np.flatnonzero(
        (records.point == records.point[first]) & (records.seq == records.seq[first]) & ~records.upstream.failed
    )
    measures = records.measures
    failing = here[records.failed[here]]
    return Evidence(
        point=name,
        flow=records.flow,
        stretch=found,
        position=records.token_idx[here],
        failed=records.failed[here],
        step=records.step[here],
        decode=records.decode[here],
        nonfinite=bool(np.any(measures.nonfinite_ours[failing] > measures.nonfinite_ref[failing])),
        leak=bool(np.any(measures.future_mass[failing] > FUTURE_MASS)),
        drifted=not records.fresh()[failing].any(),
        settled=found is not None and not found.unrecorded,
        embedded=EMBD in records.names,
        token=records.text.get(int(records.token_idx[first])),
    )
