"""Records are paired by their key; duplicates are merged, selected or refused; token sequences are compared first."""

import numpy as np
import pytest
from dumps import HEADER, dump, noisy, random
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from checkpoints.errors import DumpError, InputError
from checkpoints.record import Dump, ModelInfo, Rows, Token
from parity.diff.compare import Options, compare
from parity.diff.measured.align import align
from reports.sentences import answer

POINTS = ("embd", "blk.0.l_out", "logits")


def doubled(side: Dump, point: str, change: float, step: int) -> Dump:
    """The dump with all records of a point a second time, changed, as another step."""
    rows = side.points[point]
    again = replace(rows, values=rows.values + np.float32(change), step=np.full(len(rows), step))
    return replace(side, points={**side.points, point: Rows.stack([again, rows])})


@given(st.lists(st.integers(0, 30), unique=True, min_size=1), st.lists(st.integers(0, 30), unique=True, min_size=1))
def test_rows_meet_by_position(left: list[int], right: list[int]) -> None:
    """Whatever the order of the records, row i of both sides has the same position, and the rest is counted as missing."""
    side = dump(random(POINTS, positions=31))
    ours, ref = (
        replace(side, points={name: rows.take(np.array(order)) for name, rows in side.points.items()})
        for order in (left, right)
    )
    common = sorted(set(left) & set(right))
    if not common:
        with pytest.raises(DumpError):
            align(ours, ref)
        return
    alignment = align(ours, ref)
    for pair in alignment.pairs:
        assert pair.ours.token_idx.tolist() == pair.ref.token_idx.tolist() == common
        assert np.array_equal(pair.ours.values, pair.ref.values)
    assert alignment.missing_ours.records == 3 * len(set(right) - set(left))
    assert alignment.missing_ref.positions == tuple(sorted(set(left) - set(right)))


def test_sequences_are_kept_apart() -> None:
    """The same position of two sequences is two keys."""
    side = dump(random(POINTS, positions=3))
    both = {
        name: Rows.stack([rows, replace(rows, seq=rows.seq + 1, values=rows.values + 1)]) for name, rows in side.points.items()
    }
    assert compare(replace(side, points=both), replace(side, points=both)).compared == 18


def test_records_that_agree_are_merged() -> None:
    """A record that occurs twice with the same values counts once, and a note says so."""
    side = dump(random(POINTS))
    verdict = compare(doubled(side, "embd", 0, 1), side)
    assert verdict
    assert verdict.compared == 36
    assert any("occur twice" in note for note in verdict.notes)


def test_records_that_contradict_each_other_are_refused_or_selected() -> None:
    """Two values for one key name their steps; `step` selects either of them."""
    side = dump(random(POINTS))
    twice = doubled(side, "embd", 1, 7)
    with pytest.raises(DumpError, match=r"contradict.*steps 0, 7"):
        compare(twice, side)
    assert compare(twice, side, Options(step=0))
    assert not compare(twice, side, Options(step=7, strict=True))
    with pytest.raises(DumpError, match="step 3"):
        compare(twice, side, Options(step=3))


def test_two_models_or_prompts_are_two_experiments() -> None:
    """Different fingerprints or prompt texts are refused, naming both."""
    ref = random(POINTS)
    other = replace(HEADER, model=ModelInfo("other", "qwen2", "F32", 24, "beef"))
    with pytest.raises(InputError, match=r"tiny.*other"):
        compare(dump(ref), dump(ref, header=other))
    with pytest.raises(InputError, match=r"'a prompt'.*'another'"):
        compare(dump(ref), dump(ref, header=replace(HEADER, prompt="another")))


IDS = (1, 10, 11, 12, 13, 14)


@pytest.mark.parametrize(
    ("ours", "at", "code", "compared"),
    [
        (IDS[1:], 0, "bos-missing", 0),
        ((1, *IDS), 1, "bos-doubled", 3),
        ((9, *IDS), 0, "bos-added", 0),
        ((1, 10, 11, 99, 13, 14), 3, "tokenizer", 9),
        (IDS[:-1], 5, "token-count", 15),
    ],
)
def test_different_ids_are_a_divergence(ours: tuple[int, ...], at: int, code: str, compared: int) -> None:
    """Different ids are a divergence at `tokens`; records before it are compared, later ones are left out and counted."""
    ref = random(POINTS, positions=6)
    left = dump(ref, header=replace(HEADER, tokens=ours))
    verdict = compare(left, dump(ref, header=replace(HEADER, tokens=IDS)))
    assert not verdict
    assert verdict.first_divergence is not None
    assert (verdict.first_divergence.checkpoint, verdict.first_divergence.token_idx) == ("tokens", at)
    assert verdict.pattern is not None
    assert verdict.pattern.code == code
    assert (verdict.compared, verdict.left_out) == (compared, 18 - compared)


def test_ids_that_pad_are_called_that_if_all_before_them_agrees() -> None:
    """A header that lists a batch's padding as well is a divergence of ids, whose answer says so and that all records before it agree;
    other further ids are not called padding.
    """
    ref = random(POINTS, positions=6)
    for further, padding in (((0, 0, 0), True), ((0, 7, 0), False)):
        left = dump(ref, header=replace(HEADER, tokens=(*IDS, *further)))
        verdict = compare(left, dump(ref, header=replace(HEADER, tokens=IDS)))
        assert not verdict
        assert verdict.pattern is not None
        assert ("padding" in verdict.pattern.sentence) == padding
        assert "18 records before it agree" in answer(verdict)


def test_generated_ids_that_differ_end_the_comparison() -> None:
    """If the sides chose different tokens, what follows is left out: it is another text."""
    ref = random(POINTS, positions=8)
    head = replace(HEADER, tokens=IDS)
    ours = {name: x.copy() for name, x in noisy(ref).items()}
    for x in ours.values():
        x[7] += 1
    chosen = [(Token(6, 5, " a"), Token(7, number, " b", ((number, 2.0), (6, 1.5)))) for number in (8, 9)]
    sides = [dump(x, header=head, tokens=tokens, prefill=6) for x, tokens in zip((ours, ref), chosen, strict=True)]
    verdict = compare(*sides)
    assert verdict
    assert (verdict.compared, verdict.left_out) == (21, 3)
    assert verdict.choices is not None
    assert (verdict.choices.differs_at, verdict.choices.differs_margin) == (6, 0.5)


def test_a_prompt_that_the_other_side_generated_is_the_same_text() -> None:
    """An engine that is given prompt and generated tokens as one prompt is compared as a whole."""
    ref = random(POINTS, positions=8)
    generated = (Token(6, 20), Token(7, 21))
    left = dump(ref, header=replace(HEADER, tokens=(*IDS, 20, 21)))
    assert compare(left, dump(ref, header=replace(HEADER, tokens=IDS), tokens=generated, prefill=6)).compared == 24


def test_a_doubled_first_token_in_a_dump_without_a_header_is_named() -> None:
    """One position more than the reference, which fits it one position earlier from the second on: said, and compared, not refused."""
    right = random(POINTS, 6)
    ours = dump({name: np.concatenate([rows[:1], rows[:5]]) for name, rows in right.items()}, header=None)
    verdict = compare(ours, dump({name: rows[:5] for name, rows in right.items()}))
    assert verdict.pattern is not None
    assert verdict.pattern.code == "tokens-shifted"
    assert any("is the first token (BOS) there twice" in note for note in verdict.notes)
