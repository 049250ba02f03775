"""`parity lint` and the lint before a diff: what they refuse, print and exit with."""

import json
from pathlib import Path

import numpy as np
import pytest
from cli import Cli
from lint_faults import PROMPT, right_dump, swapped_buffers
from msgspec.structs import replace

from checkpoints.jsonl import Writer
from checkpoints.reading.reader import read
from checkpoints.record import Dump, End, Header, Rows
from engine.backend import choose
from engine.transformer import Transformer
from engine.weights.gguf_model import GgufModel
from parity.lint.lint import lint


@pytest.fixture(scope="module")
def right(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Dump:
    return right_dump(Transformer(GgufModel(stories), choose("numpy")), tmp_path_factory.mktemp("right") / "ours.jsonl")


def test_an_engine_that_counts_anew_in_each_pass_is_told_so(tmp_path: Path) -> None:
    """Decode steps that all say position 0 contradict each other: an error, with what to print."""
    path = tmp_path / "bare.jsonl"
    rng = np.random.default_rng(1)
    lines = [
        f'{{"checkpoint":"layer_5","token_idx":0,"values":{list(map(float, rng.normal(size=10).round(4)))}}}' for _ in range(4)
    ]
    path.write_text("\n".join(lines))
    report = lint(read(path))
    assert not report.usable
    assert [f.rule for f in report.findings] == ["doubled"]
    assert "token's position" in report.findings[0].advice


@pytest.mark.parametrize(("off", "rules"), [(3e-7, []), (1e-4, ["doubled"])])
def test_a_prompt_that_is_computed_again_for_each_token_is_no_contradiction(
    off: float, rules: list[str], tmp_path: Path
) -> None:
    """Bare lines of an engine without a cache differ from pass to pass by float32's rounding; what differs by more contradicts."""
    path, rng = tmp_path / "bare.jsonl", np.random.default_rng(1)
    row = rng.normal(size=(5, 10))
    lines = [
        json.dumps({"checkpoint": "layer_5", "token_idx": t, "values": list(row[t] * (1 + off * rng.normal(size=10)))})
        for length in (3, 4, 5)
        for t in range(length)
    ]
    path.write_text("\n".join(lines))
    assert [finding.rule for finding in lint(read(path)).findings if finding.rule == "doubled"] == rules


def test_an_end_that_counts_more_records_than_there_are(right: Dump, tmp_path: Path) -> None:
    """A dump whose end record counts other lines, and one torn in its last line, are cut short."""
    assert right.end is not None
    report = lint(replace(right, end=End(right.end.checkpoints + 4)))
    assert [f.rule for f in report.findings] == ["cut-short"]
    path = tmp_path / "torn.jsonl"
    with Writer(path, Header("engine", tokens=PROMPT)) as writer:
        rows: Rows = right.points["blk.5.l_out"]
        writer.rows(rows)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - 200])
    assert "last line is cut short" in lint(read(path)).findings[0].evidence


@pytest.mark.slow
def test_a_diff_refuses_a_dump_that_lint_calls_unusable(right: Dump, parity: Cli, tmp_path: Path) -> None:
    """A device pointer is exit 2, naming the side and the rule; --despite-lint compares all the same."""
    values = right.points["embd"].values.copy()
    values[0, 3] = 1e18
    pointer = replace(right, points={**right.points, "embd": replace(right.points["embd"], values=values)})
    for name, source in (("right", right), ("broken", pointer)):
        with Writer(tmp_path / f"{name}.jsonl", source.header) as writer:
            for rows in source.points.values():
                writer.rows(rows)
    refused = parity("diff", "broken.jsonl", "right.jsonl")
    assert refused.code == 2
    assert "ours (broken.jsonl) cannot be trusted: impossible-size" in refused.err
    assert refused.err.count("\n") == 1
    assert "the reference (broken.jsonl)" in parity("diff", "right.jsonl", "broken.jsonl").err
    code, answer = parity.json("diff", "broken.jsonl", "right.jsonl", "--despite-lint")
    assert code == 0, "what is made from the embedding agrees: only its record is wrong"
    assert [fault["checkpoint"] for fault in answer["record_faults"]] == ["embd"]
    assert parity("diff", "right.jsonl", "right.jsonl").code == 0


@pytest.mark.slow
def test_the_command_answers_people_and_machines(right: Dump, parity: Cli, tmp_path: Path) -> None:
    """Exit 1 with findings and 0 without; JSON has the contract's keys."""
    for name, source in (("right", right), ("broken", swapped_buffers(right))):
        with Writer(tmp_path / f"{name}.jsonl", source.header) as writer:
            for rows in source.points.values():
                writer.rows(rows)
    assert parity("lint", "right.jsonl").code == 0
    ran = parity("lint", "broken.jsonl")
    assert ran.code == 1
    assert "usable, with 1 suspicion: captured wrong or computed wrong? `parity diff` decides" in ran.out
    code, answer = parity.json("lint", "broken.jsonl")
    assert code == 1
    assert answer["usable"] is True
    assert answer["findings"][0]["severity"] == "suspicion"
    assert set(answer["findings"][0]) >= {"rule", "severity", "checkpoint", "token_idx", "evidence", "advice"}
    code, answer = parity.json("diff", "broken.jsonl", "right.jsonl")
    assert (code, answer["verdict"]) == (0, "parity"), "what is made from them agrees: captured late"
    assert {fault["checkpoint"] for fault in answer["record_faults"]} == {"embd", "blk.1.l_out", "blk.5.l_out"}
