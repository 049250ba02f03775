"""A pytest fixture that compares an engine's dump with golden numbers: `parity emit pytest > tests/parity_pytest.py`.

    from parity_pytest import parity_golden  # noqa: F401  (in conftest.py, or in the test file)

    def test_prefill(parity_golden, tmp_path):
        run_my_engine(tokens=[1, 403, 407], dump=tmp_path / "ours.jsonl")
        parity_golden(tmp_path / "ours.jsonl", "tests/golden/000.jsonl", model="model.gguf")

The golden dump is llama.cpp's (`parity dump ref --tokens 1,403,407 --model model.gguf -o tests/golden/000.jsonl`) or an earlier one of
your engine. If the two disagree, the assertion prints the first divergence, and with `model` the known fault that gives
these numbers. parity runs as a command, from an environment of its own: PARITY names it if it is not on the path.
"""

import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PARITY, DIVERGENCE, WRONG_INPUT = 0, 1, 2  # parity's exit codes
_WIDTH = "100"  # columns of what is printed
_NOT_ALL = "parity as far as it goes"  # parts of the golden dump were not compared with anything


def _parity(*arguments: object, timeout: float) -> "subprocess.CompletedProcess[str]":
    """Run parity; its exit code, what it printed, and its error."""
    given = os.environ.get("PARITY")
    command = shlex.split(given) if given else [shutil.which("parity") or ""]
    if not command[0]:
        pytest.fail("parity is not on the path: install it with pipx or uv tool, or name it in PARITY.", pytrace=False)
    environment = {**os.environ, "COLUMNS": _WIDTH, "NO_COLOR": "1"}
    words = [*command, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=timeout, check=False)


def _cause(dump: Path, model: Path, options: list[str], timeout: float) -> str:
    """What `parity explain` says about the dump, "" if it fails or says nothing."""
    done = _parity("explain", dump, "--model", model, *options, timeout=timeout)
    return done.stdout.strip() if done.returncode in (PARITY, DIVERGENCE) else done.stderr.strip()


@pytest.fixture
def parity_golden() -> Callable[..., None]:
    """`parity_golden(dump, golden, model=None, compute=None, tolerance=None, options=(), timeout=600)`: fails if they disagree.

    It fails, too, if the golden dump has points or positions that `dump` lacks. Both are files that `parity diff` reads. With `model`
    (a GGUF file) the cause is looked for; `compute` is your engine's arithmetic if its dump does not state it ("f32", "f16", "bf16"),
    `tolerance` one NMSE limit for everything, `options` are further options of `parity diff`, `timeout` is in seconds for each of the
    two commands.
    """

    def check(
        dump: "str | os.PathLike[str]",
        golden: "str | os.PathLike[str]",
        *,
        model: "str | os.PathLike[str] | None" = None,
        compute: "str | None" = None,
        tolerance: "float | None" = None,
        options: Any = (),
        timeout: float = 600,
    ) -> None:
        __tracebackhide__ = True
        judged = ["--compute", compute] if compute else []
        limits = ["--tolerance", str(tolerance)] if tolerance is not None else []
        known = ["--model", str(model)] if model is not None else []
        done = _parity("diff", dump, golden, *judged, *limits, *known, *options, timeout=timeout)
        unseen = next((line for line in done.stdout.splitlines() if line.startswith(_NOT_ALL)), "")
        if unseen:
            pytest.fail(f"{unseen}\nThe golden dump has more: record it with the points of your engine.", pytrace=False)
        if done.returncode == PARITY:
            return
        if done.returncode != DIVERGENCE:
            pytest.fail(done.stderr.strip() or f"parity ended with exit code {done.returncode}.", pytrace=False)
        answer = done.stdout.strip()
        first = next((line for line in answer.splitlines() if line.startswith("divergence at ")), "divergence")
        cause = "" if model is None else _cause(Path(dump), Path(model), judged, timeout)
        raise AssertionError("\n".join(filter(None, (first, "", answer, "", cause))))

    return check
