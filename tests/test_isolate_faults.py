"""Faults planted in an engine whose whole values are judged: each is named at its operations and layers, and nothing else."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from isolated_engine import TOKENS, Foreign
from msgspec.structs import replace
from slow import slow_but

from checkpoints.answers.isolate import PROVEN, WRONG, Isolation
from engine.faults import CATALOGUE, plant
from engine.graph import Step
from parity.isolate.isolate import IsolateRequest, isolate
from parity.run.ours import OursJob, dump
from reference.client import Reference

LAYERS = (1, 3)
# fault: the operations that it spoils
KINDS = {
    "rope-pairs": ("q_rope", "k_rope"),
    "rope-base": ("q_rope", "k_rope"),
    "no-qkv-bias": ("q", "k", "v"),
    "norm-epsilon": ("attn_norm", "ffn_norm", "output_norm"),
    "gqa-modulo": ("kq", "kqv_out"),
    "no-causal-mask": ("kq_soft_max",),
    "gate-up-swapped": ("ffn_gate", "ffn_up"),
    "transposed": ("attn_out",),
    "no-final-norm": ("output_norm",),
    "q4k-scale-min": ("q", "k", "v", "attn_out", "ffn_gate", "ffn_up", "ffn_out"),
}
# A value that is another one in both models (each fault's own first value may be right for one of them).
PARAMETERS = {"rope-base": {"base": 500000.0}, "norm-epsilon": {"eps": 1e-4}}
NOT_HERE = {("tiny", "q4k-scale-min"), ("tiny-llama", "q4k-scale-min"), ("tiny-llama", "no-qkv-bias")}  # no such weights
CASES = [(like, fault) for like in ("tiny", "tiny-llama") for fault in KINDS if (like, fault) not in NOT_HERE]


def expected(foreign: Foreign, fault: str, layers: Sequence[int]) -> set[str]:
    """The points that the fault spoils in these layers."""
    tensors = foreign.engine.model.tensors
    names = {f"blk.{layer}.{kind}" for layer in layers for kind in KINDS[fault] if kind != "output_norm"}
    if fault == "q4k-scale-min":  # llama.cpp keeps some matrices of a Q4_K_M file in Q6_K
        weights = {step.makes: str(step.weights[0]) for step in foreign.right if step.makes in names}
        names = {name for name in names if tensors[weights[name]].type == 12}
    return names | ({"output_norm"} if "output_norm" in KINDS[fault] else set())


def named_exactly(foreign: Foreign, isolation: Isolation, wrong: set[str]) -> None:
    assert {item.name for item in isolation.operations if item.status == WRONG} == wrong
    assert {item.name for item in isolation.operations if item.status == PROVEN} == {
        step.makes for step in foreign.right
    } - wrong


@pytest.mark.parametrize(("like", "fault"), CASES)
def test_a_fault_is_named_where_it_is_and_nowhere_else(
    like: str, fault: str, synthetic: Callable[..., Path], tmp_path: Path
) -> None:
    """Planted in two of four layers, exactly its own operations there are wrong, and all the others are proven."""
    foreign = Foreign(synthetic(like, "q8_0", layers=4), tmp_path)
    isolation = foreign.judged(plant(foreign.right, CATALOGUE[fault], LAYERS, **PARAMETERS.get(fault, {})))
    wrong = expected(foreign, fault, LAYERS)
    assert wrong
    named_exactly(foreign, isolation, wrong)
    assert not isolation


def test_swapped_scales_and_mins_are_named_in_q4_k_only(
    synthetic: Callable[..., Path], reference: Reference, tmp_path: Path
) -> None:
    """In a Q4_K_M file exactly the Q4_K products of the faulty layers are wrong, not those that llama.cpp keeps in Q6_K."""
    model = reference.quantize(synthetic(layers=4, width=256, ff=512), "Q4_K_M", tmp_path / "model.gguf")
    foreign = Foreign(model, tmp_path)
    isolation = foreign.judged(plant(foreign.right, CATALOGUE["q4k-scale-min"], LAYERS))
    wrong = expected(foreign, "q4k-scale-min", LAYERS)
    assert wrong
    named_exactly(foreign, isolation, wrong)


@pytest.mark.slow
def test_faults_at_once_are_all_named(stories: Path, tmp_path: Path) -> None:
    """Different faults in different layers of the stories model are all named; after the first nothing is blamed for it."""
    foreign = Foreign(stories, tmp_path)
    steps = plant(foreign.right, CATALOGUE["rope-base"], [2])
    steps = plant(steps, CATALOGUE["no-qkv-bias"], [5])
    steps = plant(steps, CATALOGUE["transposed"], [9])
    steps = plant(steps, CATALOGUE["gate-up-swapped"], [17])
    isolation = foreign.judged(steps)
    wrong = {"blk.2.q_rope", "blk.2.k_rope", "blk.5.q", "blk.5.k", "blk.5.v", "blk.9.attn_out", "blk.17.ffn_gate"}
    named_exactly(foreign, isolation, wrong | {"blk.17.ffn_up"})
    reasons = {item.name: item.reason for item in isolation.wrong}
    assert "read transposed" in reasons["blk.9.attn_out"]
    assert "without blk.5.attn_q.bias" in reasons["blk.5.q"]
    assert reasons["blk.17.ffn_gate"] == "it is the product with blk.17.ffn_up.weight"
    assert reasons["blk.2.q_rope"] == "5 of 6 positions"


@pytest.mark.parametrize(("kind", "first"), [("logits", 7), ("blk.1.ffn_out", 3)])
def test_few_rows_of_a_matrix_are_told_from_rounding(
    kind: str, first: int, synthetic: Callable[..., Path], tmp_path: Path
) -> None:
    """A matrix with two other rows leaves an error as small as rounding's: the rows are named, and said to be 0 where they are. Rounding is
    close everywhere.
    """
    foreign = Foreign(synthetic(layers=2), tmp_path)

    def without_rows(value: np.ndarray) -> np.ndarray:
        value = value.copy()
        value[:, [first, first + 1]] = 0
        return value

    def other_rows(value: np.ndarray) -> np.ndarray:
        value = value.copy()
        value[:, [first, first + 1]] *= np.sin(1e4 * value[:, [first, first + 1]])
        return value

    def rounded(value: np.ndarray) -> np.ndarray:
        return value + np.float32(0.7) * (value.astype(np.float16).astype(np.float32) - value)

    def reason(change: Callable[[np.ndarray], np.ndarray]) -> str:
        steps = [
            replace(step, op=lambda *inputs, op=step.op, **given: change(op(*inputs, **given))) if step.makes == kind else step
            for step in foreign.right
        ]
        (wrong,) = foreign.judged(steps).wrong
        assert wrong.name == kind
        return wrong.reason

    assert "only 2 of " in (found := reason(other_rows)), found
    assert f"outputs are far off ({first}, {first + 1})" in found
    assert reason(without_rows) == f"elements {first} to {first + 1} are 0; the others are right"
    assert reason(rounded).startswith("every element is close: rounding")


@pytest.mark.parametrize("name", ["blk.0.l_out", "blk.1.q", "blk.1.k_rope", "blk.1.v"])
def test_a_record_that_alone_is_wrong_is_suspect_and_its_readers_are_right(
    name: str, synthetic: Callable[..., Path], tmp_path: Path
) -> None:
    """A value that was spoiled in the dump and not in the engine: the record is named, no operation that read the right value."""
    foreign = Foreign(synthetic(layers=3), tmp_path)
    foreign.record("all")
    foreign.spoil(name)
    isolation = isolate(IsolateRequest(foreign.model, dump=foreign.out))
    assert [item.name for item in isolation.wrong] == [name]
    assert isolation.wrong[0].reason.startswith("the record is suspect, not the operation: blk.1.")


@pytest.mark.parametrize("kind", slow_but(("ffn_moe_weights", "ffn_moe_swiglu", "ffn_moe_out", "kq_soft_max"), "ffn_moe_out"))
def test_a_record_of_experts_that_alone_is_wrong_blames_no_reader(
    kind: str, small_model: Callable[..., Path], reference: Reference, tmp_path: Path
) -> None:
    """Nodes outside the vocabulary are judged in the order in which they are computed: a wrong record is known before its readers."""
    foreign = Foreign(small_model("qwen3moe"), tmp_path, reference)
    foreign.record("all")
    foreign.spoil(f"blk.1.{kind}")
    isolation = isolate(IsolateRequest(foreign.model, dump=foreign.out), reference)
    assert [item.name for item in isolation.wrong] == [f"blk.1.{kind}"]
    assert isolation.wrong[0].reason.startswith("the record is suspect, not the operation: blk.1.")
    assert not isolation.findings


def test_scores_that_are_whole_at_the_first_positions_alone_are_judged_there(
    synthetic: Callable[..., Path], tmp_path: Path
) -> None:
    """A dump of leading values holds the scores of early positions whole: those are judged, the others are not known."""
    foreign = Foreign(synthetic(layers=2), tmp_path)
    foreign.engine.steps = foreign.right
    dump(foreign.engine, OursJob(foreign.out, TOKENS, points="all", slice_size=16))
    isolation = isolate(IsolateRequest(foreign.model, dump=foreign.out, windows=False))
    assert not isolation.wrong
    assert {item.name: item.status for item in isolation.operations}["blk.1.kq_soft_max"] == PROVEN


@pytest.mark.parametrize("points", ["embd,blk.*.l_out", "embd,blk.*.l_out,blk.*.attn_norm"])
def test_a_layers_output_that_alone_is_recorded_wrong_spoils_no_other_layer(
    points: str, synthetic: Callable[..., Path], reference: Reference, tmp_path: Path
) -> None:
    """The next layer fits llama.cpp's own output of the layer before: the record is suspect, and what reads it is not blamed."""
    foreign = Foreign(synthetic(layers=3), tmp_path)
    foreign.record(points)
    foreign.spoil("blk.0.l_out")
    isolation = isolate(IsolateRequest(foreign.model, dump=foreign.out), reference)
    assert [item.name for item in isolation.wrong] == ["blk.0.layer"]
    assert isolation.wrong[0].reason.startswith("the record of blk.0.l_out is suspect, not the layer")
    assert {item.name: item.status for item in isolation.operations}["blk.1.layer"] == PROVEN


@pytest.mark.slow
def test_an_epsilon_is_named_in_every_norm(stories: Path, tmp_path: Path) -> None:
    """ε 1e-5 for 1e-6 in all norms of the stories model: all 49 are wrong, also where it is 1e-13 of the output, nothing else."""
    foreign = Foreign(stories, tmp_path)
    isolation = foreign.judged(plant(foreign.right, CATALOGUE["norm-epsilon"], eps=1e-5))
    named_exactly(foreign, isolation, expected(foreign, "norm-epsilon", range(24)))
    assert len(isolation.wrong) == 49


@pytest.mark.slow
@pytest.mark.parametrize("fault", [name for name in KINDS if name not in ("norm-epsilon", "q4k-scale-min")])
def test_each_fault_in_all_layers_of_the_stories_model(stories: Path, tmp_path: Path, fault: str) -> None:
    """Planted in all 24 layers, every spoiled operation is named and every other one proven."""
    foreign = Foreign(stories, tmp_path)
    isolation = foreign.judged(plant(foreign.right, CATALOGUE[fault]))
    named_exactly(foreign, isolation, expected(foreign, fault, range(24)))


def test_a_right_engine_is_proven_everywhere(stories: Path, tmp_path: Path) -> None:
    """Without a fault every operation of the stories model is proven to 1e-12, and attention keeps its laws."""
    foreign = Foreign(stories, tmp_path)
    isolation = foreign.judged(foreign.right)
    assert isolation
    assert isolation.findings == ()
    assert {item.status for item in isolation.operations} == {PROVEN}
    assert max(item.nmse or 0 for item in isolation.operations) < 1e-12


def test_records_with_all_their_values_are_whole_tensors(synthetic: Callable[..., Path], tmp_path: Path) -> None:
    """A JSONL dump whose records carry every value is judged without a tensors file, with the same result."""
    foreign = Foreign(synthetic(layers=4), tmp_path)
    assert foreign.judged(foreign.right, full=False)
    isolation = foreign.judged(plant(foreign.right, CATALOGUE["gqa-modulo"], [2]), full=False)
    named_exactly(foreign, isolation, {"blk.2.kq", "blk.2.kqv_out"})


@pytest.mark.slow
def test_layers_are_judged_by_llama_cpp_where_only_outputs_are_there(synthetic: Callable[..., Path], tmp_path: Path) -> None:
    """With only each layer's output recorded, every wrong layer is named, not only the first."""
    foreign = Foreign(synthetic(layers=4), tmp_path)
    steps = plant(plant(foreign.right, CATALOGUE["rope-base"], [1], base=5e5), CATALOGUE["transposed"], [3])
    isolation = foreign.judged(steps, full=False, points="embd,blk.*.l_out")
    layers = {item.layer: item.status for item in isolation.operations if item.operation == "layer"}
    assert layers == {0: PROVEN, 1: WRONG, 2: PROVEN, 3: WRONG}
    assert foreign.judged(foreign.right, full=False, points="embd,blk.*.l_out")


# What an engine does instead, by the kind of point of mixtral: (the new operation, given the right one, and what is said of it).
EXPERTS = {
    "ffn_moe_topk": (lambda right: lambda *x, **p: (right(*x, **p) + 1) % 8, "it chose"),
    "ffn_moe_weights_norm": (lambda _: lambda weights, _sum, **_p: weights.reshape(len(weights), -1), ""),
    "ffn_moe_probs": (lambda _: lambda logits, **_p: 1 / (1 + np.exp(-logits)), ""),
    "ffn_moe_down": (lambda right: lambda x, ids, w, **p: right(x, ids[:, ::-1], w, **p), ""),
    "ffn_moe_swiglu": (lambda _: lambda gate, up: gate * up / (1 + np.exp(-up)), ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", EXPERTS)
def test_faults_of_experts_are_named(kind: str, small_model: Callable[..., Path], reference: Reference, tmp_path: Path) -> None:
    """Choice, normalising, gating, order and activation of experts: each is named in its layer, and what follows from it is right."""
    foreign = Foreign(small_model("mixtral", "q8_0"), tmp_path, reference)
    alter, reason = EXPERTS[kind]
    point = f"blk.2.{kind}"
    assert point in {step.makes for step in foreign.right}
    steps = [replace(step, op=alter(step.op)) if step.makes == point else step for step in foreign.right]
    isolation = foreign.judged(steps)
    assert [(item.name, item.reason.startswith(reason)) for item in isolation.wrong] == [(point, True)]
    assert {item.status for item in isolation.operations} == {PROVEN, WRONG}


def test_another_order_of_the_same_experts_is_right(
    small_model: Callable[..., Path], reference: Reference, tmp_path: Path
) -> None:
    """An engine that lists the chosen experts the other way round has no fault."""
    foreign = Foreign(small_model("mixtral", "q8_0"), tmp_path, reference)

    def turned(step: Step) -> Step:
        right = step.op
        return replace(step, op=lambda *x, **p: right(*x, **p)[:, ::-1]) if step.makes.endswith("ffn_moe_topk") else step

    assert foreign.judged([turned(step) for step in foreign.right])


@pytest.mark.parametrize("kind", slow_but(["q_nope_absorbed", "kqv_mla"], "kqv_mla"))
def test_no_record_is_held_to_itself(small_model: Callable[..., Path], reference: Reference, tmp_path: Path, kind: str) -> None:
    """A point that shows a value in ggml's order is judged by that value computed anew: MLA's products a thousandth too large are wrong."""
    foreign = Foreign(small_model("deepseek2", layers=2), tmp_path, reference)
    name = f"blk.1.{kind}"

    def larger(op: Callable[..., Any], *inputs: Any, **params: Any) -> Any:
        return op(*inputs, **params) * np.float32(1.001)

    steps = [replace(step, op=partial(larger, step.op)) if step.makes == f"{name}.ggml" else step for step in foreign.right]
    assert steps != list(foreign.right)
    isolation = foreign.judged(steps)
    assert [item.name for item in isolation.wrong] == [name]


@pytest.mark.parametrize("fault", [None, pytest.param("no-final-norm", marks=pytest.mark.slow)])
def test_lines_numbered_from_1_are_no_fault_of_rope(synthetic: Callable[..., Path], tmp_path: Path, fault: str | None) -> None:
    """A dump whose first position is 1 is judged from position 0, where its rotations are right; what is wrong stays wrong."""
    foreign = Foreign(synthetic("tiny"), tmp_path)
    steps = foreign.right if fault is None else plant(foreign.right, CATALOGUE[fault])
    foreign.judged(steps, full=False)
    lines = [json.loads(line) for line in foreign.out.read_text().splitlines()]
    for line in lines:
        if "token_idx" in line:
            line["token_idx"] += 1
    foreign.out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    isolation = isolate(IsolateRequest(foreign.model, tokens=TOKENS, dump=foreign.out))
    assert {operation.operation for operation in isolation.wrong} == (set() if fault is None else {"output_norm"})
    assert isolation.facts["positions"].startswith("moved by -1")
