"""What a lower arithmetic costs on this model and prompt: our right engine, rounded, is the measure of `parity diff`."""

from dataclasses import replace
from pathlib import Path

from checkpoints.answers.diff import Limits
from checkpoints.errors import InputError
from checkpoints.points import LOGITS
from checkpoints.record import Dump

from ..diff.limits import limits
from .case import Case, ExplainOptions
from .precision import UPPER, floor


def measured_limits(ours: Dump, ref: Dump, model: Path, compute: str | None = None) -> Limits | None:
    """Limits by point for a side that computes in f16, bf16 or tf32; None where it computes in f32 and there is nothing to measure.

    The floor is the mean NMSE of our engine with every factor and every activation rounded to that type, against itself in
    float32, at the reference's recorded elements. The limit is `UPPER` times that, and never below what the files' own types allow.

    Args:
        compute: arithmetic of our side, where its header does not say it.

    Raises:
        InputError: the arithmetic is not known, or the reference is of another model.
        DumpError: the reference does not say its tokens, or has no record that our engine has.
        ModelError: an architecture that our engine does not have, or an unusable file.
    """
    kind = (compute or (ours.header.compute if ours.header is not None else "")).lower()
    if not kind:
        raise InputError(
            "--model measures what the arithmetic of OURS costs, and OURS does not say what it computes in.",
            "Say it: --compute f16, bf16 or tf32.",
            code="compute",
        )
    if kind not in ("f16", "bf16", "tf32"):
        return None
    case = Case(ref, model, ExplainOptions())  # its tokens and positions are known; those of bare lines are not
    found = floor(kind, case.entries, case.transformer.steps, case.replay, case.make, case.positions)
    header = replace(ours.header, compute="f32") if ours.header is not None else None
    types = limits(header, ref.header, compute="f32")
    least = {True: types.logits, False: types.operations}
    points = {
        entry.point: max(UPPER * float(cost), least[entry.point == LOGITS])
        for entry, cost in zip(case.entries, found.cost(), strict=True)
    }
    others = [limit for name, limit in points.items() if name != LOGITS]
    return Limits(
        max(others, default=types.operations),
        points.get(LOGITS, types.logits),
        f"measured: {UPPER:g} times what {kind} arithmetic costs our engine on this model and prompt, by point",
        points=points,
    )
