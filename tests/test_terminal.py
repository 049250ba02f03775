"""A verdict as text and as JSON: aligned, on one screen, and harmless to terminals and parsers."""

import io
import json

import numpy as np
import pytest
from dumps import DEFAULT, DIFFERENCE_KEYS, HEADER, VERDICT_KEYS, dump, noisy, random, spoiled
from msgspec.structs import replace
from rich.cells import cell_len
from rich.console import Console

from checkpoints.answers.diff import Verdict
from parity.diff.compare import Options, compare
from reports.as_json import verdict_as_json
from reports.header import print_header
from reports.layout import columns
from reports.numbers import of_limit, ranges
from reports.terminal import print_verdict

MANY = (
    "embd",
    *(f"blk.{i}.{kind}" for i in range(24) for kind in ("attn_norm", "q", "k", "v", "l_out")),
    "output_norm",
    "logits",
)


def text(verdict: Verdict, width: int = 100, *, colour: bool = False) -> str:
    """What is printed to a pipe, or to a terminal with colours."""
    out = io.StringIO()
    print_verdict(Console(file=out, width=width, force_terminal=colour, color_system="standard" if colour else None), verdict)
    return out.getvalue()


def diverging(points: tuple[str, ...] = MANY) -> Verdict:
    """Wrong from blk.5.l_out and position 1 on."""
    ref = random(points)
    wrong = points[points.index("blk.5.l_out") :]
    return compare(dump(spoiled(noisy(ref), wrong, slice(1, None))), dump(ref))


def test_the_answer_stands_last() -> None:
    """The last line is the verdict, of parity and of a divergence."""
    ref = random()
    assert text(compare(dump(noisy(ref)), dump(ref))).splitlines()[-1].startswith("parity: 84 of 84 records agree, exact mode")
    assert text(diverging()).splitlines()[-1].startswith("divergence: ")


@pytest.mark.parametrize("width", [60, 80, 120])
def test_it_fits(width: int) -> None:
    """No line is wider than the terminal, but those that are copied; a long list is one screen, with all points counted."""
    lines = text(diverging(), width).splitlines()
    assert all(cell_len(line) <= width for line in lines if "--points" not in line and not line.startswith("divergence: "))
    assert all(line == line.rstrip() for line in lines)
    table = [line for line in lines[1 : lines.index("")] if not line.startswith(" ")]  # notes may go on below their row
    assert len(table) <= 24
    shown = sum(int(line.split()[1]) if line.startswith("…") else 1 for line in table)
    assert shown == len(MANY)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_note_is_cut(width: int) -> None:
    """Whatever the width, each row's note is there to its last word: columns are left out or the note goes on below."""
    shown = text(diverging(DEFAULT), width).split("\n\n")[0]
    assert "…" not in shown
    assert shown.count("11 of 12 wrong") == 5
    assert shown.count("inherited") == 4


@pytest.mark.parametrize("width", [60, 80])
def test_the_last_column_of_a_table_goes_on_below(width: int) -> None:
    """A sentence that does not fit beside its row is broken at spaces, and nothing of it is lost."""
    sentence = "the last of four sequences, one of them the same, against a prefill of 5 tokens"
    lines = [line.plain for line in columns([("a check", "1", sentence)], frozenset({1}), [""], width)]
    assert all(cell_len(line) <= width for line in lines)
    assert " ".join(" ".join(lines).split()) == f"a check 1 {sentence}"


def test_what_explains_a_divergence_is_said() -> None:
    """Place, last agreement, pattern, both values and what to record next are there."""
    shown = text(diverging())
    for part in ("divergence at blk.5.l_out, position 1", "last agreement  blk.5.v", "pattern", "ours", "ref", "--points '"):
        assert part in shown


def test_no_colour_in_a_pipe() -> None:
    """Escape sequences go to terminals only."""
    assert "\x1b" not in text(diverging())
    assert "\x1b" in text(diverging(), colour=True)


def test_names_and_tokens_cannot_command_the_terminal() -> None:
    """What a dump says is printed as text: no markup, no control characters."""
    ref = random(("embd", "blk.0.[red]x\x1b[2J", "logits"), positions=2)
    head = replace(HEADER, pieces=("\x1b[2J", "[bold]"), tokens=(1, 2))
    side = dump(ref, header=head)
    out = io.StringIO()
    console = Console(file=out, width=100)
    print_header(console, head, head)
    print_verdict(console, compare(side, side))
    assert "\x1b" not in out.getvalue()
    assert "[red]x" in out.getvalue()


def test_missing_records_and_strictness_are_said() -> None:
    """A strict comparison that only lacks records says so instead of naming a place."""
    ref = random()
    ours = {name: x for name, x in ref.items() if name != "blk.5.l_out"}
    shown = text(compare(dump(ours), dump(ref), Options(strict=True)))
    assert "ours lacks 12 records: blk.5.l_out" in shown
    assert shown.splitlines()[-1].startswith("divergence: records are missing")


def test_json_is_the_contract() -> None:
    """The promised keys are there, numbers are JSON numbers or words, and it survives a strict parser."""
    ref = random()
    ours = {name: x.copy() for name, x in ref.items()}
    for name in list(ref)[list(ref).index("blk.5.l_out") :]:
        ours[name][3, 2] = np.nan
    fields = verdict_as_json(compare(dump(ours), dump(ref)))
    again = json.loads(json.dumps(fields, allow_nan=False))
    assert set(again) >= VERDICT_KEYS
    first = again["first_divergence"]
    assert set(first) >= DIFFERENCE_KEYS
    assert (first["checkpoint"], first["nmse"], first["ours"][2]) == ("blk.5.l_out", "Infinity", "NaN")
    assert set(again["worst"]) == set(first)
    parity = verdict_as_json(compare(dump(ref), dump(ref)))
    assert (parity["verdict"], parity["first_divergence"], parity["last_agreement"]) == ("parity", None, None)


def test_figures() -> None:
    """Proportions and positions read as a person would write them."""
    assert [of_limit(x) for x in (0, 0.0012, 1e-9, 2.34, 3.1e6, np.inf)] == [
        "–",
        "0.12 %",
        "<0.01 %",
        "2.3 ×",
        "3,100,000 ×",
        "∞",
    ]
    assert ranges((0, 1, 2, 5, 7, 8)) == "0–2, 5, 7–8"
