"""What a ledger's numbers mean: which errors within their limits are worth a sentence, and how many are named."""

from datetime import UTC, datetime

import pytest

from checkpoints.answers.drift import Closer, Entry, Margin
from parity.drift.checking import listed_points
from parity.drift.ledger import closer, findings
from reports.history import closer_sentences


@pytest.mark.parametrize(
    ("before", "now", "sentence"),
    [
        (0.008, 0.079, None),
        (0.008, 0.081, "logits: the error is 0.081 of its limit, 0.008 at its best"),
        (0.0, 0.029, None),  # noise that machines differ by: 0.003 of the limit
        (0.0, 0.031, "logits: the error is 0.031 of its limit, none at its best"),
        (0.09, 0.099, None),
        (0.09, 0.11, "logits: the error is near its limit, 0.11 of it"),
        (None, 0.11, "logits: the error is near its limit, 0.11 of it"),
        (0.01, 1.1, None),  # beyond the limit it is drift, not a finding
    ],
)
def test_an_error_that_grows_tenfold_or_comes_within_a_tenth(before: float | None, now: float, sentence: str | None) -> None:
    """Tenfold growth is measured from the best check, or from the noise of machines where that is more."""
    assert findings([Margin("logits", now * 1e-9, 1e-9, now, before=before)]) == ([sentence] if sentence else [])


@pytest.mark.parametrize(
    ("before", "now", "moved"), [(0.0, 1.005e-6, False), (0.0, 1.1e-6, True), (0.5, 0.504, False), (0.5, 0.51, True)]
)
def test_what_came_closer_since_a_day(before: float, now: float, moved: bool) -> None:
    """An error is closer if it grew by a hundredth, and by as much of a millionth of its limit where there was none."""
    checks = [
        Entry(f"2026-11-{day:02}T00:00:00+00:00", "", "parity", "ours", "g", points={"logits": (0.0, 1e-9, share)})
        for day, share in ((1, before), (2, now))
    ]
    assert bool(closer(checks, datetime(2026, 11, 1, 12, tzinfo=UTC))) is moved


def test_eight_that_came_closer_are_named() -> None:
    """The ninth is counted; a proportion beyond the limit is a multiple of it, and each side has its name if there are several."""
    points = [Closer(f"blk.{layer}.l_out", 0.001, 0.002, "2026-11-01T00:00") for layer in range(9)]
    sentences = closer_sentences([("our engine", points)])
    assert (len(sentences), sentences[0], sentences[-1]) == (
        9,
        "blk.0.l_out: 0.20 % of its limit, 0.10 % on 2026-11-01",
        "and 1 more (--format json lists them)",
    )
    beyond = [Closer("logits", 0.001, 4.2, "2026-11-01T00:00")]
    assert closer_sentences([("our engine", beyond), ("llama.cpp", beyond)])[1] == (
        "logits of llama.cpp: 4.2 × its limit, 0.10 % on 2026-11-01"
    )


def test_three_points_that_are_not_compared_are_named() -> None:
    """A fourth one is counted, in the singular."""
    names = [f"blk.{layer}.l_out" for layer in range(5)]
    assert listed_points(names[:3]) == "blk.0.l_out, blk.1.l_out, blk.2.l_out"
    assert listed_points(names[:4]) == "blk.0.l_out, blk.1.l_out, blk.2.l_out and 1 more point"
    assert listed_points(names).endswith("and 2 more points")
