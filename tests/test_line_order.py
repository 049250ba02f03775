"""Lines without a position are counted, said and never taken for something they are not."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from cli import Cli

from checkpoints.errors import DumpError
from checkpoints.reading.reader import read


def without_positions(path: Path, points: Sequence[str] = ()) -> Path:
    """The records of a dump as bare lines without token_idx, at some points or all."""
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    bare = [{key: line[key] for key in ("checkpoint", "token_idx", "values")} for line in kept if line["type"] == "checkpoint"]
    for line in bare:
        if not points or line["checkpoint"] in points:
            del line["token_idx"]
    out = Path("bare.jsonl")
    out.write_text("".join(json.dumps(line) + "\n" for line in bare))
    return out


def test_lines_without_a_position_are_counted_by_point(stories_run: Path, parity: Cli) -> None:
    """A dump without token_idx, one line per point and pass, compares as the numbered one does, and every command says so."""
    bare = without_positions(stories_run / "ours.jsonl")
    code, answer = parity.json("diff", bare, stories_run / "ref.jsonl", "--compute", "f32")
    assert (code, answer["compared"]) == (0, 35)
    note = "no line has a token_idx: a point's first line is taken as position 0, its second as 1, … up to 4"
    assert any(note in text for text in answer["notes"])
    for command_line in (("diff", bare, stories_run / "ref.jsonl", "--compute", "f32"), ("lint", bare)):
        assert note in " ".join(parity(*command_line).out.split())
    assert note in parity("convert", bare, "-o", "ours.jsonl").err


def test_sequences_are_counted_each_in_the_files_order(tmp_path: Path) -> None:
    """Lines of two sequences that alternate, a hundred of each: every sequence is numbered from 0 as its lines come."""
    path = tmp_path / "two.jsonl"
    path.write_text("".join(f'{{"checkpoint":"embd","seq":{n % 2},"values":[{n // 2}.5]}}\n' for n in range(200)))
    rows = read(path).points["embd"]
    assert (rows.token_idx == rows.values[:, 0] - 0.5).all()
    assert sorted(rows.seq.tolist()) == [0] * 100 + [1] * 100


def test_points_without_positions_are_named(stories_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only some points lack token_idx these are counted and named; within one point it is all lines or none."""
    monkeypatch.chdir(tmp_path)
    numbered = read(stories_run / "ours.jsonl")
    dump = read(without_positions(stories_run / "ours.jsonl", ("logits",)))
    assert any(note.startswith("lines of logits lack a token_idx") for note in dump.notes)
    assert dump.points["logits"].token_idx.tolist() == numbered.points["logits"].token_idx.tolist()
    lines = Path("bare.jsonl").read_text().splitlines()
    Path("mixed.jsonl").write_text("\n".join([*lines, json.dumps({"checkpoint": "embd", "values": [1.0]})]))
    with pytest.raises(DumpError, match="1 of 6 records of embd have no token_idx"):
        read("mixed.jsonl")


def test_the_last_position_alone_is_not_taken_for_the_first(stories_run: Path, parity: Cli) -> None:
    """Logits printed once a prompt and without token_idx are told to be another position's, not called wrong in silence."""
    bare = without_positions(stories_run / "ours.jsonl")
    lines = bare.read_text().splitlines()
    logits = [line for line in lines if '"logits"' in line]
    bare.write_text("\n".join([*(line for line in lines if line not in logits), logits[-1], ""]))
    _, answer = parity.json("diff", bare, stories_run / "ref.jsonl", "--compute", "f32")
    assert any("logits has only 1" in note for note in answer["notes"])
    assert [fault["sentence"] for fault in answer["record_faults"]] == [
        "it is the reference's at position 4, the last: only its number is wrong"
    ]
