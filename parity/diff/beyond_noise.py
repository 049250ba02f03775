"""Sides that agree as lower arithmetic allows, but for a factor or a summand that all positions share: no rounding makes that."""

from collections.abc import Mapping

import numpy as np
from msgspec.structs import replace

from checkpoints.answers.diff import Pattern, Verdict
from reports.sentences import ARITHMETIC

from .align import Pair
from .dataflow import upstream
from .judge import judge
from .limits import EXACT_FLOOR, NATIVE
from .one_factor import STEP, Part, shared_part
from .readings import head_size_of
from .records import Bools, Floats, Records
from .routing import is_routing
from .slices import prepare


def held_to_noise(records: Records, verdict: Verdict) -> tuple[Records, Verdict]:
    """The records and their verdict; a divergence if what agrees as lower arithmetic allows has one factor or one summand besides."""
    precision = verdict.precision
    exact = records.limits.operations <= EXACT_FLOOR.operations
    if not verdict or exact or records.mode == NATIVE or precision is None or precision.arithmetic not in STEP:
        return records, verdict
    allowed = STEP["bf16" if precision.source == "assumed" else precision.arithmetic]
    headers = [dump.header.hparams for dump in (records.ref, records.ours) if dump.header is not None]
    head = head_size_of(records.ref.points, headers) or 0
    parts: dict[int, tuple[str, Part]] = {}
    for number, pair in enumerate(records.pairs):
        comparable = ~(records.open | records.otherwise)[records.point == number]
        if not is_routing(pair) and (found := _part(pair, comparable, allowed, head)) is not None:
            parts[number] = found
    if not parts:
        return records, verdict
    judged, divergent = failing_at(records, {number: part.beyond for number, (_, part) in parts.items()})
    first = divergent.first_divergence
    assert first is not None
    where, part = parts[judged.names.index(first.checkpoint)]
    sentence = (
        f"{first.checkpoint}: {where}{part.words} beside the noise of {ARITHMETIC[precision.arithmetic]} arithmetic, at every position: "
        "rounding is scattered and has no such part"
    )
    return judged, replace(divergent, pattern=Pattern("one-factor", sentence), operation="")


def _part(pair: Pair, comparable: Bools, allowed: float, head: int) -> tuple[str, Part] | None:
    """The part that a point's errors share, of all elements or of one head's, and whose it is; None if there is none."""
    values = prepare(pair)
    if values.counts is None or not comparable.any():
        return None
    width = int(values.counts[comparable].min())
    ours, right = (side[comparable, :width].astype(np.float64) for side in (values.a, values.b))
    finite = np.isfinite(ours) & np.isfinite(right)
    errors, right = (np.where(finite, side, 0.0) for side in (ours - right, right))
    if (part := shared_part(errors, right, allowed)) is not None:
        return "", part
    whole = bool(pair.ref.full().all()) and width == pair.ref.values.shape[1]
    heads = width // head if head and whole and width % head == 0 else 0
    for number in range(heads if heads > 1 else 0):
        inside = slice(number * head, (number + 1) * head)
        if (part := shared_part(errors[:, inside], right[:, inside], allowed)) is not None:
            return f"head {number} alone is ", part
    return None


def failing_at(records: Records, beyond: Mapping[int, float]) -> tuple[Records, Verdict]:
    """The records and their verdict if those of some points fail, given by number, by so many times what is allowed."""
    of_point: Floats = np.array([beyond.get(number, 0.0) for number in range(len(records.names))])
    failing = (of_point[records.point] > 0) & (records.measures.nmse > 0) & ~(records.open | records.otherwise)
    failed = records.failed | failing
    trusted = np.where(records.otherwise | records.open, 0.0, records.measures.nmse)
    judged = replace(
        records,
        failed=failed,
        of_limit=np.where(failing, np.fmax(records.of_limit, of_point[records.point]), records.of_limit),
        upstream=upstream(records.flow, records.point, records.seq, records.token_idx, trusted, failed),
    )
    return judged, judge(judged)
