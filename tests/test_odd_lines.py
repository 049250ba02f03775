"""Lines that no careful writer prints: read as what they mean, or refused by a line that says what is wrong."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cli import Cli, refused


@pytest.fixture
def changed(stories_run: Path, tmp_path: Path) -> Callable[[Callable[[bytes], bytes]], Path]:
    """A function that writes the stories dump with its bytes changed by another one."""

    def write(change: Callable[[bytes], bytes]) -> Path:
        path = tmp_path / "changed.jsonl"
        path.write_bytes(change((stories_run / "ours.jsonl").read_bytes()))
        return path

    return write


def test_lines_of_a_coloured_log_are_records(
    parity: Cli, stories_run: Path, changed: Callable[[Callable[[bytes], bytes]], Path]
) -> None:
    """Escape sequences before and after the JSON change nothing, also not the decimals that are counted without a header."""

    def coloured(dump: bytes) -> bytes:
        return b"".join(b"\x1b[32m[info] " + line + b" \x1b[K\x1b[0m\n" for line in dump.splitlines())

    assert parity("lint", changed(coloured)).out == "clean: 35 records, no findings\n"
    bare = b'{"checkpoint":"embd","token_idx":0,"values":[0.25,0.5]}\n'
    answers = []
    for text in (bare, coloured(bare)):
        (Path("bare.jsonl")).write_bytes(text)
        assert parity("convert", "bare.jsonl", "-o", "out.jsonl").code == 0
        answers.append([json.loads(line).get("quantum") for line in Path("out.jsonl").read_text().splitlines()])
    assert answers[0] == answers[1]
    assert 0.01 in answers[0] or 0.1 in answers[0]


def test_a_dump_that_occurs_twice_is_one_note(
    parity: Cli, stories_run: Path, changed: Callable[[Callable[[bytes], bytes]], Path]
) -> None:
    """Records of all points that occur twice are one note and one finding, and the end records are counted together."""
    twice = changed(lambda dump: dump + dump)
    _, answer = parity.json("diff", twice, stories_run / "ref.jsonl")
    assert answer["verdict"] == "parity"
    assert [note.partition(": ")[2] for note in answer["notes"] if "changed" in note] == [
        "35 records of 7 points occur twice; each position is counted once"
    ]
    _, answer = parity.json("lint", twice)
    assert [finding["rule"] for finding in answer["findings"]] == ["out-of-order"]


def test_headers_that_contradict_each_other_are_said(parity: Cli, changed: Callable[[Callable[[bytes], bytes]], Path]) -> None:
    """Of two headers the last one counts, and the answer says in what they differ."""
    other = changed(lambda dump: dump.partition(b"\n")[0].replace(b"[2047,", b"[2046,") + b"\n" + dump)
    assert "note  the 2 headers differ in tokens: the last one" in parity("lint", other).out


def test_a_line_longer_than_any_record_is_named(parity: Cli, changed: Callable[[Callable[[bytes], bytes]], Path]) -> None:
    """The number of a line without an end is its own."""
    endless = changed(lambda dump: dump + b"x" * (65 << 20))
    refused(parity("lint", endless), f"{endless}: line 38 is longer than 64 MiB.")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (b'"format":1', b'"format":1.0', '"format" must be the number 1, not 1.0.'),
        (b'"format":1', b'"format":"1"', '"format" must be the number 1, not "1".'),
        (b'"format":1', b'"format":-1', '"format" must be the number 1, not -1.'),
        (b'"format":1', b'"format":2', "format 2 is newer than this parity"),
        (b'"shape":[256]', b'"shape":"[' + b"1" * 5000 + b']"', 'line 2: "shape" must be less than 1,099,511,627,776'),
        (b'"token_idx":0', b'"token_idx":true', 'line 2: "token_idx" must be a whole number, 0 or more, not true.'),
        (b'"values":[', b'"values":["x",', 'line 2: "x" is not a number.'),
        (b'"token_idx":0', b'"token_idx":9223372036854775808', 'line 2: "token_idx" must be less than 1,099,511,627,776'),
    ],
)
def test_what_is_wrong_with_a_field_is_said(
    before: bytes, after: bytes, message: str, parity: Cli, changed: Callable[[Callable[[bytes], bytes]], Path]
) -> None:
    """A format, a shape or a position that cannot be: one line in the words of the format, not of Python."""
    refused(parity("lint", changed(lambda dump: dump.replace(before, after, 1))), message)


def test_few_digits_are_said_of_the_records_that_have_them(parity: Cli, stories_run: Path) -> None:
    """Lines without a header whose digits were cut are counted in the note: a `1.0` of one line says nothing of the others."""
    lines = [json.loads(line) for line in (stories_run / "ours.jsonl").read_text().splitlines()]
    records = [{name: line[name] for name in ("checkpoint", "token_idx", "values")} for line in lines if "values" in line]
    for few, said in ((1, "1 of 35 records' values are printed in steps"), (35, "values are printed in steps")):
        for record in records[:few]:
            record["values"] = [round(value, 2) for value in record["values"]]
        Path("few.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        _, answer = parity.json("diff", "few.jsonl", stories_run / "ref.jsonl", "--offset", "0")
        assert [note.partition(" of up to")[0] for note in answer["notes"] if "steps" in note] == [said]


def test_nothing_is_said_of_digits_where_none_are_lacking(parity: Cli) -> None:
    """Ids of experts are whole numbers, and two float32 values may both end at the ninth decimal: no digit was cut."""
    lines = [
        {"checkpoint": name, "token_idx": 0, "values": values}
        for name, values in (("embd", [0.123456789, 1.5]), ("blk.0.ffn_moe_topk", [1.0, 3.0]), ("blk.0.ffn_moe_weights", ["a"]))
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines).replace('["a"]', "[0.7008724,0.299127579]")
    Path("bare.jsonl").write_text(text)
    _, answer = parity.json("diff", "bare.jsonl", "bare.jsonl", "--offset", "0")
    assert [note for note in answer["notes"] if "steps" in note] == []
