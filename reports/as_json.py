"""A verdict as JSON, the contract that scripts rely on. Keys may be added, but neither changed nor dropped."""

from math import isfinite, isnan
from typing import Any

from checkpoints.answers.diff import Difference, Missing, Verdict
from checkpoints.structs import as_dict

SCHEMA = 1


def verdict_as_json(verdict: Verdict) -> dict[str, Any]:
    """One JSON object: `schema`, `verdict`, `compared`, `mode`, `limit`, `worst`, `first_divergence` and what explains them.

    What is not known is null; non-finite numbers are the strings "NaN", "Infinity" and "-Infinity", as in a dump.
    """
    fields = {
        "schema": SCHEMA,
        "verdict": verdict.verdict,
        "compared": verdict.compared,
        "mode": verdict.mode,
        "limit": verdict.limits.operations,
        "limits": as_dict(verdict.limits),
        "worst": _difference(verdict.worst),
        "first_divergence": _difference(verdict.first_divergence),
        "origins": [{**(_difference(origin.first) or {}), "positions": list(origin.positions)} for origin in verdict.origins],
        "last_agreement": as_dict(verdict.last_agreement) if verdict.last_agreement else None,
        "next": verdict.next,
        "operation": verdict.operation,
        "pattern": as_dict(verdict.pattern) if verdict.pattern else None,
        "uncompared": as_dict(verdict.uncompared),
        "unjudged": as_dict(verdict.unjudged),
        "missing": {"ours": _missing(verdict.missing_ours), "ref": _missing(verdict.missing_ref)},
        "points": [
            {
                "checkpoint": point.checkpoint,
                "layer": point.layer,
                "records": point.records,
                "failed": point.failed,
                "status": point.status,
                "worst": _difference(point.worst, values=False),
            }
            for point in verdict.points
        ],
        "choices": as_dict(verdict.choices) if verdict.choices else None,
        "left_out": verdict.left_out,
        "excused": verdict.excused,
        "notes": list(verdict.notes),
        "ignored": list(verdict.ignored),
        "record_faults": [as_dict(fault) for fault in verdict.record_faults],
        "seen": [{**as_dict(item), "whole": item.whole} for item in verdict.seen],
        "next_slice": verdict.next_slice,
        "precision": as_dict(verdict.precision) if verdict.precision else None,
        "truth": as_dict(verdict.truth) if verdict.truth else None,
        "truth_points": [as_dict(point) for point in verdict.truth_points],
    }
    return {key: plain(value) for key, value in fields.items()}


def plain(value: Any) -> Any:
    """The same value with only what JSON has: tuples become lists, non-finite numbers become words."""
    if isinstance(value, float) and not isfinite(value):
        return "NaN" if isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def _difference(difference: Difference | None, *, values: bool = True) -> dict[str, Any] | None:
    if difference is None:
        return None
    fields = as_dict(difference)
    if not values:
        del fields["ours"], fields["ref"]
    return fields


def _missing(lacks: Missing) -> dict[str, Any]:
    return {"points": list(lacks.points), "positions": list(lacks.positions), "records": lacks.records}
