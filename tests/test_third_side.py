"""Float64 as the third side of a comparison: which side is off, by how much, and what the answers say of it."""

from collections.abc import Callable
from pathlib import Path

import pytest
from cli import Cli
from msgspec.structs import replace
from planted import Faulty, Planted, tokens_of

from checkpoints.reading.reader import read
from checkpoints.record import Dump
from engine.replay.precision import rounded
from parity.diff.compare import Comparison, Options
from parity.diff.three_way import compare_three
from parity.explain.on_model import compared_on, three_on
from reference.client import Reference
from reference.jobs import DumpJob
from reports.as_json import verdict_as_json
from reports.html import html
from reports.markdown import markdown
from reports.report import Report
from reports.three_way import as_json, heads, sentence
from reports.three_way import lines as table

TOKENS = (2047, 5, 11, 500)
_ROPE = Planted((("rope-pairs", {}, (7,)),))


@pytest.fixture(scope="module")
def ref(reference: Reference, stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Dump:
    """llama.cpp on the same tokens."""
    out = tmp_path_factory.mktemp("ref") / "ref.jsonl"
    reference.dump(DumpJob(stories, out, TOKENS))
    return read(out)


def _compared(faulty: Faulty, ours: Dump, ref: Dump, arbiter: str) -> Comparison:
    return compared_on(ours, ref, Options(), faulty.model, arbiter)


def test_the_side_that_is_off_is_named(faulty: Faulty, ref: Dump) -> None:
    """A wrong RoPE is as far from float64 as from the reference, the reference is near it, and float64's values are the reference's."""
    compared = _compared(faulty, faulty.dump(_ROPE, TOKENS, bare=False), ref, "auto").verdict
    assert compared.first_divergence is not None
    assert compared.truth is not None
    assert (compared.truth.checkpoint, compared.truth.token_idx) == ("blk.10.l_out", compared.first_divergence.token_idx)
    assert compared.truth.alone == "ours"
    assert compared.truth.ours == pytest.approx(compared.first_divergence.nmse, rel=1e-3)
    assert compared.truth.ref is not None
    assert compared.truth.ref < 1e-12
    assert compared.truth.values == pytest.approx(compared.first_divergence.ref, rel=1e-5)
    assert [point.checkpoint for point in compared.truth_points] == ["embd", "blk.0.l_out", "blk.5.l_out", "blk.10.l_out"]


@pytest.mark.slow
def test_a_reference_that_is_off_is_named_as_well(faulty: Faulty, ref: Dump) -> None:
    """The sides exchanged: nothing favours the reference."""
    wrong = faulty.dump(_ROPE, TOKENS, bare=False)
    compared = _compared(faulty, ref, wrong, "auto").verdict
    assert compared.truth is not None
    assert compared.truth.alone == "reference"
    assert compared.pattern is not None
    assert compared.pattern.code == "reference-wrong"
    assert not compared.operation


@pytest.mark.slow
def test_off_and_all(faulty: Faulty, ref: Dump) -> None:
    """`off` asks nothing, not even where the sides differ; `all` asks everywhere where they agree; `auto` does not."""
    right = faulty.dump(Planted(()), TOKENS, bare=False)
    assert not _compared(faulty, right, ref, "auto").verdict.truth_points
    assert not _compared(faulty, faulty.dump(_ROPE, TOKENS, bare=False), ref, "off").verdict.truth_points
    compared = _compared(faulty, right, ref, "all").verdict
    assert compared
    assert [point.checkpoint for point in compared.truth_points] == [point.checkpoint for point in compared.points]
    assert all(point.ours is not None and point.ours < 1e-11 for point in compared.truth_points)
    assert compared.truth is not None
    assert not compared.truth.alone


def test_without_a_common_position_nothing_is_asked(faulty: Faulty, ref: Dump) -> None:
    """If the first token already differs no record is compared: the tokens are the divergence, with the model at hand as without it."""
    verdict = _compared(faulty, faulty.dump(Planted(()), TOKENS[1:], bare=False), ref, "all").verdict
    assert not verdict
    assert verdict.pattern is not None
    assert (verdict.pattern.code, verdict.compared) == ("bos-missing", 0)


@pytest.mark.slow
def test_every_report_shows_all_three(faulty: Faulty, ref: Dump) -> None:
    """Values, distribution and distances of float64 stand in the HTML and Markdown reports and in the JSON."""
    ours = faulty.dump(_ROPE, TOKENS, bare=False)
    compared = _compared(faulty, ours, ref, "auto")
    report = Report(compared.verdict, ours, ref, compared.picture)
    text = html(report)
    assert text.count('<tr><th scope="row">float64</th>') == 1
    assert "float64: 256 elements" in text
    assert "ours – float64" in text
    assert "| float64 |" in markdown(report)
    answer = verdict_as_json(compared.verdict)
    assert answer["truth"]["alone"] == "ours"
    assert [point["checkpoint"] for point in answer["truth_points"]][-1] == "blk.10.l_out"


@pytest.mark.slow
def test_run_takes_the_option(parity: Cli) -> None:
    """`run --arbiter all` says how far both sides are from float64; without it nothing is said where they agree."""
    asked = parity("run", "--prompt", "Once", "--arbiter", "all")
    assert asked.code == 0
    assert "ours is at most" in asked.out
    assert "from float64" in asked.out
    assert "float64" not in parity("run", "--prompt", "Once").out


def test_of_three_sides_one_may_have_other_tokens(faulty: Faulty, ref: Dump) -> None:
    """A side that was given another token is alone at the tokens, though everything before that token agrees."""
    ours, other = (faulty.dump(Planted(()), tokens, bare=False) for tokens in (TOKENS, (*TOKENS[:-1], 77)))
    assert other.header is not None
    other = replace(other, header=replace(other.header, source="another"))
    assert compare_three((ours, ref, replace(ours, header=other.header and replace(other.header, tokens=TOKENS))))
    parted = compare_three((ours, ref, other))
    assert parted.first is not None
    assert (parted.first.checkpoint, parted.first.alone) == ("tokens", 2)
    assert sentence(parted) == "divergence at tokens: ours and llama.cpp agree exactly, another is alone"
    assert heads(("runs/first/ours.jsonl", "llama.cpp", "another")) == ["ours", "ref", "another"]
    assert heads(("runs/first/ours.jsonl", "llama.cpp", "ours")) == ["first", "second", "third"]
    third = faulty.dump(Planted(()), (*TOKENS[:-1], 78), bare=False)
    assert "undecided" in sentence(compare_three((third, ref, other)))


@pytest.mark.parametrize("odd", [0, 1, 2])
def test_of_three_sides_one_may_record_otherwise(faulty: Faulty, ref: Dump, odd: int) -> None:
    """Whichever side shows halves as neighbours, all three agree, and the answer says whose records these are and in which order."""
    right = faulty.dump(Planted(()), TOKENS, points="blk.5.*", size=4096, bare=False)
    rows = right.points["blk.5.q_rope"]
    heads = rows.values.reshape(len(rows), -1, 2, 16)
    neighbours = replace(rows, values=heads.swapaxes(2, 3).reshape(rows.values.shape), sketch=None, stats={})
    assert right.header is not None
    sides = [replace(right, header=replace(right.header, source=name)) for name in ("first", "second", "third")]
    sides[odd] = replace(sides[odd], points={**right.points, "blk.5.q_rope": neighbours})
    three = compare_three((sides[0], sides[1], sides[2]))
    assert three
    [recorded] = three.record_faults
    assert (recorded.side, recorded.fault.checkpoint) == (odd, "blk.5.q_rope")
    assert "neighbours where llama.cpp has halves" in recorded.fault.sentence
    assert f"{len(TOKENS)} recorded otherwise" in sentence(three)
    assert as_json(three)["record_faults"][0]["side"] == ("first", "second", "third")[odd]
    assert any(f"blk.5.q_rope of {('first', 'second', 'third')[odd]}: neighbours" in line.plain for line in table(three, 200))


@pytest.mark.slow
def test_of_three_sides_float64_says_who_is_wrong(faulty: Faulty, ref: Dump) -> None:
    """Two that share a fault outvote the one that is right: with the model they are the wrong ones, without it the right one is alone."""
    wrong = faulty.dump(_ROPE, TOKENS, bare=False)
    assert wrong.header is not None
    other = replace(wrong, header=replace(wrong.header, source="another"))
    three = (wrong, ref, other)
    voted, by_truth = compare_three(three), three_on(three, Options(), faulty.model)
    assert voted.first is not None
    assert by_truth.first is not None
    assert (voted.first.alone, voted.first.wrong) == (1, ())
    assert sentence(voted).endswith("llama.cpp is alone; the two may share a fault (--model M.gguf lets float64 decide)")
    assert (by_truth.first.checkpoint, by_truth.first.wrong) == ("blk.10.l_out", (0, 2))
    assert by_truth.first.truth[1] is not None
    assert by_truth.first.truth[1] < 1e-12
    assert "ours and another are wrong: from the same steps in float64 ours" in sentence(by_truth)
    assert as_json(by_truth)["first_divergence"]["wrong"] == ["ours", "another"]
    assert three_on(three, Options(), faulty.model, "off").first == voted.first


@pytest.mark.slow
def test_a_side_that_may_be_in_lower_arithmetic_is_not_called_wrong(
    reference: Reference, small_model: Callable[..., Path], tmp_path: Path
) -> None:
    """A right engine in F16 that does not say so, beside two in float32, in a model whose scan amplifies rounding."""
    model, out = small_model("falcon-h1"), tmp_path / "ref.jsonl"
    engine, tokens = Faulty(model, reference.graph(model)), tokens_of(model, 8, 70014)
    reference.dump(DumpJob(model, out, tokens, points="all", slice_size=None))
    half, ours = (
        engine.dump(Planted(()), tokens, points="*", size=16, bare=False, steps=steps)
        for steps in (rounded(engine.right, "f16", storage=True), engine.right)
    )
    assert half.header is not None
    unstated = replace(half, header=replace(half.header, compute="", source="half"))
    three = three_on((unstated, ours, read(out)), Options(), model)
    assert not three
    assert {side for point in three.points for side in point.wrong} == set()
    assert any("half: F16 arithmetic, which it does not state" in note for note in three.notes)
    stated = replace(half, header=replace(half.header, source="half"))
    assert {side for point in three_on((stated, ours, read(out)), Options(), model).points for side in point.wrong} == {0}
