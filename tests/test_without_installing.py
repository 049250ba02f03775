"""From a source tree that was never installed, parity works as it does when it is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import parity
from parity import requirements, version

ROOT = Path(__file__).parent.parent


@pytest.fixture
def source_tree(tmp_path: Path) -> Path:
    """The packages and pyproject.toml in a folder that no metadata know of."""
    for name in ("parity", "engine", "reference", "checkpoints", "reports"):
        (tmp_path / name).symlink_to(Path(parity.__file__).parent.parent / name)
    (tmp_path / "pyproject.toml").symlink_to(ROOT / "pyproject.toml")
    return tmp_path


def run(source_tree: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`python -m parity …` by PYTHONPATH, with every package that is installed but parity itself."""
    packages = source_tree / "packages"
    packages.mkdir(exist_ok=True)
    for folder in (Path(place) for place in sys.path if place.endswith("-packages")):
        for package in folder.iterdir():
            link = packages / package.name
            if not package.name.startswith(("parity", "__editable__", "__pycache__")) and not link.exists():
                link.symlink_to(package)
    # Without `site`, nothing else that is installed is on the path.
    environment = {**os.environ, "PYTHONPATH": f"{source_tree}:{packages}"}
    command = [sys.executable, "-S", "-P", "-m", "parity", *words]
    return subprocess.run(command, cwd=source_tree, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_source_tree_runs_without_metadata(source_tree: Path) -> None:
    """By PYTHONPATH alone `--version`, `dump ours` and `doctor` work; the version says that nothing was installed."""
    outcome = run(source_tree, "--version")
    assert (outcome.returncode, outcome.stdout) == (0, f"parity {version()} (not installed)\n")
    outcome = run(source_tree, "dump", "ours", "--tokens", "1,2,3", "-o", "ours.jsonl")
    assert outcome.returncode == 0, outcome.stderr
    assert "(not installed)" in (source_tree / "ours.jsonl").read_text(encoding="utf-8").partition("\n")[0]
    outcome = run(source_tree, "doctor")
    assert outcome.returncode == 0, outcome.stderr
    assert all(name in outcome.stdout for name in requirements())


def test_the_requirements_are_those_of_the_project() -> None:
    """What doctor looks for is what pyproject lists, without its extras."""
    assert {"numpy", "llama-cpp-python", "jinja2", "pysimdjson"} <= set(requirements())
    assert not {"pytest", "cupy-cuda12x"} & set(requirements())
