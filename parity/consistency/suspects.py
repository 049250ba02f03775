"""What to suspect where an engine gives other values for the same positions computed in other portions."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from checkpoints.answers.diff import Verdict
from checkpoints.points import parse

from ..diff.limits import TABLE
from ..run.command import PORTIONS, SEQUENCES, STATE

CACHE, POSITIONS, MASK, BATCH = "cache", "positions", "mask", "batch size"
OF_EARLIER = "cache, positions or mask"
RECURRENCE = f"recurrent state, or {OF_EARLIER}"
OTHERS, SAVED = "sequences", "state"
_BY_KIND = {
    **dict.fromkeys(("q_rope", "k_rope"), POSITIONS),
    **dict.fromkeys(("k_read", "v_read"), CACHE),
    "kq_soft_max": MASK,
    **dict.fromkeys(("kq", "kqv_out"), CACHE),
}
_WORDS = {
    CACHE: "keys or values of earlier passes are not those that were computed: rows written to or read from other places",
    POSITIONS: "Q or K are rotated by another position: the count of earlier tokens is not added, or added twice",
    MASK: "scores are right and weights are not: the mask takes positions of this pass for positions in the sequence",
    OTHERS: "a prompt gives other values in a batch: padding or other sequences' rows are seen, or positions are counted across sequences",
    SAVED: "the saved state is incomplete or restored to other places: keys, values, positions",
    BATCH: "the same row gives other values among other rows: a kernel depends on the number of tokens",
    RECURRENCE: "right within the first portion, wrong after it, in a layer of which no point of attention was recorded: what its "
    "recurrence or its convolution, if it has one, keeps of earlier passes is lost, old or another sequence's",
}
# Behind a table of F16 (GELU) two right float32 orders of computing differ by its steps.
_OF_TABLE = (
    f"no more than {TABLE:g} apart: rounding does this behind an activation that is looked up in a table of F16 (ggml's GELU), else a "
    "kernel depends on the number of tokens"
)
# An error after the first portion that is so much larger than one within it is another one. A choice: behind a table of F16 right engines
# were 3e-9 to 5e-9 apart within it, and a lost state 1e-2 after it.
_LOUDER = 1e3
_BY_WAY = {SEQUENCES: OTHERS, STATE: SAVED}
_ROWWISE = ("attn_norm", "q", "k", "v", "attn_out", "ffn_norm", "ffn_gate", "ffn_up", "ffn_swiglu", "ffn_out")
_ALL_POINTS = "--points all tells which of them"
MORE_POINTS = "dumps of q_rope, k_rope, kq_soft_max and kqv_out would show which of them"


def suspected(verdict: Verdict, starts: NDArray[np.int64], advice: str = _ALL_POINTS, way: str = PORTIONS) -> tuple[str, str]:
    """What to suspect if a comparison of portions fails, and a sentence; empty if it does not.

    Args:
        starts: the first positions of the portions, int64.
        advice: what would decide, if the recorded points leave it open.
        way: how the other side was computed: the placeholder that requests it.
    """
    first = verdict.first_divergence
    if verdict or first is None:
        return "", ""
    second = int(starts[1]) if len(starts) > 1 else 0
    worst = max((point.worst for point in verdict.points), key=lambda record: record.nmse or 0.0)
    if first.token_idx < second <= worst.token_idx and (worst.nmse or 0.0) > _LOUDER * (first.nmse or np.inf):
        first = worst
    origins = [origin.first for origin in verdict.origins if first.token_idx < second or origin.first.token_idx >= second]
    kinds = [parse(origin.checkpoint).kind for origin in origins] or [parse(first.checkpoint).kind]
    suspects = [_BY_KIND[kind] for kind in kinds if kind in _BY_KIND]
    at = f"{'worst' if first is worst else 'first'} at {first.checkpoint}, position {first.token_idx}"
    if way in _BY_WAY:
        return _BY_WAY[way], f"{_WORDS[_BY_WAY[way]]} ({at})"
    if suspects:
        return suspects[0], f"{_WORDS[suspects[0]]} ({at})"
    if (worst.nmse or np.inf) <= TABLE:
        if first.token_idx < second:
            return BATCH, f"{_OF_TABLE} ({at})"
        return f"{BATCH}, {OF_EARLIER}", f"{_OF_TABLE}, or what is kept of earlier passes is as little off ({at}): {advice}"
    if _recurs([point.checkpoint for point in verdict.points], parse(first.checkpoint).layer) and first.token_idx >= second:
        return RECURRENCE, f"{_WORDS[RECURRENCE]}; else {OF_EARLIER} ({at}): {advice}"
    if first.token_idx < second or parse(first.checkpoint).kind in _ROWWISE:
        return BATCH, f"{_WORDS[BATCH]} ({at})"
    return OF_EARLIER, f"right within the first portion, wrong after it ({at}): {advice}"


def _recurs(names: Sequence[str], layer: int | None) -> bool:
    """Whether a layer, or any of them, was recorded with points of its own and none of attention's: it may have a recurrence."""
    points = [parse(name) for name in names]
    inside = [point for point in points if point.layer is not None and layer in (None, point.layer)]
    return not any(point.kind in _BY_KIND for point in inside) and any(point.known is None for point in inside)


def among_others(verdict: Verdict, agreeing: Sequence[int]) -> tuple[str, str]:
    """What to suspect of a sequence that differs and was computed with others, some of which may agree; and a sentence."""
    first = verdict.first_divergence
    at = "" if first is None else f" (first at {first.checkpoint}, position {first.token_idx})"
    if not agreeing:
        return OTHERS, f"{_WORDS[OTHERS]}{at}"
    named = ", ".join(map(str, agreeing[:4])) + (", …" if len(agreeing) > 4 else "")
    which = f"sequence{'s' * (len(agreeing) > 1)} {named} agree{'s' * (len(agreeing) == 1)}"
    return OTHERS, f"{which}: other sequences' keys, values or padding are seen, or positions are counted across sequences{at}"


def first_to_differ(verdict: Verdict) -> str:
    """The first point, in dataflow order, at which any value differs: the first operation that depends on something irrelevant."""
    differing = (point for point in verdict.points if point.worst.nmse or point.worst.max_abs)
    return next((point.checkpoint for point in differing), "")
