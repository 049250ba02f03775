"""Lint names each fault of a capture by its rule, and only there."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from lint_faults import FAULTS, MISREAD, VARIANTS, changed, copied, right_dump, swapped_buffers
from msgspec.structs import replace

from checkpoints.answers.lint import ERROR
from checkpoints.errors import DumpError
from checkpoints.record import Dump
from engine.backend import choose
from engine.transformer import Transformer
from engine.weights.gguf_model import GgufModel
from parity.lint.generated import REPEATS, SAME_TOKEN, cycle
from parity.lint.lint import lint, refuse_unusable
from parity.lint.model_facts import ModelFacts, open_model
from parity.lint.table import RULES


@pytest.fixture(scope="module")
def facts(stories: Path) -> ModelFacts:
    return open_model(stories)


@pytest.fixture(scope="module")
def right(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Dump:
    return right_dump(Transformer(GgufModel(stories), choose("numpy")), tmp_path_factory.mktemp("right") / "ours.jsonl")


def test_every_rule_has_a_fault_of_its_own() -> None:
    """Every rule has a fixture here: without one it was never seen to work."""
    assert set(FAULTS) == {rule.name for rule in RULES}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_named_by_its_rule(name: str, right: Dump, facts: ModelFacts) -> None:
    """A fault planted in a real dump is found by its rule."""
    findings = [finding for finding in lint(FAULTS[name](right), facts).findings if finding.rule == name]
    assert findings
    assert all(finding.evidence and finding.cause and finding.advice for finding in findings)


def test_no_rule_finds_anything_in_the_right_dump(right: Dump, facts: ModelFacts) -> None:
    """No rule finds anything in the dump that faults are planted in."""
    assert lint(right, facts).findings == ()


@pytest.mark.parametrize(("name", "message", "fault"), VARIANTS, ids=[f"{name}, {message}" for name, message, _ in VARIANTS])
def test_each_way_to_break_a_rule_is_named(
    name: str, message: str, fault: Callable[[Dump], Dump], right: Dump, facts: ModelFacts
) -> None:
    """Every check within a rule has a fault that it finds, with evidence that says which check it was."""
    findings = [finding for finding in lint(fault(right), facts).findings if finding.rule == name]
    assert findings
    assert any(message in finding.evidence for finding in findings)


@pytest.mark.parametrize("fault", [*FAULTS.values(), *(fault for _, _, fault in VARIANTS)])
def test_a_comparison_refuses_what_lint_calls_unusable(fault: Callable[[Dump], Dump], right: Dump) -> None:
    """It asks only the rules that can say so, and answers as all of them do."""
    dump = fault(right)
    with nullcontext() if lint(dump).usable else pytest.raises(DumpError, match="cannot be trusted"):
        refuse_unusable(dump, "ours")


def test_rows_of_one_kind_have_one_length_without_a_model_too(right: Dump) -> None:
    """A layer's output that says another length than all others contradicts the dump itself."""
    odd = changed(right, "blk.6.l_out", shapes=((77,),) * len(right.points["blk.6.l_out"]), stats={}, sketch=None)
    assert [f.rule for f in lint(odd).findings] == ["shape"]


def test_swapped_buffers_are_told_from_layers_that_do_nothing(right: Dump, facts: ModelFacts) -> None:
    """With the model: "these values are blk.23.l_out" where the capture came late; not so where the values are the true embedding."""
    late = [f.evidence for f in lint(swapped_buffers(right), facts).findings if f.rule == "captured-late"]
    assert late
    assert all("these values are blk.23.l_out" in evidence for evidence in late)
    idle = right
    for layer in range(24):
        idle = copied(idle, f"blk.{layer}.l_out", "embd")
    weight = facts.output_norm()
    assert weight is not None
    rows = right.points["embd"]
    normed = rows.values * weight[None, :24] / np.sqrt(np.mean(rows.values**2, axis=1, keepdims=True))
    idle = changed(idle, "output_norm", values=normed.astype(np.float32), stats={}, sketch=None)
    rules = {f.rule for f in lint(idle, facts).findings}
    assert "captured-late" not in rules
    assert "same-vector" in rules


@pytest.mark.parametrize("kind", MISREAD)
def test_bits_read_as_another_type_are_recognised(kind: str, right: Dump) -> None:
    """Real activations whose bits are read as another 16- or 32-bit type are called by both types' names."""
    source = right.points["blk.4.l_out"]
    values = MISREAD[kind](source.values).astype(np.float32)
    rows = replace(source, values=values, counts=np.full(len(values), values.shape[1]), stats={}, sketch=None)
    evidence = [f.evidence for f in lint(replace(right, points={"blk.4.l_out": rows})).findings if f.rule == "wrong-dtype"]
    held, read_as = kind.removeprefix("pairs of ").split(" as ")
    assert len(evidence) == 1
    assert held in evidence[0]
    assert read_as in evidence[0]


@pytest.mark.parametrize(
    ("ids", "repetition"),
    [
        ([1, 2, 3] + [9] * SAME_TOKEN, (3, 1, SAME_TOKEN)),
        ([1, 2, 3] + [9] * (SAME_TOKEN - 1), None),
        ([5, 1, 2, 3, 4, 5, 6] * REPEATS, (0, 7, 28)),
        ([5, 1, 2, 3, 4, 5, 6] * (REPEATS - 1), None),
        ([1, 2] * 11, None),
        ([1, 2] * 12, (0, 2, 24)),
    ],
)
def test_repetition_has_stated_bounds(ids: list[int], repetition: tuple[int, int, int] | None) -> None:
    """A repeated token or cycle is reported from the bound on, with start, period and length, and not before."""
    assert cycle(ids) == repetition


@pytest.mark.slow
def test_warnings_leave_a_dump_usable(right: Dump) -> None:
    """NaN and idle layers may be the engine's own: a comparison is the judge, and lint says so."""
    for name in ("non-finite", "idle-layer", "cut-short", "repetition"):
        report = lint(FAULTS[name](right))
        assert report.findings
        assert report.usable
        assert all(finding.severity != ERROR for finding in report.findings)
