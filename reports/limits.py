"""What the limits of a comparison mean, in sentences: where they differ by point, how large a fault they let pass, what is assumed."""

from collections.abc import Iterator
from math import isclose, sqrt

from checkpoints.answers.diff import AGREES, Verdict
from checkpoints.points import LOGITS

from .numbers import clean

_FLOAT32 = 1e-10  # NMSE: the limit of float32 on both sides (`parity.diff.limits.EXACT_FLOOR`)


def limits_of_their_own(verdict: Verdict) -> dict[str, float]:
    """Points whose worst record was judged by a limit other than the printed one, to which its "of limit" refers."""
    printed = {LOGITS: verdict.limits.logits}
    limits = {point.checkpoint: point.worst.limit for point in verdict.points if point.worst.of_limit}
    return {name: value for name, value in limits.items() if not isclose(value, printed.get(name, verdict.limits.operations))}


def hidden_by_rounding(verdict: Verdict) -> str:
    """How large a fault passes for rounding, in proportion to a row, under limits wider than float32's; else "".

    A limit is an NMSE, the square of that proportion.
    """
    in_float32 = verdict.precision is not None and verdict.precision.arithmetic == "f32"
    if in_float32 or verdict.limits.operations <= _FLOAT32:
        return ""
    judged = {
        point.checkpoint: point.worst.limit for point in verdict.points if point.status == AGREES and point.worst.of_limit
    }
    of_logits = judged.pop(LOGITS, 0.0)
    return pass_for_rounding(max(judged.values(), default=of_logits), of_logits)


def pass_for_rounding(largest: float, of_logits: float) -> str:
    """How large an error passes under these limits, as a share of a row; "" if they are float32's."""
    largest = largest or of_logits
    if largest <= _FLOAT32:
        return ""
    logits = f" (logits: {_percent(of_logits)})" if of_logits and of_logits != largest else ""
    return (
        f"scattered errors of up to {_percent(largest)} of a row{logits} pass for rounding, a fault's of that size too; "
        f"compared in float32, {_percent(_FLOAT32)} shows"
    )


def _percent(nmse: float) -> str:
    return f"{100 * sqrt(nmse):.2g} %"


def assumed(verdict: Verdict) -> Iterator[tuple[str, str]]:
    """What would be a divergence in float32, or that nothing says which limit applies."""
    precision = verdict.precision
    if precision is not None and precision.in_float32:
        yield "float32", f"in float32 {clean(precision.in_float32)} would be a divergence; --compute f32 applies that limit"
    elif verdict.limit_assumed:
        yield "limit", verdict.limits.source
