"""Dumps that count their positions from another start are aligned by tokens, else by values, and the answer says which and how sure."""

from pathlib import Path

import numpy as np
import pytest
from cli import Cli, refused
from dumps import dump, noisy, random
from msgspec.structs import replace

from checkpoints.errors import DumpError
from checkpoints.jsonl import Writer
from checkpoints.record import Dump, Header, Token
from parity.diff.compare import Options, compare
from parity.diff.measured.offsets import place

POINTS = ("embd", "blk.0.l_out", "blk.23.l_out", "logits")
PROMPT, ALL = 8, 20
ARRAYS = random(POINTS, positions=ALL)
CHOSEN = tuple(Token(PROMPT + i, 50 + i) for i in range(ALL - PROMPT))


def reference() -> Dump:
    ref = dump(ARRAYS, path="ref.jsonl", prefill=PROMPT, tokens=CHOSEN)
    assert ref.header is not None
    return replace(ref, header=replace(ref.header, tokens=tuple(range(100, 100 + PROMPT))))


def bare(
    first: int, last: int = ALL, *, tokens: tuple[Token, ...] = (), counted_from: int | None = None, noise: float = 1e-7
) -> Dump:
    """Our records of positions `first` to `last` without a header, counted from `counted_from` (default: the first of them)."""
    start = first if counted_from is None else counted_from
    ours = dump({name: x[first:last] for name, x in noisy(ARRAYS, noise).items()}, path="ours.jsonl", header=None)
    points = {name: replace(rows, token_idx=rows.token_idx + first - start) for name, rows in ours.points.items()}
    return replace(ours, points=points, tokens=tokens)


def test_generated_tokens_align_a_dump_that_counts_from_them() -> None:
    """Where both sides list generated tokens, these say the offset, and the note says how many agree."""
    ours = bare(PROMPT, tokens=tuple(replace(token, token_idx=token.token_idx - PROMPT) for token in CHOSEN))
    verdict = compare(ours, reference())
    assert verdict
    assert verdict.compared == len(POINTS) * (ALL - PROMPT)
    assert any("moved by +8" in note and "12 of our generated tokens" in note for note in verdict.notes)


def test_generated_tokens_after_their_prompt_are_not_moved() -> None:
    """A side that lists its prompt and lacks the first generated token stays where it is, though the text repeats itself."""
    ref = reference()
    same = tuple(replace(token, id=5) for token in CHOSEN)
    assert place(replace(ref, tokens=same[1:]), replace(ref, tokens=same)).note == ""


@pytest.mark.parametrize("first", [0, 1, PROMPT - 1, PROMPT])
def test_values_align_a_dump_that_says_nothing(first: int) -> None:
    """Bare lines counted from wherever they begin are moved to where the embedding agrees, and both errors are said."""
    verdict = compare(bare(first), reference())
    assert verdict
    assert verdict.compared == len(POINTS) * (ALL - first)
    notes = [note for note in verdict.notes if note.startswith("positions: nothing says")]
    assert len(notes) == 1
    assert (f"moved by +{first}" in notes[0]) == (first > 0)
    assert "next best" in notes[0]
    assert ("BOS" in notes[0]) == (first == 1)


def test_a_wrong_engine_is_aligned_by_what_it_still_has_right() -> None:
    """An engine that is wrong from layer 0 on is aligned by its embedding, and the divergence is named at its place."""
    ours = bare(PROMPT)
    wrong = {
        name: rows if name == "embd" else replace(rows, values=rows.values[:, ::-1], sketch=None, stats={})
        for name, rows in ours.points.items()
    }
    verdict = compare(replace(ours, points=wrong), reference())
    assert verdict.first_divergence is not None
    assert (verdict.first_divergence.checkpoint, verdict.first_divergence.token_idx) == ("blk.0.l_out", PROMPT)


def test_logits_of_the_last_token_printed_as_position_0_are_told() -> None:
    """A single row of logits that is the reference's last is right, and a record fault says that only its number is wrong."""
    ours = bare(0)
    last = ours.points["logits"].take([ALL - 1])
    moved = replace(ours, points={**ours.points, "logits": replace(last, token_idx=np.zeros(1, np.int64))})
    verdict = compare(moved, reference())
    assert verdict
    (fault,) = verdict.record_faults
    assert (fault.checkpoint, fault.sentence) == (
        "logits",
        "it is the reference's at position 19, the last: only its number is wrong",
    )
    assert not any("fits the reference" in note for note in compare(bare(0, noise=0.1), reference()).notes)


def test_garbage_is_not_aligned_by_chance() -> None:
    """Where no offset is clearly better the user is asked, unless both sides hold the same positions: then it is said."""
    other = random(POINTS, positions=ALL, seed=9)
    ours = dump(other, path="ours.jsonl", header=None)
    verdict = compare(ours, reference())
    assert not verdict
    assert any("values do not decide it" in note for note in verdict.notes)
    part = replace(ours, points={name: rows.take(np.arange(9)) for name, rows in ours.points.items()})
    with pytest.raises(DumpError, match="no offset fits clearly") as caught:
        compare(part, reference())
    assert "--offset" in caught.value.advice
    assert not compare(part, reference(), Options(placed=True))


def test_headers_that_list_their_prompts_need_no_note() -> None:
    """Two dumps of format 1 count from the first token of their prompts: nothing is moved, and nothing is said."""
    ref = reference()
    offset = place(replace(ref, path="ours.jsonl"), ref)
    assert offset.note == ""
    assert offset.ours.points is ref.points


@pytest.mark.parametrize("offset", ["9" * 30, "1099511627776", "-3"])
def test_an_offset_beyond_any_position_is_refused(parity: Cli, stories_run: Path, offset: str) -> None:
    """An offset that leaves the positions a dump may have is one line."""
    refused(parity("lint", stories_run / "ours.jsonl", "--offset", offset), f"an offset of {offset}")


def test_diff_says_how_it_aligned(parity: Cli) -> None:
    """The text, the JSON, the Markdown answer and the report carry the sentence; --offset is taken without a search."""
    for side in (reference(), bare(PROMPT)):
        with Writer(side.path, side.header or Header("mine")) as writer:
            for rows in side.points.values():
                writer.rows(rows)
    for output_format in ("text", "json", "markdown"):
        ran = parity("diff", "ours.jsonl", "ref.jsonl", "--format", output_format)
        assert ran.code == 0, ran.err
        assert "moved by +8" in " ".join(ran.out.split())
    assert parity("diff", "ours.jsonl", "ref.jsonl", "--html", "report.html").code == 0
    assert "moved by +8" in Path("report.html").read_text(encoding="utf-8")
    code, answer = parity.json("diff", "ours.jsonl", "ref.jsonl", "--offset", 8)
    assert code == 0
    assert not any("nothing says" in note for note in answer["notes"])
    assert parity("diff", "ours.jsonl", "ref.jsonl", "--offset", 0).code == 1
