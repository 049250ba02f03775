"""`parity emit pytest`: the fixture in a user's own pytest, on a right engine, a wrong one and wrong input."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from planted import Planted

from engine.opened import open_engine
from engine.weights.gguf_model import GgufModel
from parity.emit import source
from parity.models import embedded
from parity.run.ours import OursJob, dump

IDS = (1, 403, 407)
TEST = """
from parity_pytest import parity_golden

def test_engine(parity_golden):
    parity_golden("ours.jsonl", "golden.jsonl", model={model!r}, compute="f32")
"""


def pytest_of_theirs(folder: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    """A user's own pytest, run in that folder."""
    (folder / "parity_pytest.py").write_text(source("pytest"))
    (folder / "test_theirs.py").write_text(TEST.format(model=str(embedded.path())))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(folder), str(folder)]
    set_here = {"PARITY": f"{sys.executable} -P -m parity", "COLUMNS": "120", **environment}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ | set_here, check=False)


@pytest.mark.slow
def test_the_assertion_shows_first_divergence_and_cause(tmp_path: Path) -> None:
    """Right: passes. Wrong RoPE pairs: the place first, and the fault's name; halfway: how far it goes; no golden dump: an error."""
    engine = open_engine(GgufModel(embedded.path()), "numpy")
    for name in ("golden", "ours"):
        dump(engine, OursJob(tmp_path / f"{name}.jsonl", IDS, points="all"))
    assert pytest_of_theirs(tmp_path).returncode == 0
    wrong = tmp_path / "ours.jsonl"
    engine.steps = Planted((("rope-pairs", {}, None),)).steps(engine.steps)
    dump(engine, OursJob(wrong, IDS, points="all"))
    failed = pytest_of_theirs(tmp_path)
    assert failed.returncode == 1
    assert "AssertionError: divergence at blk.0.q_rope, position 1" in failed.stdout
    assert "rope-pairs" in failed.stdout
    assert "_parity(" not in failed.stdout  # the fixture's own frames are hidden
    dump(open_engine(GgufModel(embedded.path()), "numpy"), OursJob(wrong, IDS, points="embd,blk.0.l_out"))
    halfway = pytest_of_theirs(tmp_path)
    assert halfway.returncode == 1
    assert "parity as far as it goes (nothing after blk.0.l_out)" in halfway.stdout
    (tmp_path / "golden.jsonl").unlink()
    missing = pytest_of_theirs(tmp_path)
    assert missing.returncode == 1
    assert "golden.jsonl" in missing.stdout
    assert "Traceback" not in missing.stdout


@pytest.mark.slow
def test_a_missing_parity_fails_and_says_so(tmp_path: Path) -> None:
    """Without parity on the path the test fails and says so."""
    for name in ("golden", "ours"):
        (tmp_path / f"{name}.jsonl").write_text("{}")
    failed = pytest_of_theirs(tmp_path, PARITY="", PATH="")
    assert failed.returncode == 1
    assert "parity is not on the path" in failed.stdout
