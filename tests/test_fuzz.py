"""A sample of `benchmarks/fuzz.py`: spoiled dumps of every format end in a verdict or in one line."""

from pathlib import Path

import pytest
from mutants import KINDS, cases

ANSWERS = {"parity", "divergence", "unusable", "refused"}


@pytest.mark.parametrize("kind", KINDS)
def test_spoiled_dumps_are_judged_or_refused_in_one_line(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes flipped, cut, put in, lines moved, numbers blown up, formats mixed: no traceback, no warning, and not one answer only."""
    monkeypatch.chdir(tmp_path)
    answers = [answer() for _, answer in cases(kind, range(25), tmp_path)]
    assert set(answers) <= ANSWERS
    assert len(set(answers)) > 1


@pytest.mark.parametrize(
    ("kind", "seed"), [("binary", 847), ("their weights", 44)], ids=["rows of no values", "signalling NaN"]
)
def test_what_once_escaped_is_judged_or_refused(kind: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Damages that ended in an internal error or a warning when each kind was first damaged ten thousand times."""
    monkeypatch.chdir(tmp_path)
    (answered,) = [answer() for _, answer in cases(kind, range(seed, seed + 1), tmp_path)]
    assert answered in ANSWERS
