"""What `parity explain` prints and answers as JSON of an explanation: each list ends where its limit says, each sentence fits its case."""

from typing import Any

import pytest
from msgspec.structs import replace

from checkpoints.answers.explain import Cause, DivergentPlace, Explanation, Named, PossibleOperations, TruthAt
from reports.explanation import as_json, layers_text, lines

PLACE = DivergentPlace("blk.3.q_rope", 2, 1e-3, 1e-10)
UNEXPLAINED = Explanation(records=30, differing=10, first=PLACE, last_agreement="blk.3.q", remaining=PLACE)


def printed(explanation: Explanation) -> str:
    return "\n".join(line.plain.rstrip() for line in lines(explanation, 1000))


def placed(count: int, agreeing: int, *, sure: bool = True) -> Explanation:
    """A divergence with so many operations in question, and so many inputs that agree."""
    names = tuple(f"blk.3.op{i}" for i in range(count)), tuple(f"blk.3.in{i}" for i in range(agreeing))
    return replace(UNEXPLAINED, placed=PossibleOperations(*names, sure=sure, seen=None if sure else (16, 1024)))


def test_no_fault_in_lower_arithmetic_says_how_large_an_error_passes() -> None:
    """Under float32's limits nothing needs to be said."""
    right = Explanation(records=30, differing=0, first=None, last_agreement=None, precision_only="bf16", passes=(4e-4, 1e-2))
    assert "noise     scattered errors of up to 2 % of a row (logits: 10 %) pass for rounding" in printed(right)
    assert as_json(right)["passes"] == {"rows": 4e-4, "logits": 1e-2}
    assert "pass for rounding" not in printed(replace(right, passes=(1e-10, 1e-9)))


@pytest.mark.parametrize(("count", "listed"), [(2, True), (12, True), (13, False)])
def test_up_to_twelve_operations_are_listed(count: int, listed: bool) -> None:
    """More operations in question than that say nothing: then only the inputs that agree are named."""
    text = printed(placed(count, 1))
    assert (f"blk.3.op{count - 1}: blk.3.in0 agrees as whole rows" in text) is listed
    assert ("after     blk.3.in0, which agrees as whole rows" in text) is not listed


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("node.103", "blk.3.topk"), "wrong     blk.3.topk, or an unnamed step before it: blk.3.in0 agrees"),
        (
            ("blk.3.a", "node.103", "blk.3.b"),
            "wrong     one of blk.3.a, blk.3.b, or an unnamed step between them: blk.3.in0 agrees",
        ),
        (("node.1", "node.2"), "wrong     one of node.1, node.2: blk.3.in0 agrees"),
    ],
)
def test_steps_without_a_name_are_not_listed_by_number(names: tuple[str, ...], said: str) -> None:
    """A reader cannot record "node.103", and learns nothing from the number, unless there is no other."""
    assert said in printed(replace(UNEXPLAINED, placed=PossibleOperations(names, ("blk.3.in0",), sure=True)))


def test_a_single_operation_is_wrong() -> None:
    """One operation whose inputs agree is called wrong, also where it reads tokens alone."""
    assert "blk.3.op0 is computed from blk.3.in0 and blk.3.in1, which agree as whole rows: this operation is wrong" in printed(
        placed(1, 2)
    )
    assert "blk.3.op0 is computed from the tokens alone: this operation is wrong" in printed(placed(1, 0))
    assert "op0" not in printed(placed(2, 0))


def test_three_inputs_are_named_and_more_are_said() -> None:
    """The inputs that agree: up to three by name."""
    assert "blk.3.in0 and blk.3.in1 and blk.3.in2 agree as whole rows" in printed(placed(2, 3))
    assert "blk.3.in0 and blk.3.in1 and blk.3.in2 and more agree as whole rows" in printed(placed(2, 4))


def test_inputs_seen_in_part_prove_nothing() -> None:
    """Inputs of which only a slice was recorded: the fault may lie before them, and JSON names no operation."""
    unsure = placed(1, 1, sure=False)
    assert "in the 16 values of 1,024 that were recorded: the rest may be wrong there already" in printed(unsure)
    assert "this operation is wrong" not in printed(unsure)
    assert as_json(unsure)["operations"] == []
    assert as_json(placed(2, 1))["operations"] == ["blk.3.op0", "blk.3.op1"]


@pytest.mark.parametrize(("count", "more"), [(4, ""), (5, "and 1 more (--format json lists them)")])
def test_four_equivalent_faults_are_printed(count: int, more: str) -> None:
    """Faults with the same numbers: four as text, all in JSON."""
    others = tuple(Named(f"fault-{i}", {}, None, f"what {i} does") for i in range(count))
    cause = Cause(Named("rope-pairs", {}, None, "the wrong pairs"), 1.0, 10, 1e-12, "looks", "fix", "seen", equivalent=others)
    explained = replace(UNEXPLAINED, causes=(cause,), remaining=None)
    text = printed(explained)
    assert ("fault-3: what 3 does" in text, "fault-4" in text) == (True, False)
    assert (more in text, "more (--format" in text) == (True, bool(more))
    assert len(as_json(explained)["causes"][0]["equivalent"]) == count


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        (None, ""),
        ((17,), ", only in layer 17"),
        ((3, 4), ", only in layers 3, 4"),
        ((3, 4, 5), ", only in layers 3 to 5"),
        ((1, 3, 5), ", only in layers 1, 3, 5"),
        ((1, 3, 5, 9), ", only in layers 1, 3, … 9"),
    ],
)
def test_layers_as_text(layers: tuple[int, ...] | None, text: str) -> None:
    """All, one, a stretch, up to three by number, and more by the first two and the last."""
    assert layers_text(layers) == text


@pytest.mark.parametrize(
    ("layers", "text"),
    [((0,), "at least in layer 0"), ((0, 1, 2), "at least in layers 0 to 2"), ((1, 2), "only in layers 1, 2")],
)
def test_a_fault_may_go_on_where_something_is_left_over(layers: tuple[int, ...], text: str) -> None:
    """Whether later layers have a fault of the first ones cannot be seen behind what no cause explains; without that it can."""
    cause = Cause(Named("rope-pairs", {}, layers, "the wrong pairs"), 0.5, 10, 1e-12, "looks", "fix", "seen")
    left = replace(UNEXPLAINED, causes=(cause,))
    assert f"the wrong pairs, {text}" in printed(left)
    assert f"the wrong pairs, {text.replace('at least', 'only')}" in printed(replace(left, remaining=None))


@pytest.mark.parametrize(("ours", "said"), [(0.99e-11, ""), (1.1e-11, ": yours is wrong")])
def test_a_hundred_times_as_far_from_float64_is_wrong(ours: float, said: str) -> None:
    """Up to a hundred times the distance of a right float32 engine nothing is concluded from float64."""
    text = printed(replace(UNEXPLAINED, truth=TruthAt(ours, 1e-13)))
    assert (f"a right float32 engine 1.0e-13{said}" in text, ": yours is" in text) == (True, bool(said))


def test_what_is_left_open_is_neither_wrong_nor_without_a_cause() -> None:
    """A place that a fault or another arithmetic may have made is undecided, in words and in JSON, and float64 calls it coarser."""
    left = replace(UNEXPLAINED, left_open="a fault, or an arithmetic that rounds in another way", truth=TruthAt(1e-6, 1e-13))
    text = printed(left)
    assert "undecided" in text
    assert "a fault, or an arithmetic that rounds in another way" in text
    assert "yours is coarser" in text
    assert ("no cause" in text, as_json(left)["verdict"], bool(left)) == (False, "undecided", False)


def test_lower_arithmetic_is_coarser_and_not_wrong() -> None:
    """An engine that is right in its own arithmetic is further from float64, which is no fault."""
    lower = replace(UNEXPLAINED, remaining=None, precision_only="f16", truth=TruthAt(1e-6, 1e-13))
    assert "yours is coarser" in printed(lower)
    rounded = replace(UNEXPLAINED, law="every element is the right one as F16 arithmetic rounds it", rounds=True)
    assert "yours is coarser" in printed(replace(rounded, truth=TruthAt(1e-6, 1e-13)))


@pytest.mark.parametrize(("complete", "said"), [(True, False), (False, True)])
def test_a_search_that_ran_out_of_time_says_so(complete: bool, said: bool) -> None:
    """Where the budget ended before the search did, the answer tells how to go on."""
    assert ("the budget ran out before everything was tried" in printed(replace(UNEXPLAINED, complete=complete))) is said


@pytest.mark.parametrize(("nmse", "shown"), [(1e-3, 1e-3), (float("inf"), "Infinity")])
def test_json_has_no_infinities(nmse: float, shown: Any) -> None:
    """An infinite error is a text, as JSON has no such number."""
    assert as_json(replace(UNEXPLAINED, first=replace(PLACE, nmse=nmse)))["first_divergence"]["nmse"] == shown
