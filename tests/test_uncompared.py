"""What was asked for and never compared: agreement of the rest says so in its first words, and an engine that stops halfway fails."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from cli import Cli
from dumps import DEFAULT, dump, noisy, random
from msgspec.structs import replace

from checkpoints.answers.diff import INCOMPLETE, PARITY
from parity.commands.options import Format
from parity.commands.three_way_output import finish_three
from parity.diff.compare import Options, compare, comparison
from parity.diff.three_way import compare_three
from parity.run.session import Outcome
from reports.github import annotations
from reports.junit import junit
from reports.sentences import answer, headline

TOKENS = "5,99,7,300"
# An engine that prints, of a dump that was right, the lines that its last argument leaves.
ENGINE = """
import json, sys
right, out, points, which = sys.argv[1:]
with open(right) as file, open(out, "w") as written:
    for line in file:
        record = json.loads(line)
        name = record.get("checkpoint")
        if name is not None and points and name not in points.split(","):
            continue
        if name is not None and not eval(which, {"name": name, "t": record["token_idx"]}):
            continue
        written.write(line)
"""


@pytest.fixture(scope="module")
def model(synthetic: Callable[..., Path]) -> Path:
    """Four small layers."""
    return synthetic(layers=4)


@pytest.fixture
def engine(parity: Cli, model: Path, tmp_path: Path) -> Callable[..., str]:
    """A command line of an engine that prints what a condition on `name` and `t` leaves of a right dump."""
    right, path = tmp_path / "right.jsonl", tmp_path / "somebodys.py"
    assert parity("dump", "ours", "--model", model, "--tokens", TOKENS, "--points", "all", "-o", right).code == 0
    path.write_text(ENGINE)
    return lambda which, points="{points}": f"{sys.executable} {path} {right} {{out}} '{points}' '{which}'"


def test_dumps_say_how_far_they_go() -> None:
    """Ours ends in layer 5, or at position 2: every format says so in its first words; a point that lacks before others is counted."""
    arrays = random()
    ref, ours = dump(arrays), noisy(arrays)
    assert ref.header is not None
    for kept, words in (
        ({name: ours[name] for name in DEFAULT[:3]}, "nothing after blk.5.l_out"),
        ({name: rows[:3] for name, rows in ours.items()}, "nothing at positions 3–11"),
    ):
        verdict = compare(replace(dump(kept), header=ref.header), ref)
        assert verdict.verdict == PARITY
        assert answer(verdict).startswith(f"parity as far as it goes ({words}): ")
        assert headline(verdict) == f"parity as far as it goes ({words})"
        (line,) = annotations(verdict)
        assert line.startswith(f"::warning title=parity::parity as far as it goes ({words})")
        suite = ET.fromstring(junit(verdict))[0]
        skipped = [case.get("name") for case in suite if case.find("skipped") is not None]
        assert skipped == [name for name in DEFAULT if name not in kept]
        assert suite.get("skipped") == str(len(skipped))
    without = compare(dump({name: ours[name] for name in DEFAULT if name != "blk.5.l_out"}), ref)
    assert answer(without).startswith("parity: 72 of 72 records agree, 1 of 7 known points never compared, exact mode")
    assert answer(compare(dump(ours), ref)).startswith("parity: 84 of 84 records agree, exact mode")


def test_a_lower_arithmetic_and_a_divergence_say_it_too() -> None:
    """What was never compared is said where the arithmetic is assumed, and beside a divergence."""
    arrays = random()
    rounded = {name: rows.astype(np.float16).astype(np.float32) for name, rows in arrays.items() if name != "logits"}
    verdict = compare(dump(rounded, header=None), dump(arrays), Options(placed=True))
    assert answer(verdict).startswith("parity as far as it goes (nothing after output_norm) as F16 arithmetic (assumed")
    verdict = compare(dump({name: rows + 1 for name, rows in rounded.items()}), dump(arrays))
    assert not verdict
    assert verdict.uncompared.after == "output_norm"


def test_an_engine_that_stops_halfway_is_incomplete(parity: Cli, model: Path, engine: Callable[..., str]) -> None:
    """It was asked for the logits by name and exits 0 without them: exit 1, and the missing points and the last one are named."""
    words = ("run", "--model", model, "--tokens", TOKENS, "--exec")
    code, found = parity.json(*words, engine('name in ("embd", "blk.0.l_out")'))
    assert (code, found["verdict"]) == (1, "incomplete")
    assert found["uncompared"] == {
        "requested": 5,
        "points": ["blk.3.l_out", "output_norm", "logits"],
        "positions": [],
        "after": "blk.0.l_out",
    }
    ran = parity(*words, engine('name in ("embd", "blk.0.l_out")'))
    assert ran.code == 1
    assert "incomplete (nothing after blk.0.l_out): all " in " ".join(ran.out.split())


@pytest.mark.slow
def test_positions_that_never_came(parity: Cli, model: Path, engine: Callable[..., str]) -> None:
    """An engine that drops the prompt's last token is incomplete; one that prints logits for the last position only is not."""
    words = ("run", "--model", model, "--tokens", TOKENS, "--exec")
    code, found = parity.json(*words, engine("t < 3"))
    assert (code, found["verdict"], found["uncompared"]["positions"]) == (1, "incomplete", [3])
    for which, more in (('t == 3 or name != "logits"', ()), ("t == 3", ("--positions", "last"))):
        code, found = parity.json(*words, engine(which), *more)
        assert (code, found["verdict"], found["uncompared"]["positions"]) == (0, "parity", [])


@pytest.mark.slow
def test_who_was_not_requested_by_name_is_told_only(parity: Cli, model: Path, engine: Callable[..., str]) -> None:
    """Without {points}, an engine that prints two layers passes as far as it goes; --strict, and --points that name the logits, fail it."""
    line = engine('"l_out" in name', points="")
    words = ("run", "--model", model, "--tokens", TOKENS, "--exec", line)
    ran = parity(*words)
    assert ran.code == 0
    assert "parity as far as it goes (nothing after blk.3.l_out): " in " ".join(ran.out.split())
    assert parity.json(*words, "--strict")[1]["verdict"] == "incomplete"
    assert parity.json(*words, "--points", "default")[0] == 0
    assert parity.json(*words, "--points", "blk.3.l_out,logits")[1]["verdict"] == "incomplete"


@pytest.mark.slow
def test_a_hunt_does_not_end_in_agreement_of_a_part(parity: Cli, model: Path, engine: Callable[..., str]) -> None:
    """--hunt counts what was compared, not what was printed, and explains nothing where nothing differs."""
    code, found = parity.json(
        "run", "--model", model, "--tokens", TOKENS, "--hunt", "--exec", engine('name in ("embd", "blk.0.l_out")')
    )
    assert (code, found["verdict"], found["explanation"]) == (1, "incomplete", None)
    assert found["uncompared"]["after"] == "blk.0.l_out"


def test_a_name_that_llama_cpp_lacks_refuses_nothing(
    parity: Cli, model: Path, engine: Callable[..., str], tmp_path: Path
) -> None:
    """A node of the engine's own beside known points is listed as what the reference lacks; the rest is compared."""
    line = engine("True")
    (tmp_path / "somebodys.py").write_text(
        ENGINE.replace("written.write(line)", 'written.write(line.replace("blk.0.l_out", "blk.0.mine"))')
    )
    code, found = parity.json("run", "--model", model, "--tokens", TOKENS, "--exec", line)
    assert code == 0
    assert found["missing"]["ref"]["points"] == ["blk.0.mine"]
    assert found["uncompared"]["points"] == ["blk.0.l_out"]


@pytest.mark.slow
def test_an_engine_that_agrees_with_itself_says_how_far(parity: Cli, model: Path, engine: Callable[..., str]) -> None:
    """`consistency` of an engine that prints two points in every way: consistent, as far as it goes."""
    line = engine('name in ("embd", "blk.0.l_out")')
    ran = parity("consistency", "--model", model, "--tokens", TOKENS, "--exec", line)
    assert ran.code == 0
    assert "consistent as far as it goes (nothing after blk.0.l_out): " in " ".join(ran.out.split())


@pytest.mark.slow
def test_golden_dumps_of_a_part_are_recorded_with_a_note(
    parity: Cli, model: Path, engine: Callable[..., str], tmp_path: Path
) -> None:
    """`drift record` of an engine that prints two of its points says how far it went: a later check compares no more than that."""
    (tmp_path / "prompts.txt").write_text("ab\n")
    words = ("drift", "record", "--model", model, "--prompts", tmp_path / "prompts.txt", "--exec")
    ran = parity(*words, engine('name in ("embd", "blk.0.l_out")'), "-o", tmp_path / "part")
    assert ran.code == 0
    assert "note: 000.jsonl is recorded as far as the engine went (nothing after blk.0.l_out" in ran.err
    _, checked = parity.json("drift", "check", tmp_path / "part", "--model", model, "--side", "ours")
    assert any(
        "000.jsonl was recorded as far as the engine went (nothing after blk.0.l_out" in note for note in checked["notes"]
    )
    ran = parity(*words, engine("True"), "-o", tmp_path / "whole")
    assert (ran.code, "as far as the engine went" in ran.err) == (0, False)


@pytest.mark.slow
def test_an_engine_that_was_mended_since_is_no_drift(
    parity: Cli, model: Path, engine: Callable[..., str], tmp_path: Path
) -> None:
    """Golden dumps of an engine that stopped after two positions: going on is no drift, stopping earlier is."""
    (tmp_path / "prompts.txt").write_text("abcd\n")
    words = ("--model", model, "--exec")
    line = engine("t < 2")
    assert parity("drift", "record", *words, line, "--prompts", tmp_path / "prompts.txt", "-o", tmp_path / "part").code == 0
    check = ("drift", "check", tmp_path / "part", "--no-ledger", *words)
    assert parity.json(*check, line)[0] == 0
    code, checked = parity.json(*check, engine("True"))
    assert (code, checked["verdict"], "the rest is not checked" in str(checked["notes"])) == (0, "parity", True)
    assert parity.json(*check, engine("t < 1"))[0] == 1


def test_a_third_side_that_agrees_makes_nothing_complete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a third side, too, an engine that stops halfway is incomplete: exit 1, in text and in JSON."""
    arrays = random()
    left, right = dump({"embd": arrays["embd"]}), dump(arrays)
    compared = comparison(left, right)
    verdict = replace(compared.verdict, verdict=INCOMPLETE)
    outcome = Outcome(tmp_path, left, right, verdict, compared.picture, 1.0)
    three_way = compare_three((left, right, right))
    assert three_way
    assert finish_three(outcome, right, three_way, Format.TEXT) == 1
    printed = capsys.readouterr().out
    assert "incomplete (nothing after embd): all 12 records that came agree" in printed
    assert "parity:" not in printed
    assert finish_three(outcome, right, three_way, Format.JSON) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["verdict"], found["uncompared"]["after"]) == ("incomplete", "embd")
