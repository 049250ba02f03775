"""The Python interface: a few stable names, whose answers are those of the commands."""

import subprocess
import sys
from pathlib import Path

import pytest
from cli import Cli

import parity as interface


def test_the_exported_names() -> None:
    """These and no others are promised; each is there and says what it is."""
    assert sorted(interface.__all__) == ["Dump", "ParityError", "Verdict", "compare", "read", "table", "version"]
    assert dir(interface) == sorted(interface.__all__)
    assert all(getattr(interface, name).__doc__ for name in interface.__all__)
    with pytest.raises(AttributeError, match="nothing_like_it"):
        getattr(interface, "nothing_like_it")  # noqa: B009 - of the module, at run time


def test_it_says_what_diff_says(stories_run: Path, parity: Cli) -> None:
    """Verdict, records and the table's rows are those of `parity diff`, by path or by dump."""
    ours, ref = stories_run / "ours.jsonl", stories_run / "ref.jsonl"
    _, answer = parity.json("diff", ours, ref)
    verdict = interface.compare(ours, interface.read(ref))
    assert verdict
    assert (verdict.verdict, verdict.compared) == (answer["verdict"], answer["compared"])
    frame = interface.table(ours, ref)
    assert len(frame) == answer["compared"]
    assert set(frame["checkpoint"]) == {point["checkpoint"] for point in answer["points"]}
    assert not interface.compare(ours, ref, tolerance=1e-20)
    with pytest.raises(TypeError, match="tollerance"):
        interface.table(ours, ref, tollerance=1.0)  # type: ignore[call-arg]
    with pytest.raises(interface.ParityError, match="cannot read"):
        interface.read("no-such-file.jsonl")


def test_commands_do_not_pay_for_it() -> None:
    """`import parity` alone brings neither NumPy nor pandas."""
    code = "import sys, parity; print(sorted({'numpy', 'pandas', 'checkpoints.formats'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
