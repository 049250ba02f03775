"""Records that show something other than the point they are named after: each kind is named, also where the engine is wrong besides."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from numpy.typing import NDArray
from planted import TOKENS, Faulty, Planted

from checkpoints.answers.diff import Verdict
from checkpoints.mapped import renamed
from checkpoints.mapping import read_mapping
from checkpoints.points import LOGITS, parse
from checkpoints.record import Dump
from checkpoints.summary import summarise
from parity.diff.compare import Options, compare
from reports.sentences import remarks

HEAD, RANKS = 32, 2
F32 = Options(compute="f32")
Values = NDArray[np.float32]
Change = Callable[[Values], NDArray[np.floating]]


def shown(dump: Dump, change: Change, *kinds: str, layers: range = range(24), size: int = 4096) -> Dump:
    """The dump with other values at these kinds of points."""
    points = {}
    for name, rows in dump.points.items():
        point = parse(name)
        if len(set(rows.shapes)) > 1:
            continue  # rows that grow with the position
        chosen = point.kind in kinds and (point.layer is None or point.layer in layers)
        values = change(rows.values).astype(np.float32) if chosen else rows.values
        points[name] = summarise(name, np.ascontiguousarray(values), rows.token_idx, slice_size=size)
    return replace(dump, points=points)


def instead(dump: Dump, kind: str, other: Callable[[int], str], layers: range = range(24)) -> Dump:
    """The dump with another point's records under the names of one kind."""
    points = dict(dump.points)
    for layer in layers:
        name = f"blk.{layer}.{kind}"
        points[name] = replace(dump.points.get(other(layer), dump.points[name]), point=name)
    return replace(dump, points=points)


def sentences(verdict: Verdict) -> str:
    """What is said of records that show something else."""
    return "\n".join(sentence for label, sentence in remarks(verdict) if label == "recorded")


def misread(values: Values) -> Values:
    """F16 bits read as BF16."""
    return (values.astype(np.float16).view(np.uint16).astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize(
    ("kinds", "change", "message"),
    [
        (("k", "k_rope", "v"), lambda x: x.reshape(len(x), -1, HEAD).repeat(2, axis=1).reshape(len(x), -1), "each head of 32 repeated"),
        (("q", "q_rope", "kqv_out", "ffn_up"), lambda x: x[:, x.shape[1] // RANKS :], "part 2 of 2, as one rank"),
        (("ffn_up", "v"), lambda x: x.T.reshape(x.shape), "a buffer [elements, positions]"),
        (("attn_out", "l_out"), lambda x: x[-1:].repeat(len(x), axis=0), "every position holds the reference's position 6"),
        (("v",), lambda x: x[::-1], "hold the reference's 6, 5, 4, 2, 1, 0"),
        (("ffn_up",), lambda x: np.roll(x, 1, axis=0), "position t holds the reference's t − 1, around the end"),
        (("v", "ffn_out"), misread, "F16 bits read as BF16"),
        (("l_out",), lambda x: x.astype(np.float16), "rounded to F16"),
        (("ffn_out",), lambda x: x * 0, "zeros: captured before it was written"),
        (("ffn_swiglu",), lambda x: np.where(x == x.max(), np.inf, x), "an overflow of the capture's own type"),
    ],
)  # fmt: skip
def test_what_a_record_shows_is_named_once(right: Dump, kinds: tuple[str, ...], change: Change, message: str) -> None:
    """Repeated heads, a rank's part, a transposed buffer, other positions, another type: no divergence, one sentence for all layers."""
    verdict = compare(shown(right, change, *kinds), right, F32)
    assert verdict, verdict.operation
    assert {parse(fault.checkpoint).kind for fault in verdict.record_faults} == set(kinds)
    answer = sentences(verdict)
    assert answer.count(message) == len(kinds), answer
    assert answer.count("blk.{0..23}.") == len(kinds), answer


def test_a_rank_whose_part_comes_first_is_noted(right: Dump) -> None:
    """The leading values of a first part agree; that the rows are shorter is said all the same."""
    verdict = compare(shown(right, lambda x: x[:, : x.shape[1] // RANKS], "q", "ffn_up", size=16), right, F32)
    assert verdict
    notes = " ".join(sentence for _, sentence in remarks(verdict))
    assert "rows of 128 elements where llama.cpp has 256" in notes or "the rows differ in length at blk.0.q" in notes


def softmax(x: Values) -> NDArray[np.float64]:
    exponents = np.exp(x.astype(np.float64) - x.max(axis=1, keepdims=True))
    return np.asarray(exponents / exponents.sum(axis=1, keepdims=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (softmax, "probabilities: captured after the soft max"),
        (lambda x: np.log(softmax(x)), "log-probabilities"),
        (lambda x: x[-1:], "the reference's at position 6, the last: only its number is wrong"),
    ],
)
def test_logits_recorded_otherwise(right: Dump, change: Change, message: str) -> None:
    """Nothing is made from logits; likelihoods, and the last row under number 0, are what no wrong product gives."""
    ours = dict(right.points)
    values = np.ascontiguousarray(change(right.points[LOGITS].values), dtype=np.float32)
    ours[LOGITS] = summarise(LOGITS, values, np.arange(len(values)), slice_size=4096)
    verdict = compare(replace(right, points=ours), right, F32)
    assert verdict, verdict.operation
    assert message in sentences(verdict)
    scaled = {**ours, LOGITS: summarise(LOGITS, right.points[LOGITS].values * np.float32(1.25), np.arange(7), slice_size=4096)}
    assert not compare(replace(right, points=scaled), right, F32)


def test_one_map_line_settles_all_layers_and_one_layer_only_its_own(right: Dump, tmp_path: Path) -> None:
    """Names exchanged in all layers give lines with {i}, a mistake in one layer a line for that layer, and both settle it."""
    exchanged = instead(
        instead(right, "ffn_gate", lambda n: f"blk.{n}.ffn_up"), "ffn_norm", lambda n: f"blk.{n}.attn_norm", range(3, 4)
    )
    verdict = compare(exchanged, right, F32)
    assert verdict
    lines = dict.fromkeys(fault.map for fault in verdict.record_faults)
    assert list(lines) == ['"blk.{i}.ffn_gate" = "blk.{i}.ffn_up"', '"blk.3.ffn_norm" = "blk.3.attn_norm"']
    assert "blk.{0..23}.ffn_gate: it is blk.{0..23}.ffn_up; blk.0.ffn_swiglu, computed from it, agrees" in sentences(verdict)
    (tmp_path / "names.toml").write_text("[names]\n" + "\n".join(lines) + "\n")
    settled = compare(renamed(read_mapping(tmp_path / "names.toml"), exchanged), right, F32)
    assert settled
    assert settled.record_faults == ()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "blamed"),
    [
        ("rope-pairs", ("q_rope",)),
        ("gqa-modulo", ("kqv_out", "kq")),
        ("norm-skipped", ("ffn_norm",)),
    ],
)
def test_a_mistake_of_the_capture_does_not_hide_the_operation(
    faulty: Faulty, right: Dump, fault: str, blamed: tuple[str, ...]
) -> None:
    """What other layers show to be recorded otherwise is not blamed in the wrong layer, and a norm that agrees has read a right row."""
    parameters = {"at": ("ffn_norm",)} if fault == "norm-skipped" else {}
    wrong = faulty.dump(Planted(((fault, parameters, (3,)),)), TOKENS, points="all", size=4096, bare=False)
    pairs = shown(wrong, lambda x: x.reshape(len(x), -1, 2, HEAD // 2).swapaxes(2, 3).reshape(len(x), -1), "q", "k", "v")
    mistakes = {
        "rope-pairs": pairs,
        "gqa-modulo": instead(wrong, "l_out", lambda n: f"blk.{n + 1}.l_out"),
        "norm-skipped": instead(wrong, "attn_out", lambda n: f"blk.{n}.ffn_inp"),
    }
    verdict = compare(shown(mistakes[fault], lambda x: x), right, F32)
    assert verdict.first_divergence is not None
    assert parse(verdict.first_divergence.checkpoint).layer == 3, verdict.first_divergence.checkpoint
    assert parse(verdict.first_divergence.checkpoint).kind in blamed
    assert verdict.record_faults


@pytest.mark.slow
def test_a_point_that_shows_another_one_is_left_out_where_something_is_wrong(faulty: Faulty, right: Dump) -> None:
    """Layer outputs that show the value before the feed-forward network say nothing of a missing residual addition: no input "agrees"."""
    wrong = faulty.dump(Planted((("residual-missing", {"at": ("l_out",)}, (3,)),)), TOKENS, points="all", size=4096, bare=False)
    verdict = compare(shown(instead(wrong, "l_out", lambda n: f"blk.{n}.ffn_inp"), lambda x: x), right, F32)
    assert verdict.first_divergence is not None
    assert verdict.first_divergence.checkpoint == "blk.4.attn_norm"
    assert "this operation is wrong" not in verdict.operation
    assert "l_out" in verdict.next
    assert "blk.3.l_out" in {fault.checkpoint for fault in verdict.record_faults}


@pytest.mark.slow
def test_a_value_that_stands_under_another_name_was_computed_right(faulty: Faulty, right: Dump) -> None:
    """Exchanged names, or zeros beside a missing residual: the operation whose right value another record shows is not blamed."""
    rope = faulty.dump(Planted((("rope-pairs", {}, (3,)),)), TOKENS, points="all", size=4096, bare=False)
    exchanged = instead(rope, "q", lambda n: f"blk.{n}.q_rope")
    exchanged = replace(
        exchanged,
        points=exchanged.points
        | {f"blk.{n}.q_rope": replace(rope.points[f"blk.{n}.q"], point=f"blk.{n}.q_rope") for n in range(24)},
    )
    verdict = compare(shown(exchanged, lambda x: x), right, F32)
    assert verdict.first_divergence is not None
    assert verdict.first_divergence.checkpoint == "blk.3.k_rope"
    assert "blk.3.q: another value than its name says: its own is recorded as blk.3.q_rope" in sentences(verdict)
    residual = faulty.dump(
        Planted((("residual-missing", {"at": ("l_out",)}, (3,)),)), TOKENS, points="all", size=4096, bare=False
    )
    verdict = compare(shown(residual, lambda x: 0 * x, "ffn_out", layers=range(3, 4)), right, F32)
    assert verdict.first_divergence is not None
    assert verdict.first_divergence.checkpoint == "blk.3.l_out"
    assert verdict.pattern is not None
    assert "it is blk.3.ffn_out" in verdict.pattern.sentence


@pytest.mark.slow
def test_a_record_of_a_later_layer_blames_no_operation(faulty: Faulty, right: Dump) -> None:
    """A query that was captured a layer late in a wrong engine: its own value was not seen, so the product is not called wrong."""
    rope = faulty.dump(Planted((("rope-pairs", {}, (3,)),)), TOKENS, points="all", size=4096, bare=False)
    verdict = compare(shown(instead(rope, "q", lambda _: "blk.4.q", range(3, 4)), lambda x: x), right, F32)
    assert verdict.operation == "blk.3.q shows blk.4.q, which is computed later: its own value was not seen"


@pytest.mark.slow
def test_an_embedding_of_a_lower_type_is_not_called_another_row(faulty: Faulty, right: Dump) -> None:
    """A table that was rounded to BF16 is named so, not a wrong table or row; a dump that was rounded blames nothing."""
    steps = [
        replace(step, op=lambda *x, op=step.op, **p: _nearest_bf16(op(*x, **p))) if step.makes == "embd" else step
        for step in faulty.right
    ]
    points = "embd,blk.0.attn_norm,blk.0.l_out,logits"
    stored = faulty.dump(Planted(()), TOKENS, points=points, size=4096, bare=False, steps=steps)
    verdict = compare(stored, right, F32)
    assert (verdict.pattern and verdict.pattern.code, verdict.operation) == ("rounded", "")
    rounded = shown(right, _nearest_bf16, "embd", *{parse(name).kind for name in right.points})
    verdict = compare(rounded, right, F32)
    assert verdict
    assert {fault.kind for fault in verdict.record_faults} == {"type"}


def _nearest_bf16(x: Values) -> Values:
    bits = np.ascontiguousarray(x).view(np.uint32)
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return np.asarray(((bits + half) & np.uint32(0xFFFF0000)).view(np.float32))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ("the first one is doubled", "is the first token, BOS, there twice"),
        ("the first one is missing", "is the first token, BOS, missing"),
    ],
    ids=["doubled", "missing"],
)
def test_shifted_tokens_are_told_by_the_embedding(faulty: Faulty, tokens: str, message: str) -> None:
    """An engine that lists the prompt's ids and reads others: the rows say so, also where an id comes several times."""
    ids = (2047, 430, 457, 430, 403, 430, 99, 457)
    right = faulty.dump(Planted(()), ids, points="embd,blk.0.attn_norm,blk.0.l_out,logits", size=64, bare=False)
    wrong = faulty.dump(
        Planted((("bos", {"tokens": tokens}, ()),)), ids, points="embd,blk.0.attn_norm,blk.0.l_out,logits", size=64, bare=False
    )
    last = len(ids) - 1  # where the missing token's row would be another token's
    wrong = replace(wrong, points={name: rows.take(rows.token_idx < last) for name, rows in wrong.points.items()})
    verdict = compare(wrong, right, F32)
    assert verdict.pattern is not None
    assert (verdict.pattern.code, verdict.operation) == ("tokens-shifted", "")
    assert message in verdict.pattern.sentence
