"""Records that alone are wrong, judged by `isolate`: what the engine computed is right, and none of its operations is blamed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from changed_files import File
from isolated_engine import Foreign
from msgspec.structs import replace
from planted import Faulty, Planted, tokens_of
from safetensors.numpy import load_file, save_file

from checkpoints.answers.isolate import NOT_OBSERVABLE, PROVEN, Isolation
from checkpoints.jsonl import write
from parity.diff.readings.rounding import beyond_rounding, type_of
from parity.isolate.isolate import IsolateRequest, isolate
from parity.isolate.routing import other_order
from reference.client import Reference
from reference.jobs import DumpJob

Change = Callable[[np.ndarray], np.ndarray]


@pytest.fixture
def experts(small_model: Callable[..., Path], reference: Reference, tmp_path: Path) -> Foreign:
    return Foreign(small_model("qwen3moe"), tmp_path, reference)


def half(value: Any) -> Any:
    return value.astype(np.float16).astype(np.float32) if value.dtype == np.float32 else value


def judged(foreign: Foreign, chosen: Callable[[str], bool], change: Change, reference: Reference) -> Isolation:
    """The judgement of a right engine whose records of some points were changed after the fact."""
    foreign.record("all")
    file = foreign.out.with_suffix(".safetensors")
    tensors = load_file(file)
    save_file({name: change(data.copy()) if chosen(name.rpartition("/")[0]) else data for name, data in tensors.items()}, file)
    return isolate(IsolateRequest(foreign.model, dump=foreign.out), reference)


def statuses(isolation: Isolation, layer: int) -> dict[str, str]:
    return {item.operation: item.status for item in isolation.operations if item.layer == layer}


def test_a_layer_that_is_recorded_in_half_precision_is_right(experts: Foreign, reference: Reference) -> None:
    """What reads the rounded records read the values before they were rounded: nothing is blamed, nor what the weights sum to."""
    isolation = judged(experts, lambda name: name.startswith("blk.1."), half, reference)
    assert isolation
    reasons = {item.name: item.reason for item in isolation.operations}
    for name, reader in (("q_norm", "blk.1.q_rope"), ("l_out", "blk.2.attn_norm")):
        assert reasons[f"blk.1.{name}"].startswith(f"recorded rounded to F16: {reader}"), reasons[f"blk.1.{name}"]


def test_a_dump_in_half_precision_is_right_as_far_as_it_shows(experts: Foreign, reference: Reference) -> None:
    """All records rounded: nothing is made from the logits, so that they are as the other records are, and not observable."""
    isolation = judged(experts, lambda _: True, half, reference)
    assert isolation
    (logits,) = [item for item in isolation.operations if item.operation == "logits"]
    assert logits.status == NOT_OBSERVABLE
    assert logits.reason.startswith("the right value rounded to F16, as the records of others are")


@pytest.mark.slow
def test_scores_of_one_head_are_whole_rows(small_model: Callable[..., Path], reference: Reference, tmp_path: Path) -> None:
    """A right engine's lines of the scores that choose keys, which have no axis of heads: read, and none of its operations blamed."""
    foreign = Foreign(small_model("deepseek32"), tmp_path, reference)
    isolation = foreign.judged(foreign.right, full=False)
    assert isolation
    assert statuses(isolation, 1)["indexer_score"] == PROVEN


@pytest.mark.slow
def test_layers_that_llama_cpp_cannot_run_alone_are_not_observable(
    small_model: Callable[..., Path], reference: Reference, tmp_path: Path
) -> None:
    """llama.cpp ends its process when GLM4-MoE is given a hidden state: no answer on those layers, and no error of the request."""
    foreign = Foreign(small_model("glm4moe"), tmp_path, reference)
    isolation = foreign.judged(foreign.right, full=False, points="embd,blk.*.l_out")
    assert {statuses(isolation, layer)["layer"] for layer in (1, 2)} == {NOT_OBSERVABLE}


def test_a_layer_that_is_computed_in_half_precision_is_wrong(experts: Foreign, reference: Reference) -> None:
    """The next layer reads the rounded values themselves: this engine does not compute in float32, and says that it does."""
    steps = [
        replace(step, op=lambda *x, op=step.op, **p: half(op(*x, **p)))
        if step.makes.startswith("blk.1.") and not step.inner
        else step
        for step in experts.right
    ]
    isolation = experts.judged(steps)
    assert not isolation
    reasons = {item.name: item.reason for item in isolation.wrong}
    assert reasons["blk.1.attn_norm"] == "the right value rounded to F16: stored or computed in that type"
    assert all(name.startswith("blk.1.") for name in reasons)


@pytest.mark.parametrize("kind", ["v", "k_rope", "ffn_moe_logits", "ffn_norm"])
def test_nan_in_a_record_alone_blames_no_operation(kind: str, experts: Foreign, reference: Reference) -> None:
    """One NaN that no reader has: the record is suspect, and its readers are proven by the right value."""

    def spoilt(value: np.ndarray) -> np.ndarray:
        value[2].reshape(-1)[1] = np.nan
        return value

    isolation = judged(experts, lambda name: name == f"blk.1.{kind}", spoilt, reference)
    assert [item.name for item in isolation.wrong] == [f"blk.1.{kind}"]
    assert isolation.wrong[0].reason.startswith("the record is suspect, not the operation")
    others = statuses(isolation, 1)
    del others[kind]
    assert set(others.values()) == {PROVEN}


@pytest.mark.parametrize("kind", ["k_read", "v_read"])
def test_a_record_of_the_cache_that_contradicts_a_later_one(
    kind: str, small_model: Callable[..., Path], reference: Reference, tmp_path: Path
) -> None:
    """One element of what the cache gave an earlier position, which the last position's record has, too: that record is suspect, alone."""
    model = small_model("qwen3", kind="f32")
    engine, tokens = Faulty(model, reference.graph(model)), tokens_of(model, 6, seed=1)
    dump = engine.dump(Planted(()), tokens, points="all", size=1 << 20, bare=False)
    assert dump.header is not None
    rows = dump.points[f"blk.1.{kind}"]
    values = rows.values.copy()
    values[2, 5] *= np.float32(1.01)
    header = replace(dump.header, source="an engine", compute="f32", mode="exact")
    edited = replace(rows, values=values, stats={}, sketch=None)
    write(replace(dump, header=header, points={**dump.points, rows.point: edited}), tmp_path / "ours.jsonl", header)
    isolation = isolate(IsolateRequest(model, tokens=tokens, dump=tmp_path / "ours.jsonl"), reference)
    assert [item.name for item in isolation.wrong] == [f"blk.1.{kind}"]
    assert isolation.wrong[0].reason.startswith("the record is suspect, not the operation")


@pytest.mark.parametrize("kind", ["q", "attn_norm", "ffn_moe_up"])
def test_infinity_in_a_record_alone_blames_no_operation(kind: str, experts: Foreign, reference: Reference) -> None:
    """The same of an infinity, in a product and in a norm: what it looks like is looked for without a warning."""

    def spoilt(value: np.ndarray) -> np.ndarray:
        value[1].reshape(-1)[0] = -np.inf
        return value

    isolation = judged(experts, lambda name: name == f"blk.1.{kind}", spoilt, reference)
    assert [item.name for item in isolation.wrong] == [f"blk.1.{kind}"]
    assert "the record is suspect" in isolation.wrong[0].reason


def test_experts_that_are_recorded_in_another_order_are_right(experts: Foreign, reference: Reference) -> None:
    """Every reader had the experts in one order, and the record another one: neither the choice nor a reader is blamed."""
    isolation = judged(experts, lambda name: name == "blk.1.ffn_moe_topk", lambda value: value[:, ::-1].copy(), reference)
    assert isolation
    (choice,) = [item for item in isolation.operations if item.name == "blk.1.ffn_moe_topk"]
    assert choice.reason.startswith("recorded in another order than blk.1.ffn_moe")


def test_weights_in_another_order_than_the_experts_are_wrong(experts: Foreign, reference: Reference) -> None:
    """Readers that disagree on the order of the experts: the one that is alone is wrong, whatever was recorded."""
    steps = [
        replace(step, op=lambda *x, op=step.op, **p: op(*x, **p)[..., ::-1, :].copy())
        if step.makes == "blk.1.ffn_moe_weights"
        else step
        for step in experts.right
    ]
    isolation = experts.judged(steps)
    assert [item.name for item in isolation.wrong] == ["blk.1.ffn_moe_weights"]


def test_places_that_nothing_has_are_no_error_of_the_request(experts: Foreign, reference: Reference) -> None:
    """A choice of experts that was recorded as NaN: the record is suspect; it was an unusable dump before."""

    def spoilt(value: np.ndarray) -> np.ndarray:
        value = value.astype(np.float32)
        value[3] = np.nan
        return value

    isolation = judged(experts, lambda name: name == "blk.2.ffn_moe_topk", spoilt, reference)
    assert [item.name for item in isolation.wrong] == ["blk.2.ffn_moe_topk"]
    assert "the record is suspect" in isolation.wrong[0].reason


@pytest.mark.slow
def test_fewer_experts_than_the_model_has_are_a_wrong_choice(
    small_model: Callable[..., Path], reference: Reference, tmp_path: Path
) -> None:
    """llama.cpp with one expert for two: the choice is wrong in every layer, and what has other shapes after it is not judged.

    It was an unusable dump before, as of another model.
    """
    model, dump = small_model("jamba", "f32"), tmp_path / "one.jsonl"
    changed = File(model)
    changed.set("expert_used_count", 1)
    tokens = tokens_of(model, 6, 1)
    reference.dump(DumpJob(changed.write(tmp_path / "one.gguf"), dump, tokens, points="all", slice_size=None))
    lines = dump.read_text().splitlines()
    header = json.loads(lines[0]) | {"source": "an engine", "model": None, "hparams": None, "dataflow": None}
    dump.write_text("\n".join([json.dumps(header), *lines[1:]]) + "\n")
    isolation = isolate(IsolateRequest(model, dump=dump, tokens=tokens), reference)
    assert {item.operation for item in isolation.wrong} == {"ffn_moe_topk"}
    assert all("1 were chosen instead of 2" in item.reason for item in isolation.wrong)


def test_types_are_told_from_simple_numbers() -> None:
    """The lowest type that has all values, what lies beyond its rounding, and no type for ones and halves, which every type has."""
    x = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)
    assert type_of(x) == ""
    assert type_of(half(x)) == "F16"
    assert type_of(np.array([1, 0.5, 3, 0, -2, 1.5, 4, 8], dtype=np.float32)) == ""
    assert not (beyond_rounding(x, half(x), "F16") - half(x)).any()
    far = beyond_rounding(x + np.float32(0.01), half(x), "F16") - half(x)
    np.testing.assert_allclose(far, 0.01, atol=2e-3)


def test_the_other_order_of_a_choice() -> None:
    """Descending where the record is not, the reverse where it is, and untouched where another choice was made."""
    ours = np.array([[4, 1, 0, 2], [4, 1, 0, 2], [4, 1, 0, 2]])
    dumped = np.array([[1, 4, 0, 2], [4, 1, 0, 2], [3, 1, 0, 2]], dtype=np.float32)
    assert other_order(2, ours, dumped).tolist() == [[4, 1, 0, 2], [1, 4, 0, 2], [3, 1, 0, 2]]
