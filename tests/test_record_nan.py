"""NaN in a record: the record's where nothing was computed with it, else the operation's."""

import numpy as np
import pytest
from msgspec.structs import replace
from recorded import F32, changed, kinds, only

from checkpoints.record import Dump
from parity.diff.compare import compare
from reports.sentences import answer


def with_nan(dump: Dump, name: str, place: int, *, bare: bool = False) -> Dump:
    """A dump with NaN in one value of one record."""
    points = {
        point: replace(rows, sketch=None, stats={}, shapes=((),) * len(rows)) if bare else rows
        for point, rows in dump.points.items()
    }
    values = points[name].values.copy()
    values[3, place] = np.nan
    return replace(dump, points={**points, name: replace(points[name], values=values)})


@pytest.mark.parametrize("name", ["ffn_out", "l_out", "q", "attn_norm", "ffn_gate"])
def test_nan_that_nothing_was_computed_with_is_the_records(right: Dump, ref: Dump, name: str) -> None:
    """NaN in a record, and finite sums, rotations, products and activations made from it, all right: the record holds other memory."""
    ours = with_nan(changed(right, lambda x: x, kinds()), f"blk.3.{name}", 5)
    verdict = compare(ours, ref, F32)
    assert verdict
    (fault,) = verdict.record_faults
    assert (fault.checkpoint, fault.kind, fault.positions) == (f"blk.3.{name}", "nonfinite", (3,))
    assert answer(verdict)
    assert not compare(ours, ref, replace(F32, strict=True))


@pytest.mark.parametrize("name", ["blk.3.kq_soft_max", "blk.3.v", "blk.3.k_rope", "blk.3.q_rope"])
def test_nan_that_attention_did_not_have_is_the_records(right: Dump, ref: Dump, name: str) -> None:
    """A cache's rows, scores, weights and their mix at the same position would be NaN, too, and their whole rows are right."""
    verdict = compare(with_nan(right, name, 0), ref, F32)
    assert verdict
    assert [(fault.checkpoint, fault.kind) for fault in verdict.record_faults] == [(name, "nonfinite")]


def test_nan_whose_way_is_not_seen_stays_a_divergence(right: Dump, ref: Dump) -> None:
    """Nothing is made from logits, and of scores whose first values alone were recorded the others may be NaN."""
    verdict = compare(with_nan(right, "logits", 0), ref, F32)
    assert verdict.first_divergence is not None
    assert verdict.first_divergence.checkpoint == "logits"
    bare = changed(right, lambda x: x, kinds(), 16, bare=True)
    verdict = compare(with_nan(only(bare, "embd", "blk.3.v", "blk.3.kqv_out", "logits"), "blk.3.v", 0), ref, F32)
    assert verdict.first_divergence is not None
    assert verdict.first_divergence.checkpoint == "blk.3.v"


def test_nan_that_spreads_is_a_divergence(right: Dump, ref: Dump) -> None:
    """NaN in a product and in all that is made from it is the product's."""
    ours = changed(right, lambda x: x, kinds())
    spread = with_nan(ours, "blk.3.ffn_out", 0)
    for name in list(ours.points)[list(ours.points).index("blk.3.ffn_out") + 1 :]:
        spread = with_nan(spread, name, 0)
    verdict = compare(spread, ref, F32)
    assert verdict.first_divergence is not None
    assert verdict.first_divergence.checkpoint == "blk.3.ffn_out"
    assert not verdict.record_faults


def test_a_slice_must_show_where_nan_would_be(right: Dump, ref: Dump) -> None:
    """Four values of a sum say nothing of the fifth element of a summand."""
    ours = changed(right, lambda x: x, kinds())
    short = {
        point: replace(rows, values=rows.values[:, :4], counts=np.minimum(rows.counts, 4), sketch=None, stats={})
        for point, rows in ours.points.items()
        if point == "blk.3.l_out"
    }
    spoilt = with_nan(ours, "blk.3.ffn_out", 5)
    assert not compare(replace(spoilt, points={**spoilt.points, **short}), ref, F32)
    seen = with_nan(ours, "blk.3.ffn_out", 2)
    assert compare(replace(seen, points={**seen.points, **short}), ref, F32)
