"""The answer that a state of the search comes down to: its causes, what is left, and what to record next."""

from collections.abc import Sequence
from functools import partial

import numpy as np

from checkpoints.answers.explain import DivergentPlace, Explanation
from checkpoints.points import LOGITS, in_layer

from ...diff.measured.seen import seen
from ..case import Case
from ..records.records import Expected
from ..search.search import Search
from ..search.state import RecordKey, SearchState
from .causes import causes_of, count_over

_NEXT = ("attn_norm", "q", "k", "v", "q_rope", "k_rope", "kqv_out", "attn_out", "ffn_inp", "ffn_norm", "ffn_swiglu", "l_out")


def answer_of(case: Case, search: Search, start: SearchState, best: SearchState) -> Explanation:
    """What the best state explains of the differences of the start, and what it leaves."""
    where = partial(_where, case)
    return Explanation(
        records=sum(len(entry.rows) for entry in case.entries),
        differing=count_over(case.entries, start),
        first=where(start),
        last_agreement=_last_agreement(case.entries, start.first),
        causes=tuple(causes_of(case, search, start, best)),
        remaining=where(best),
        next=_next(case, search, best),
        faults=len(search.tried.faults),
        variants=search.tried.variants,
        nearest=search.tried.nearest if np.isfinite(search.tried.nearest) else None,
        complete=search.screening.budget.complete,
        notes=case.notes,
        seen=tuple(seen(entry.pair) for entry in case.entries),
        passes=_passes(case.entries),
    )


def _passes(entries: Sequence[Expected]) -> tuple[float, float]:
    """The largest limit of the points before the logits, and of the logits."""
    largest = dict.fromkeys((False, True), 0.0)
    for entry in entries:
        logits = entry.point == LOGITS
        largest[logits] = max(largest[logits], float(entry.limit.max(initial=0.0)))
    return largest[False], largest[True]


def _where(case: Case, state: SearchState) -> DivergentPlace | None:
    if state.first is None:
        return None
    entry = case.entries[state.first.point]
    at = entry.rows == state.first.row
    worst = state.nmse[state.first.point][at]
    return DivergentPlace(entry.point, int(case.positions[state.first.row]), float(worst.max()), float(entry.limit[at].max()))


def _last_agreement(entries: Sequence[Expected], first: RecordKey | None) -> str | None:
    if first is None or first.point == 0:
        return None
    return entries[first.point - 1].point


def _next(case: Case, search: Search, best: SearchState) -> str:
    """The points to record next if something is left unexplained; "" if only one operation is left."""
    if best.first is None:
        return ""
    layers = search.screening.suspects(best)
    if not layers:
        return ""
    if len(layers) > 1:
        return f"blk.{{{layers[0]}..{layers[-1]}}}.l_out"
    known = {entry.point for entry in case.entries}
    wanted = [name for kind in _NEXT if (name := in_layer(layers[0], kind)) in case.replay.values and name not in known]
    cone = search.screening.cone(best)
    return ",".join(name for name in wanted if not cone.sure or name in cone.steps)
