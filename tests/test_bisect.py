"""`git bisect run parity drift check … --bisect` on a real repository."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli import Cli

from parity.__main__ import for_bisect

COMMITS, BAD, BROKEN = 20, 12, 10  # the fault comes with commit 12; commit 10, where the search begins, does not even start

ENGINE = '''"""An engine of its own: prints the dump of a prompt."""
import sys
from pathlib import Path
from engine.backend import choose
from engine.faults import CATALOGUE, plant
from engine.weights.gguf_model import GgufModel
from engine.transformer import Transformer
from parity.run.ours import OursJob, dump
FAULT = {fault!r}
model, tokens, out = sys.argv[1:]
engine = Transformer(GgufModel(Path(model)), choose("numpy"))
if FAULT:
    engine.steps = plant(engine.steps, CATALOGUE[FAULT])
dump(engine, OursJob(Path(out), tuple(map(int, tokens.split(",")))))
# commit {number}
'''


def git(repository: Path, *arguments: str) -> str:
    """What git prints."""
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    identity = ("-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    command = ["git", *identity, *arguments]
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_bisect_finds_the_commit(tmp_path: Path, parity: Cli) -> None:
    """A fault planted in the middle of twenty commits is found, past a commit in which the engine doesn't start."""
    repository, golden = tmp_path / "repository", tmp_path / "golden"
    repository.mkdir()
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Once upon a time\n", encoding="utf-8")
    assert parity("drift", "record", "--prompts", prompts, "-o", golden, "--generate", 0).code == 0
    git(repository, "init", "-q", "-b", "main")
    commits = []
    for number in range(COMMITS):
        fault = "rope-pairs" if number >= BAD else ""
        source = ENGINE.format(fault=fault, number=number) + ("def broken(:\n" if number == BROKEN else "")
        (repository / "my_engine.py").write_text(source, encoding="utf-8")
        git(repository, "add", "-A")
        git(repository, "commit", "-q", "-m", f"commit {number}")
        commits.append(git(repository, "rev-parse", "HEAD").strip())
    git(repository, "bisect", "start", commits[-1], commits[0])
    engine = f"{sys.executable} my_engine.py {{model}} {{tokens}} {{out}}"
    check = [sys.executable, "-P", "-m", "parity", "drift", "check", str(golden), "--exec", engine, "--bisect", "--no-ledger"]
    printed = git(repository, "bisect", "run", *check)
    assert f"{commits[BAD]} is the first bad commit" in printed
    log = git(repository, "bisect", "log")
    assert f"git bisect skip {commits[BROKEN]}" in log or commits[BROKEN] not in log


@pytest.mark.parametrize(("code", "mapped"), [(0, 0), (1, 1), (2, 125), (3, 125), (130, 130)])
def test_git_never_takes_an_error_for_bad(code: int, mapped: int) -> None:
    """Only a divergence is "bad"; an interruption (over 127) still ends the search."""
    assert for_bisect(["drift", "check", "golden", "--bisect"], code) == mapped
    assert for_bisect(["drift", "check", "golden"], code) == code
    assert for_bisect(["run", "--exec", "engine", "--bisect"], code) == code


def test_a_missing_folder_is_untestable(tmp_path: Path) -> None:
    """The program itself exits 125 where there is nothing to test, and 125 for an option that it doesn't know."""
    for arguments in ([str(tmp_path / "none")], [str(tmp_path), "--no-such-option"]):
        command = [sys.executable, "-P", "-m", "parity", "drift", "check", *arguments, "--bisect"]
        assert subprocess.run(command, capture_output=True, check=False).returncode == 125
