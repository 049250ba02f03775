"""Records whose elements only the recorder put into another order: Q and K as halves where llama.cpp has neighbours, say.

A chain of records may have that order (q, q_norm, q_rope); what is computed from the last of them shows that the engine is right.
"""

from collections.abc import Collection

import numpy as np

from checkpoints.answers.explain import SuspectRecord
from checkpoints.record import Dump

from ..diff.limits import NATIVE
from ..diff.readings.layouts import reordered
from ..diff.readings.readings import LAYOUT, Allowed, head_size_of
from .as_compared import beside_right
from .case import Case, ExplainOptions
from .records.records import Expected

_LOOKED_AT = 8  # records of a point that are asked whether another order of elements makes them right


def recorded_otherwise(case: Case, options: ExplainOptions) -> tuple[SuspectRecord, ...]:
    """The points that are recorded in another order, by what `parity diff` says of them; but none of which nothing later agrees."""
    if case.dump.header is not None and case.dump.header.mode == NATIVE:
        return ()  # what its types cost is not known here, so that nothing computed from a record would be known to agree
    head_size = head_size_of(
        Dump("our engine", case.header(), {entry.point: entry.pair.ref for entry in case.entries}), case.dump
    )
    if not any(_may_be_reordered(entry, head_size) for entry in case.entries):
        return ()
    faults = {fault.checkpoint: fault for fault in beside_right(case, options).verdict.record_faults if fault.kind == LAYOUT}
    suspects = (
        SuspectRecord(name, _agreeing(case, name, faults), fault.sentence.partition(";")[0]) for name, fault in faults.items()
    )
    return tuple(suspect for suspect in suspects if suspect.agreeing)


def _may_be_reordered(entry: Expected, head_size: int | None) -> bool:
    """Whether the first wrong records of a point are right in another order."""
    wrong = np.flatnonzero(entry.over)[:_LOOKED_AT]
    if not len(wrong) or entry.index is not None or not np.isfinite(entry.base[wrong]).all():
        return False
    ours, ref = entry.pair.ours.take(wrong), entry.pair.ref.take(wrong)
    return reordered(ours, ref, Allowed.of(entry.limit[wrong], entry.base[wrong], ours, ref), head_size) is not None


def _agreeing(case: Case, name: str, otherwise: Collection[str]) -> tuple[str, ...]:
    """The nearest recorded points computed from one that agree as they are recorded."""
    entries = {entry.point: entry for entry in case.entries}
    reached, agreeing = {name}, []
    for step in case.transformer.steps:
        if reached.isdisjoint(step.names):
            continue
        if step.makes not in entries or step.makes in otherwise:
            reached.add(step.makes)
        elif not entries[step.makes].over.any():
            agreeing.append(step.makes)
    return tuple(agreeing)
