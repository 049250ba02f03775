"""Where lower arithmetic moves a model's values as far as they are large, agreement says nothing: no answer calls it parity."""

from pathlib import Path

import numpy as np
import pytest
from dumps import DEFAULT, dump, noisy, random, spoiled
from explaining import RIGHT, unstated
from msgspec.structs import replace
from planted import Faulty, tokens_of

from checkpoints.answers.diff import DIVERGENCE, INCOMPLETE, PARITY, UNJUDGED, Limits, Verdict
from checkpoints.record import Dump
from engine.faults.edits import Then
from engine.replay.precision import rounded
from engine.synth.recipe import shape_of
from engine.synth.recipes import recipe
from parity.diff.compare import Options, comparison
from parity.diff.limits import limits
from parity.diff.unjudged import without_unjudged
from parity.explain.explain import ExplainOptions, explain
from parity.explain.on_model import _without_unjudged, compared_on
from parity.explain.rounding.known_model import KnownModel
from parity.synth.synthetic import make_by_recipe
from reference.client import Reference
from reports.as_json import verdict_as_json
from reports.explanation import lines
from reports.sentences import answer, headline, remarks


def judged(error: float, allowed: float, points: tuple[str, ...]) -> Verdict:
    """The verdict on dumps that differ by an NMSE at `points`, which have a limit of their own."""
    right = random()
    ours = spoiled(right, points, slice(None), float(np.sqrt(error)))
    measured = Limits(allowed, 1e-2, "measured", points=dict.fromkeys(points, allowed))
    compared = comparison(dump(ours), dump(right), Options(compute="bf16", limits=measured))
    return without_unjudged(compared, limits(None, None, compute="bf16")).verdict


def test_a_result_that_zeros_would_pass_is_no_parity() -> None:
    """The logits' limit is above 1, the NMSE of zeros: the answer is incomplete, counts what agrees, and says what would help."""
    verdict = judged(0.5, 7.0, DEFAULT[4:])
    assert not verdict
    assert verdict.verdict == INCOMPLETE
    assert headline(verdict) == "incomplete (the result cannot be judged)"
    assert "48 of 84 records agree, 36 cannot be judged" in answer(verdict)
    assert "parity isolate" in dict(remarks(verdict))["no verdict"]
    assert [point.status for point in verdict.points][-3:] == [UNJUDGED] * 3
    assert verdict_as_json(verdict)["unjudged"] == {"records": 36, "points": list(DEFAULT[4:]), "result": True}


def test_a_result_that_is_judged_stands_beside_points_that_are_not() -> None:
    """Layers whose limit refuses nothing are counted apart in the first words, and the logits decide."""
    verdict = judged(0.5, 7.0, DEFAULT[1:3])
    assert verdict.verdict == PARITY
    assert headline(verdict) == "parity as far as it goes (24 records cannot be judged: even zeros would pass)"
    assert answer(verdict).startswith(headline(verdict))
    assert "60 of 84 records agree" in answer(verdict)


def test_a_limit_below_the_error_of_zeros_judges() -> None:
    """With a limit of 0.9 the same records agree; and what agrees by the table's limits agrees by any."""
    assert judged(0.3, 0.9, DEFAULT[4:]).verdict == PARITY
    exact = judged(1e-5, 7.0, DEFAULT[4:])
    assert (exact.verdict, exact.unjudged.records) == (PARITY, 0)


def test_an_answer_says_how_large_a_fault_its_limits_let_pass() -> None:
    """A limit is the square of an error in proportion to a row; under float32's limits nothing needs to be said."""
    right = random()
    ours, ref = dump(noisy(right)), dump(right)
    wide = comparison(ours, ref, Options(limits=Limits(4e-4, 1e-2, "measured"))).verdict
    wide = replace(wide, precision=None)
    assert dict(remarks(wide))["noise"].startswith("scattered errors of up to 2 % of a row (logits: 10 %) pass for rounding")
    assert "noise" not in dict(remarks(comparison(ours, ref).verdict))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, stories: Path, reference: Reference) -> Faulty:
    """A hybrid of linear attention and experts in random weights, to which BF16 does much."""
    path, chosen = tmp_path_factory.mktemp("unjudged") / "noisy.gguf", recipe("qwen3next")
    make_by_recipe(path, chosen, shape_of(chosen), {}, kind="f16", seed=38, tokenizer=stories)
    return Faulty(path, reference.graph(path))


@pytest.fixture(scope="module")
def tokens(engine: Faulty) -> tuple[int, ...]:
    """A prompt of eight ids."""
    return tokens_of(engine.model, 8, 38)


@pytest.mark.slow
@pytest.mark.parametrize("stated", ["bf16", ""])
def test_diff_and_explain_decide_nothing_where_noise_is_as_large_as_the_values(
    engine: Faulty, tokens: tuple[int, ...], stated: str
) -> None:
    """Without RoPE the engine's errors are as large as BF16's: that is not called parity, and nothing is blamed."""
    steps = [
        replace(step, op=lambda x, *_, **__: x.copy()) if step.makes.rpartition(".")[2] in ("q_rope", "k_rope") else step
        for step in rounded(engine.right, "bf16", storage=True)
    ]
    ours = _stating(engine.dump(RIGHT, tokens, steps=steps), stated)
    right = _stating(engine.dump(RIGHT, tokens), "f32")
    verdict = compared_on(ours, right, Options(), engine.model, third_side=False).verdict
    assert verdict.unjudged.result
    assert verdict.verdict == INCOMPLETE
    explained = explain(ours, engine.model, ExplainOptions(budget=10))
    assert not explained
    assert not explained.causes
    assert next(iter(lines(explained, 100))).plain.startswith("undecided")


@pytest.mark.slow
def test_no_cause_is_named_where_any_change_explains_the_error(tmp_path: Path, stories: Path, reference: Reference) -> None:
    """A right mixture in BF16, in which other experts leave seven times the values' size; an epsilon that chose others was the cause."""
    path, chosen = tmp_path / "mixture.gguf", recipe("rnd1")
    make_by_recipe(path, chosen, shape_of(chosen), {}, kind="f16", seed=65061, tokenizer=stories)
    engine = Faulty(path, reference.graph(path))
    tokens = tokens_of(path, 6, 65061)
    ours = engine.dump(RIGHT, tokens, points="all", steps=rounded(engine.right, "bf16", storage=False))
    explained = explain(ours, path, ExplainOptions(budget=20, compute="bf16", tokens=tokens))
    assert explained.unjudged
    assert not explained.causes
    assert not explained.law


@pytest.mark.slow
@pytest.mark.parametrize("compute", ["bf16", None])
def test_an_error_far_beyond_a_limit_that_zeros_would_pass_is_one(
    engine: Faulty, tokens: tuple[int, ...], compute: str | None
) -> None:
    """Logits a thousand times as large from position 4 on are no rounding: the place is named, as by diff, and no cause."""
    made = engine.dump(RIGHT, tokens, steps=rounded(engine.right, "bf16", storage=True))
    rows = made.points["logits"]
    values = rows.values * np.where(rows.token_idx < 4, 1, 1000)[:, None].astype(np.float32)
    large = replace(rows, values=values, stats={}, sketch=None)
    ours = _stating(replace(made, points={**made.points, "logits": large}), "bf16")
    explained = explain(ours, engine.model, ExplainOptions(budget=10, compute=compute))  # else the header states it
    assert not explained
    assert not explained.causes
    assert not explained.unjudged
    assert explained.first is not None
    assert (explained.first.checkpoint, explained.first.token_idx) == ("logits", 4)
    right = _stating(engine.dump(RIGHT, tokens), "f32")
    assert compared_on(ours, right, Options(), engine.model, third_side=False).verdict.verdict == DIVERGENCE


@pytest.mark.slow
@pytest.mark.parametrize("stated", ["bf16", ""])
@pytest.mark.parametrize(("place", "factor"), [("blk.3.ffn_out", 50), ("blk.3.l_out", 1000)])
def test_other_experts_make_no_row_ten_times_as_large(
    engine: Faulty, tokens: tuple[int, ...], place: str, factor: float, stated: str
) -> None:
    """Fifty times what experts add is a divergence, though others may have been chosen; so is a residual's factor, which a norm divides
    away, as in float32: what agrees by a limit that zeros pass confirms nothing.
    """
    steps = [
        replace(step, op=Then(step.op, lambda x: x * np.float32(factor))) if step.makes == place else step
        for step in rounded(engine.right, "bf16", storage=True)
    ]
    ours = _stating(engine.dump(RIGHT, tokens, points="all", steps=steps), stated)
    right = _stating(engine.dump(RIGHT, tokens, points="all"), "f32")
    verdict = compared_on(ours, right, Options(), engine.model, third_side=False).verdict
    assert verdict.verdict == DIVERGENCE
    assert not verdict.record_faults
    assert verdict.first_divergence is not None
    assert verdict.first_divergence.checkpoint == place


@pytest.mark.slow
@pytest.mark.parametrize("storage", [False, True])
def test_an_engine_that_rounds_as_ours_does_is_right_however_wide_the_limits(
    engine: Faulty, tokens: tuple[int, ...], storage: bool
) -> None:
    """Every record is that of our own run in BF16, which no fault leaves: parity."""
    ours = _stating(engine.dump(RIGHT, tokens, steps=rounded(engine.right, "bf16", storage=storage)), "bf16")
    right = _stating(engine.dump(RIGHT, tokens), "f32")
    assert compared_on(ours, right, Options(), engine.model, third_side=False).verdict
    assert explain(ours, engine.model, ExplainOptions(budget=10))


@pytest.mark.slow
def test_native_limits_that_judge_nothing_leave_the_result_open(engine: Faulty, tokens: tuple[int, ...]) -> None:
    """In native mode no arithmetic is known in which our engine could be run beside the dump: the result is incomplete, and no error."""
    bf16 = rounded(engine.right, "bf16", storage=True)
    ours, ref = (unstated(engine.dump(RIGHT, tokens, steps=steps)) for steps in (bf16, engine.right))
    ours, ref = (replace(made, header=replace(made.header, mode="native")) for made in (ours, ref) if made.header is not None)
    allowed = Limits(7.0, 7.0, "measured", points=dict.fromkeys(ref.points, 7.0))
    compared = comparison(ours, ref, Options(limits=allowed))
    judged = _without_unjudged(compared, ours, Options(), KnownModel(ref, engine.model)).verdict
    assert judged.precision is None
    assert judged.verdict == INCOMPLETE


def _stating(made: Dump, compute: str) -> Dump:
    assert made.header is not None
    return replace(unstated(made), header=replace(made.header, compute=compute))
