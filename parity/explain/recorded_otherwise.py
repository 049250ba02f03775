"""Records whose elements only the recorder put into another order: Q and K as halves where llama.cpp has neighbours, say.

A chain of records may have that order (q, q_norm, q_rope); what is computed from the last of them shows that the engine is right.
"""

from collections.abc import Collection

import numpy as np

from checkpoints.answers.diff import AGREES
from checkpoints.answers.explain import SuspectRecord
from checkpoints.record import Dump

from ..diff.limits import NATIVE
from ..diff.readings.layouts import is_rotated, reordered
from ..diff.readings.readings import LAYOUT, Allowed, head_size_of
from .as_compared import beside_right
from .case import Case, ExplainOptions
from .records.records import Expected, right_rows

_LOOKED_AT = 8  # records of a point that are asked whether another order of elements makes them right


def recorded_otherwise(case: Case, options: ExplainOptions) -> tuple[SuspectRecord, ...]:
    """The points that are recorded in another order, by what `parity diff` says of them; but none of which nothing later agrees."""
    if case.dump.header is not None and case.dump.header.mode == NATIVE:
        return ()  # what its types cost is not known here, so that nothing computed from a record would be known to agree
    head_size = head_size_of(
        Dump("our engine", case.header(), {entry.point: entry.pair.ref for entry in case.entries}), case.dump
    )
    if not any(_may_be_reordered(case, entry, head_size) for entry in case.entries):
        return ()
    verdict = beside_right(case, options).verdict
    every = {fault.checkpoint: fault for fault in verdict.record_faults}
    agreeing = {point.checkpoint for point in verdict.points if point.status == AGREES}
    otherwise = {name for name, fault in every.items() if fault.kind == LAYOUT}
    for step in case.transformer.steps:  # a cache in that order is right as well
        if step.makes in every and not otherwise.isdisjoint(step.names):
            otherwise.add(step.makes)
    faults = {name: fault for name, fault in every.items() if name in otherwise}
    suspects = (
        SuspectRecord(name, _agreeing(case, name, faults, agreeing), fault.sentence.partition(";")[0])
        for name, fault in faults.items()
    )
    return tuple(suspect for suspect in suspects if suspect.agreeing)


def _may_be_reordered(case: Case, entry: Expected, head_size: int | None) -> bool:
    """Whether the first wrong records of a point are right in another order, which few values show beside whole rows."""
    wrong = np.flatnonzero(entry.over)[:_LOOKED_AT]
    if not len(wrong) or entry.index is not None or not np.isfinite(entry.base[wrong]).all():
        return False
    ours, ref = entry.pair.ours.take(wrong), entry.pair.ref.take(wrong)
    if is_rotated(entry.point):
        point = {entry.point: entry.pair.ours}
        ref = right_rows(case.replay, case.positions, point, whole=point)[entry.point].take(entry.rows[wrong])
    # Far below their error is enough: what the engine's arithmetic costs is not known yet, and `diff` judges by it.
    far_below = Allowed.of(np.full(len(wrong), np.inf), entry.base[wrong], ours, ref)
    return reordered(ours, ref, far_below, head_size) is not None


def _agreeing(case: Case, name: str, otherwise: Collection[str], agreeing: Collection[str]) -> tuple[str, ...]:
    """The nearest recorded points computed from one that agree as they are recorded."""
    recorded = {entry.point for entry in case.entries}
    reached, nearest = {name}, []
    for step in case.transformer.steps:
        if reached.isdisjoint(step.names):
            continue
        if step.makes not in recorded or step.makes in otherwise:
            reached.add(step.makes)
        elif step.makes in agreeing:
            nearest.append(step.makes)
    return tuple(nearest)
