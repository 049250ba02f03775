"""`parity explain` finds no fault only where `parity diff` finds no divergence, and says what that holds against a dump."""

from collections.abc import Callable

import numpy as np
import pytest
from explaining import PROMPT, RIGHT
from msgspec.structs import replace
from planted import Faulty, half_sums

from checkpoints.answers.diff import Pattern
from checkpoints.answers.explain import Explanation
from engine import ops
from engine.faults.edits import Then
from engine.replay.precision import rounded
from engine.replay.rounded_weights import with_rounded_weights
from parity.diff.compare import Options, compare
from parity.explain.as_compared import left_open_by
from parity.explain.explain import ExplainOptions
from parity.explain.input import explain_dump
from parity.explain.on_model import compared_on
from parity.laws.laws import NOT_RECORDED
from reports.sentences import reasons


def explained(engine: Faulty, place: str, factor: float, kind: str, *, stated: bool, points: str) -> Explanation:
    """The answer on an engine that keeps every value in a lower type, one of them multiplied."""
    steps = [
        replace(step, op=Then(step.op, lambda x: x * np.float32(factor))) if step.makes == place else step
        for step in rounded(engine.right, kind, storage=True)
    ]
    dump = engine.dump(RIGHT, PROMPT, points=points, size=1 << 20, steps=steps, bare=False)
    assert dump.header is not None
    header = replace(dump.header, compute=kind if stated else "")
    return explain_dump(replace(dump, header=header), engine.model, ExplainOptions(budget=10))


def test_a_factor_below_the_noise_of_a_stated_arithmetic_is_said(engine: Faulty) -> None:
    """Embeddings × 1.0017 in F16 are below F16's limits; the factor that all positions share is what diff finds, and explain."""
    answer = explained(engine, "embd", 1.0017, "f16", stated=True, points="default")
    assert not answer
    assert answer.remaining is not None
    assert answer.remaining.checkpoint == "embd"
    assert "1.002 times the right one" in answer.law or "1.0017" in answer.law
    assert not answer.precision_only


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("stated", [True, False])
def test_a_right_engine_in_a_lower_arithmetic_has_no_fault(engine: Faulty, kind: str, stated: bool) -> None:
    """Its records are compared as diff compares them, and agree."""
    answer = explained(engine, "embd", 1.0, kind, stated=stated, points="default")
    assert answer
    assert answer.precision_only == kind


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "factor", "points"),
    [("blk.1.ffn_up", 1.03, "*"), ("blk.1.ffn_up", 1.3, "default"), ("blk.0.attn_norm", 1.2, "*")],
)
def test_the_arithmetic_of_embeddings_does_not_hide_a_fault(engine: Faulty, place: str, factor: float, points: str) -> None:
    """An engine in F16 that says nothing rounds its embeddings, too: they are not the cause, the factor is found beyond the arithmetic."""
    answer = explained(engine, place, factor, "f16", stated=False, points=points)
    assert [cause.named.fault for cause in answer.causes] == ["multiplier"]
    assert answer.judged_as.startswith("F16")


def test_rounded_embeddings_alone_are_still_a_cause(engine: Faulty) -> None:
    """Nothing else is rounded in that engine: the arithmetic explains less than the weights do."""
    wanted: Callable[..., bool] = lambda _, name: name == "token_embd.weight"  # noqa: E731
    dump = engine.dump(RIGHT, PROMPT, points="*", steps=with_rounded_weights(engine.right, "f16", wanted))
    answer = explain_dump(dump, engine.model, ExplainOptions(budget=10))
    assert [cause.named.fault for cause in answer.causes] == ["weights-rounded"]
    assert answer.remaining is None


def test_an_error_that_has_grown_from_just_below_the_limit_blames_no_operation(engine: Faulty) -> None:
    """The last layer's output is at nine tenths of its limit, the norm's at one and two tenths: the norm made nothing wrong."""
    dump = engine.dump(RIGHT, PROMPT, points="*", size=1 << 20, bare=False)
    random, points = np.random.default_rng(5), dict(dump.points)
    for name, error in (("blk.3.l_out", 0.9e-10), ("output_norm", 1.2e-10)):
        rows = points[name]
        noise = random.normal(size=rows.values.shape)
        size = np.linalg.norm(rows.values, axis=1, keepdims=True) / np.linalg.norm(noise, axis=1, keepdims=True)
        values = (rows.values + np.sqrt(error) * size * noise).astype(np.float32)
        points[name] = replace(rows, values=values, stats={}, sketch=None)
    answer = explain_dump(replace(dump, points=points), engine.model, ExplainOptions(compute="f32", budget=10))
    assert answer.first is not None
    assert answer.first.checkpoint == "output_norm"
    assert answer.placed is None


@pytest.mark.slow
def test_an_error_that_has_grown_over_a_stated_arithmetics_limit_is_left_open(engine: Faulty) -> None:
    """At one position the last layer is at nine tenths of F16's measured limit, the norm after it just over it: small faults or another
    arithmetic, as diff says, and nobody is called wrong.
    """
    dump = engine.dump(RIGHT, PROMPT, points="*", size=1 << 20, steps=rounded(engine.right, "f16", storage=True), bare=False)
    right = engine.dump(RIGHT, PROMPT, points="*", size=1 << 20, bare=False)
    assert dump.header is not None
    dump = replace(dump, header=replace(dump.header, compute="f16"))
    allowed = compared_on(dump, right, Options(), engine.model).verdict.limits.points
    random, points = np.random.default_rng(5), dict(dump.points)
    for name, share in (("blk.3.l_out", 0.9), ("output_norm", 1.1)):
        rows, row = dump.points[name], right.points[name].values[4]
        noise = random.normal(size=row.shape)
        values = rows.values.copy()
        values[4] = row + np.sqrt(share * allowed[name]) * np.linalg.norm(row) / np.linalg.norm(noise) * noise
        points[name] = replace(rows, values=values, stats={}, sketch=None)
    dump = replace(dump, points=points)
    said = dict(reasons(compared_on(dump, right, Options(), engine.model).verdict))
    assert said["operation"].endswith("as lower precision does")
    assert "a lower arithmetic's or a fault's" in said["float64"]
    answer = explain_dump(dump, engine.model, ExplainOptions(budget=10))
    assert not answer.causes
    assert "another arithmetic than is stated" in answer.left_open


@pytest.mark.slow
@pytest.mark.parametrize("compute", ["", "f16"])
def test_sums_in_a_lower_type_are_left_open(engine: Faulty, compute: str) -> None:
    """An engine that sums its products in F16, as no rounding of ours does, stated or not: where nothing is found, the answer is open, as
    diff's is, and calls nobody wrong.
    """
    steps = [replace(step, op=half_sums) if step.op is ops.linear else step for step in engine.right]
    dump = engine.dump(RIGHT, PROMPT, points="default", size=1 << 20, steps=steps, bare=False)
    assert dump.header is not None
    answer = explain_dump(replace(dump, header=replace(dump.header, compute=compute)), engine.model, ExplainOptions(budget=10))
    assert not answer.causes
    assert answer or answer.left_open or answer.unjudged
    assert not any("output projection" in lead.sentence for lead in answer.leads)


@pytest.mark.slow
@pytest.mark.parametrize("compute", ["", "bf16"])
def test_digits_that_are_cut_off_are_left_open(engine: Faulty, compute: str) -> None:
    """Products of factors whose digits are cut off to BF16, where ours rounds, cost no more than that: no operation is named as wrong."""

    def cut(x: np.ndarray) -> np.ndarray:
        return (np.ascontiguousarray(x, np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)

    def product(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
        return ops.linear(cut(x), cut(weight), bias)

    steps = [replace(step, op=product) if step.op is ops.linear else step for step in engine.right]
    dump = engine.dump(RIGHT, PROMPT, points="*", size=10, steps=steps, bare=False)
    assert dump.header is not None
    answer = explain_dump(replace(dump, header=replace(dump.header, compute=compute)), engine.model, ExplainOptions(budget=10))
    assert not answer.causes
    assert answer or answer.left_open
    assert answer.placed is None


@pytest.mark.slow
def test_eight_bits_that_a_header_states_are_allowed_for(engine: Faulty) -> None:
    """A header's "q8" is what --compute q8 is: the fault of an engine with 8-bit activations is named, not their first rounding."""
    answer = explained(engine, "blk.1.ffn_up", 1.3, "q8", stated=True, points="*")
    assert [(cause.named.fault, cause.named.layers) for cause in answer.causes] == [("multiplier", (1,))]
    assert answer.remaining is None


@pytest.mark.parametrize("rows", [(5,), (1, 2, 3, 4, 5, 6)])
def test_what_differs_in_values_that_were_not_recorded_is_no_finding(engine: Faulty, rows: tuple[int, ...]) -> None:
    """Where only a sketch differs, at few positions or many, what diff leaves open is open: that nothing recorded is wrong is no law."""

    def noisy(x: np.ndarray) -> np.ndarray:
        changed = x.copy()
        changed[list(rows), 16:] += np.float32(1e-3) * np.abs(x).max()
        return changed

    steps = [replace(step, op=Then(step.op, noisy)) if step.makes == "blk.1.ffn_out" else step for step in engine.right]
    dump = engine.dump(RIGHT, PROMPT, points="*", steps=steps, bare=False)
    answer = explain_dump(dump, engine.model, ExplainOptions(compute="f32", budget=10))
    assert answer.law.endswith(NOT_RECORDED)
    assert answer.law.startswith("at position 5 alone") == (len(rows) == 1)
    verdict = compare(dump, engine.dump(RIGHT, PROMPT, points="*", bare=False))
    verdict = replace(verdict, pattern=Pattern("undecided", "undecided: two near scores"))
    assert left_open_by(verdict, answer).left_open
