"""A norm divides by what is left of a row: in a lower arithmetic single rows may be far over a limit that is one for all models."""

from collections.abc import Callable

import numpy as np
import pytest
from msgspec.structs import replace
from test_lower_records import with_rows

from checkpoints.points import of_scores
from checkpoints.record import Dump
from parity.diff.compare import Options, compare


def as_in_f16(values: np.ndarray) -> np.ndarray:
    """Every row off by a factor of its own, an NMSE of some 1e-8: a norm whose sum was rounded."""
    return values * (1 + np.random.default_rng(2).standard_normal((len(values), 1), dtype=np.float32) * np.float32(1e-4))


def smaller(size: float) -> Callable[[np.ndarray], np.ndarray]:
    """A row of position 2 that is smaller, by this NMSE: its norm divided by too much."""

    def change(values: np.ndarray) -> np.ndarray:
        values[2] *= 1 - np.sqrt(size)
        return values

    return change


@pytest.mark.parametrize(
    ("first", "size", "left_open"), [("attn_norm", 1e-4, True), ("attn_norm", 0.1, False), ("attn_out", 1e-4, False)]
)
def test_a_norm_may_amplify_noise_at_single_positions(right: Dump, ref: Dump, first: str, size: float, left_open: bool) -> None:
    """In a stated F16 a norm divides by what is left of a row that all but cancels: one row that is ten times over a limit that is one for
    all models is left open for it. A larger error is not, nor is one at a product, which amplifies nothing.
    """
    plain = [name for name in right.points if name != "embd" and not of_scores(name) and "_read" not in name]
    ours = replace(right, points={name: right.points[name] for name in ("embd", *plain)})
    for name in plain:
        ours = with_rows(ours, name, as_in_f16, "f16")
    for name in plain[plain.index(f"blk.1.{first}") :]:
        ours = with_rows(ours, name, smaller(size), "f16")
    bare = {
        name: replace(rows, values=rows.values[:, :16], counts=np.minimum(rows.counts, 16), sketch=None, stats={})
        for name, rows in ours.points.items()
    }
    verdict = compare(replace(ours, points=bare), ref, Options(compute="f16"))
    assert verdict.first_divergence is not None
    assert verdict.first_divergence.checkpoint == f"blk.1.{first}"
    assert verdict.pattern is not None
    assert ("a recurrence or a norm may amplify it" in verdict.pattern.sentence) == left_open
