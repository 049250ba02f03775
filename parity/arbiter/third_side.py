"""Float64 beside the two sides of a comparison: how far each of them is from it, point by point."""

from collections.abc import Sequence

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from checkpoints.answers.diff import Difference, Pattern, TruthPoint, TruthRecord, Verdict
from checkpoints.record import Rows

from ..diff.compare import Comparison
from ..diff.limits import EXACT
from ..diff.measured.align import Pair
from ..diff.tolerances.truth import AMPLIFIED, MULTIPLE, NO_COARSE_ROUNDING, ROUNDING
from .arbiter import Arbiter
from .encoder_decoder import EncoderDecoderArbiter

Floats = NDArray[np.float64]
AnyArbiter = Arbiter | EncoderDecoderArbiter


def with_truth(comparison: Comparison, arbiter: AnyArbiter, *, everywhere: bool) -> Comparison:
    """The comparison with the verdict of float64 added.

    Args:
        everywhere: at every compared point; otherwise up to the first divergence, and everywhere if float64 was already computed.
    """
    pairs = _pairs_for(comparison, arbiter, everywhere=everywhere)
    if not pairs:
        return comparison
    ours, ref = (arbiter.distances({pair.point: getattr(pair, side) for pair in pairs}) for side in ("ours", "ref"))
    points = tuple(_point(pair.point, ours[pair.point], ref[pair.point]) for pair in pairs if pair.point in ours)
    shown = comparison.verdict.first_divergence or comparison.verdict.worst
    pair = next((pair for pair in pairs if shown is not None and pair.point == shown.checkpoint and pair.point in ours), None)
    record = None if pair is None or shown is None else _record(pair, shown, arbiter, ours[pair.point], ref[pair.point])
    verdict = replace(comparison.verdict, truth_points=points, truth=None if record is None else record[0])
    if record is not None and verdict.first_divergence is not None and comparison.records.mode == EXACT:
        verdict = _blaming_the_reference(verdict, record[0], coarse=record[0].checkpoint in arbiter.coarse)
    return replace(comparison, verdict=verdict, truth=None if record is None else record[1])


def _blaming_the_reference(verdict: Verdict, record: TruthRecord, *, coarse: bool) -> Verdict:
    """The verdict of a divergence, which blames no operation of ours where the reference alone is further from float64 than rounding is."""
    most = NO_COARSE_ROUNDING if coarse else AMPLIFIED
    if record.alone != "reference" or record.ours is None or record.ref is None or record.ours > ROUNDING or record.ref <= most:
        return verdict
    sentence = (
        f"{record.checkpoint}: the reference does not compute what this model file gives, and ours does: another file or version of it, or "
        "a fault of the reference"
    )
    return replace(verdict, pattern=Pattern("reference-wrong", sentence), operation="")


def _pairs_for(comparison: Comparison, arbiter: AnyArbiter, *, everywhere: bool) -> Sequence[Pair]:
    pairs, first = comparison.records.pairs, comparison.verdict.first_divergence
    if everywhere or (first is None and arbiter.started):
        return pairs
    if first is None or first.checkpoint not in comparison.records.names:
        return ()
    return pairs[: comparison.records.names.index(first.checkpoint) + 1]


def _point(name: str, ours: Floats, ref: Floats) -> TruthPoint:
    far = [None if np.isnan(errors).all() else float(np.nanmax(errors)) for errors in (ours, ref)]
    return TruthPoint(name, far[0], far[1], _alone(far[0], far[1]))


def _record(pair: Pair, shown: Difference, arbiter: AnyArbiter, ours: Floats, ref: Floats) -> tuple[TruthRecord, Rows] | None:
    """What float64 says of one record, and the record's values in float64; None if unknown."""
    at = np.flatnonzero((pair.ref.seq == shown.seq) & (pair.ref.token_idx == shown.token_idx))
    if not len(at) or np.isnan(ours[at[0]]) or np.isnan(ref[at[0]]):
        return None
    truth = arbiter.record(pair.ref.take(at[:1]))
    values = tuple(truth.values[0, : len(shown.ref)].tolist())
    far = float(ours[at[0]]), float(ref[at[0]])
    return TruthRecord(pair.point, *far, _alone(*far), shown.token_idx, values), truth


def _alone(ours: float | None, ref: float | None) -> str:
    """The side that is further from the truth than rounding explains, if the other one is not."""
    if ours is None or ref is None or ours == ref:
        return ""
    if ours > MULTIPLE * ref:
        return "ours"
    return "reference" if ref > MULTIPLE * ours else ""
