"""`parity isolate` on llama.cpp itself, its options, and what it refuses."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from cli import Cli, refused
from slow import slow_but

from checkpoints.answers.isolate import PROVEN, Isolation
from engine.backend import choose
from engine.faults import CATALOGUE, plant
from engine.graph import Step
from engine.replay.proof import proof_steps
from engine.transformer import Transformer
from engine.weights.gguf_model import GgufModel
from parity.isolate.attention_checks import AttentionChecks, rotation_faults, soft_max_faults
from parity.isolate.elements import Sample, energy_of_scores, sample_product
from parity.isolate.isolate import IsolateRequest, isolate
from parity.isolate.routing import routing_error
from parity.isolate.values import RecordedValue
from parity.run.ours import OursJob, dump
from reference.client import Reference

TOKENS = (1, 403, 407, 261)
ON_STORIES = ("Q8_0", "Q4_K_M")  # llama.cpp takes seconds to make some of the others
OTHERS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K_M", "Q5_K_M", "Q6_K", "IQ4_NL", "IQ4_XS")


def all_proven(isolation: Isolation) -> None:
    assert {item.status for item in isolation.operations} == {PROVEN}
    assert max(item.nmse or 0 for item in isolation.operations) < 1e-12
    assert max(item.sampled or 0 for item in isolation.operations) < 1e-6
    assert isolation.findings == ()


@pytest.mark.parametrize("kind", slow_but(ON_STORIES, "Q8_0"))
def test_every_operation_of_the_stories_model_is_proven(
    kind: str, quantized: Callable[[str], Path], reference: Reference
) -> None:
    """llama.cpp's operations on the file's own types, with an F16 cache, are ours to 1e-12 in all 24 layers."""
    all_proven(isolate(IsolateRequest(quantized(kind), tokens=TOKENS, kv_type="f16"), reference))


@pytest.mark.parametrize("kind", OTHERS)
def test_every_other_type_is_proven(kind: str, synthetic: Callable[..., Path], reference: Reference, tmp_path: Path) -> None:
    """The same for the other types, on two layers of random weights."""
    model = reference.quantize(synthetic(layers=2, width=256, ff=512), kind, tmp_path / "model.gguf")
    all_proven(isolate(IsolateRequest(model, tokens=TOKENS, kv_type="f16"), reference))


@pytest.mark.parametrize("like", ["tiny", "tiny-llama"])
def test_decode_steps_are_proven_too(like: str, synthetic: Callable[..., Path], reference: Reference) -> None:
    """Steps after the prompt are judged with the history that the reference recorded, in both architectures."""
    isolation = isolate(IsolateRequest(synthetic(like, "q8_0"), tokens=TOKENS, kv_type="f16", generate=3), reference)
    assert isolation.passes == 4
    assert {(item.status, item.passes) for item in isolation.operations} == {(PROVEN, 4)}


# Windows with two RoPE bases, experts with sinks and MXFP4, MLA, a state and a convolution, both in one model, LayerNorm.
ARCHITECTURES = ("gemma3", "gpt-oss", "deepseek2", "mamba2", "jamba", "phi2")


@pytest.mark.parametrize("name", slow_but(ARCHITECTURES, "mamba2", "phi2"))
def test_lifted_operations_are_proven(name: str, small_model: Callable[..., Path], reference: Reference) -> None:
    """Every operation of models whose steps are read from llama.cpp's graph, on the file's own types, in decode steps too."""
    isolation = isolate(IsolateRequest(small_model(name, "q8_0"), tokens=TOKENS, kv_type="f16", generate=2), reference)
    all_proven(isolation)
    assert {item.passes for item in isolation.operations} == {3}


@pytest.mark.slow
def test_experts_of_k_quants_are_proven(small_model: Callable[..., Path], reference: Reference) -> None:
    """MUL_MAT_ID of Q4_K and Q6_K experts is proven: activations are rounded in super-blocks of 256, as for any product."""
    isolation = isolate(IsolateRequest(small_model("mixtral", "q4_k_m", width=256, ff=256), tokens=TOKENS), reference)
    all_proven(isolation)
    assert {item.weight for item in isolation.operations if item.operation == "ffn_moe_down"} == {"Q4_K", "Q6_K"}


def test_an_encoder_keeps_nothing_in_a_cache(small_model: Callable[..., Path], reference: Reference) -> None:
    """An encoder's operations are proven whatever the cache's type: its attention reads keys and values as they are."""
    all_proven(isolate(IsolateRequest(small_model("bert", "q8_0"), tokens=TOKENS, kv_type="f16"), reference))


def test_routing_is_judged_as_a_set() -> None:
    """The order of the chosen experts does not matter, a near tie may fall either way, and any other choice is wrong."""
    values = np.array([[0.5, 0.3, 0.2, 0.1], [0.4, 0.3, 0.3, 0.0]], np.float32)
    right = np.array([[0, 1, 2, 3], [0, 1, 2, 3]])
    two = 2
    for theirs in (right, right[:, [1, 0, 3, 2]], right[:, :2]):
        assert routing_error(two, values, right, theirs.astype(np.float32))[0].max() == 0
    tie = np.array([[0, 1, 2, 3], [2, 0, 1, 3]], np.float32)
    errors, note = routing_error(two, values, right, tie)
    assert (errors.max(), note) == (0, "1 near ties fell the other way (margin 0)")
    for wrong, reason in (
        ([0, 2, 1, 3], "it chose 2 (0.2) and not 1 (0.3)"),
        ([0, 0, 1, 2], "it chose 0, 0"),
        ([9, 0, 1, 2], "it chose 9, 0"),
    ):
        errors, note = routing_error(two, values, right, np.array([wrong, [0, 1, 2, 3]], np.float32))
        assert (errors.tolist(), note) == ([np.inf, 0], reason)
    assert "1 were chosen instead of 2" in routing_error(two, values, right, right[:, :1].astype(np.float32))[1]


def unrounded(steps: Sequence[Step], *, native: bool, kv_type: str) -> list[Step]:
    """A definition of the operations that does not round as ggml does."""
    del native
    return proof_steps(steps, native=False, kv_type=kv_type)


def test_operations_without_ggmls_rounding_are_wrong(
    synthetic: Callable[..., Path], reference: Reference, tmp_path: Path
) -> None:
    """The check can fail: without ggml's rounding, products of Q4_K_M are wrong by 1e-6 and more, and only products are."""
    model = reference.quantize(synthetic(layers=2, width=256, ff=512), "Q4_K_M", tmp_path / "model.gguf")
    calibrated: list[bool] = []

    def unrounded_model(steps: Sequence[Step], *, native: bool, kv_type: str) -> list[Step]:
        define = proof_steps if calibrated else unrounded  # the machine's own floor is measured afterwards
        calibrated.append(True)
        return define(steps, native=native, kv_type=kv_type)

    isolation = isolate(IsolateRequest(model, tokens=TOKENS), reference, unrounded_model)
    products = {"q", "k", "v", "attn_out", "ffn_gate", "ffn_up", "ffn_out", "logits"}
    assert {item.operation for item in isolation.wrong} == products
    assert min(item.nmse or 0 for item in isolation.wrong) > 1e-6
    assert isolation.floor is not None
    assert isolation.floor < 1e-12
    assert "rounding" in isolation.wrong[0].reason


@pytest.mark.slow
def test_nothing_is_wrong_under_the_floor_of_this_machine(synthetic: Callable[..., Path], reference: Reference) -> None:
    """Where the embedded model itself shows such errors, an operation is not observable, and the reason says so."""
    isolation = isolate(IsolateRequest(synthetic(kind="q8_0", layers=3), tokens=TOKENS), reference, unrounded)
    assert isolation.wrong == ()
    assert any("embedded model" in item.reason for item in isolation.operations)


def test_the_command_shows_a_table_and_json(parity: Cli, synthetic: Callable[..., Path]) -> None:
    """Text names every operation once; JSON has the contract's keys and the recomputed logits."""
    model = synthetic(layers=3)
    ran = parity("isolate", "--model", model, "--tokens", "1,2,3", "--rows", "5,2047")
    assert ran.code == 0
    assert "ffn_swiglu" in ran.out
    assert "not checked" in ran.out
    code, answer = parity.json("isolate", "--model", model, "--tokens", "1,2,3", "--rows", "5,2047")
    assert code == 0
    assert answer["wrong"] == []
    assert {"operation", "layer", "status", "nmse"} <= answer["operations"][0].keys()
    assert len(answer["operations"]) == 3 + 3 * 19
    assert [(item["row"], item["right"]) for item in answer["elements"]] == [(5, True), (2047, True)]


def foreign_dump(
    model: Path, folder: Path, fault: str | None = None, *, slice_size: int = 1 << 20, points: str = "all"
) -> Path:
    engine = Transformer(GgufModel(model), choose("numpy"))
    if fault is not None:
        engine.steps = plant(engine.steps, CATALOGUE[fault], [1])
    dump(engine, OursJob(folder / "ours.jsonl", TOKENS, points=points, slice_size=slice_size))
    return folder / "ours.jsonl"


@pytest.mark.slow
def test_a_graft_says_whether_the_next_token_changes(parity: Cli, synthetic: Callable[..., Path], tmp_path: Path) -> None:
    """A right hidden state grafted into llama.cpp changes nothing; that of a faulty layer shows as KL, also in the last layer."""
    model = synthetic(layers=3)
    right = foreign_dump(model, tmp_path)
    for point in ("blk.0.l_out", "blk.2.l_out"):
        code, answer = parity.json("isolate", right, "--model", model, "--graft", point)
        assert code == 0
        assert max(item["kl"] for item in answer["graft"]) < 1e-9
    code, answer = parity.json(
        "isolate", foreign_dump(model, tmp_path, "transposed"), "--model", model, "--graft", "blk.1.l_out"
    )
    assert code == 1
    assert answer["wrong"] == ["blk.1.attn_out"]
    assert max(item["kl"] for item in answer["graft"]) > 1e-4


def test_a_wrong_logit_is_told_from_a_right_one(parity: Cli, synthetic: Callable[..., Path], tmp_path: Path) -> None:
    """One garbage logit among right ones is found by its row, and its float64 dot product is shown."""
    model = synthetic(layers=3)
    path = foreign_dump(model, tmp_path)
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        record = json.loads(line)
        if record.get("checkpoint") == "logits" and record["token_idx"] == len(TOKENS) - 1:
            record["values"][44] += 5
            lines[number] = json.dumps(record)
    path.write_text("\n".join(lines))
    code, answer = parity.json("isolate", path, "--model", model, "--rows", "43,44")
    assert code == 1
    assert answer["wrong"] == ["logits"]
    assert [item["right"] for item in answer["elements"]] == [True, False]
    assert answer["elements"][1]["theirs"] - answer["elements"][1]["dot"] == pytest.approx(5, abs=1e-3)


def test_attention_that_breaks_its_laws_is_told() -> None:
    """Each law has its sentence: sums, later positions, uniform weights, weights that never move."""
    positions = np.arange(4)
    right = np.tril(np.random.default_rng(0).random((2, 4, 4))).astype(np.float32)
    right /= right.sum(axis=2, keepdims=True)
    assert soft_max_faults(right, positions) == []
    halves = right.astype(np.float16).astype(np.float32)  # kept in F16: off by 2^-11
    assert "sum to" in soft_max_faults(halves, positions)[0]
    assert soft_max_faults(halves, positions, most=1e-3) == []
    assert "sum to" in soft_max_faults(right * np.float32(0.5), positions)[0]
    assert "causal" in soft_max_faults(np.full((2, 4, 4), 0.25, np.float32), positions)[0]
    uniform = np.tril(np.ones((2, 4, 4), np.float32))
    assert "alike" in soft_max_faults(uniform / uniform.sum(axis=2, keepdims=True), positions)[0]
    repeated = np.zeros((1, 4, 4), np.float32)
    repeated[:, :, 0] = 1
    assert "repeated" in soft_max_faults(repeated, positions)[0]


def test_scores_that_cancel_are_held_to_the_energy_of_their_terms() -> None:
    """A query at a right angle to its only key has a score of almost nothing, and the rounding of its terms; later scores are masked."""
    q, k = np.array([[1.0, 1.0], [1.0, 2.0]]), np.array([[3.0, -3.0], [1.0, 0.0]])
    energy = energy_of_scores(lambda given: (given[0] @ given[1].T)[None], [q, k], np.arange(2))
    assert energy is not None
    np.testing.assert_array_equal(energy, [18.0, 9 + 36 + 1])


def test_rope_that_does_nothing_or_always_the_same_is_told() -> None:
    """Q that RoPE leaves alone, or turns by one angle at every position, is a finding; a real rotation is none."""
    rng = np.random.default_rng(1)
    positions = np.arange(5)
    x = RecordedValue(rng.standard_normal((5, 8)).astype(np.float32), positions)
    assert rotation_faults(x, x) == ["nothing changes under RoPE: it is not applied"]
    turn = np.linalg.qr(rng.standard_normal((8, 8)))[0].astype(np.float32)
    assert "same angle" in rotation_faults(x, RecordedValue(x.data @ turn, positions))[0]
    checks = AttentionChecks({}, {"blk.0.q_rope": "blk.0.q"})
    other = RecordedValue(rng.standard_normal((5, 8)).astype(np.float32), positions)
    list(checks.watch([("blk.0.q", x), ("blk.0.q_rope", other)]))
    assert checks.findings == []
    assert checks.rotations == {"blk.0.q_rope"}


WRONG = {
    "no-such.jsonl": "no-such.jsonl",
    "--rows 99999 --tokens 1,2": "outside the output matrix",
    "--mode exact --kv-type f16 --tokens 1,2": "F32 cache",
    "--graft blk.0.l_out --tokens 1,2": "needs an external engine's dump",
    "--tokens 1,99999999": "outside the vocabulary",
    "--rows x --tokens 1,2": "whole numbers",
    "": "no prompt",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_a_wrong_request_is_one_line(parity: Cli, synthetic: Callable[..., Path], arguments: str) -> None:
    """A request that cannot be judged exits 2 with one line that says why."""
    ran = parity("isolate", "--model", synthetic(layers=3), *arguments.split())
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert WRONG[arguments] in ran.err


def test_a_dump_without_whole_values_is_refused(parity: Cli, synthetic: Callable[..., Path], tmp_path: Path) -> None:
    """Slices prove nothing about an operation: it says so, and what to record."""
    model = synthetic(layers=3)
    path = foreign_dump(model, tmp_path, slice_size=4, points="blk.*.l_out")
    ran = parity("isolate", path, "--model", model)
    assert ran.code == 2
    assert "whole" in ran.err


def test_a_dump_of_another_model_is_refused(parity: Cli, synthetic: Callable[..., Path], tmp_path: Path) -> None:
    """By its name where the dump says which model it is of, else by the shapes of its values."""
    other = synthetic("tiny-llama", layers=2, width=32, ff=64)
    path = foreign_dump(synthetic(layers=3), tmp_path)
    ran = parity("isolate", path, "--model", other)
    assert ran.code == 2
    assert "was made from" in ran.err
    header, *records = path.read_text().splitlines(keepends=True)
    path.write_text("".join([json.dumps(json.loads(header) | {"model": {}}) + "\n", *records]))
    ran = parity("isolate", path, "--model", other)
    assert ran.code == 2
    assert "shape" in ran.err


@pytest.mark.parametrize("shape", [(4,), (3, 64), (4, 60), (2, 4, 4)])
def test_tensors_of_another_shape_are_refused(
    parity: Cli, synthetic: Callable[..., Path], tmp_path: Path, shape: tuple[int, ...]
) -> None:
    """A tensors file whose shapes contradict the dump or the model is one line and exit 2, not a traceback."""
    from safetensors.numpy import load_file, save_file

    model = synthetic(layers=3)
    engine = Transformer(GgufModel(model), choose("numpy"))
    dump(engine, OursJob(tmp_path / "ours.jsonl", TOKENS, points="all", full=True))
    tensors = load_file(tmp_path / "ours.safetensors")
    name = "blk.1.kq_soft_max/0" if len(shape) == 2 else "blk.1.attn_norm/0"
    save_file(tensors | {name: np.zeros(shape, np.float32)}, tmp_path / "ours.safetensors")
    ran = parity("isolate", tmp_path / "ours.jsonl", "--model", model)
    assert (ran.code, ran.err.count("\n")) == (2, 1)


def test_whole_rows_without_their_shape_are_asked_for_it(parity: Cli, tmp_path: Path) -> None:
    """Lines that don't say how long a row is: the refusal names the field that says so."""
    dump = tmp_path / "bare.jsonl"
    dump.write_text('{"checkpoint": "embd", "token_idx": 0, "values": [1, 2]}\n')
    refused(parity("isolate", dump, "--tokens", "5"), '"shape": [width]')


def test_a_sampled_error_is_in_proportion_to_its_operands() -> None:
    """A single element's error is divided by ‖x‖·‖w‖: ten times as large inputs and outputs have the same one."""

    class Weights:
        def raw(self, name: str) -> tuple[np.ndarray, int, tuple[int, ...]]:
            return weight, 0, weight.shape

        def rows(self, name: str, numbers: np.ndarray) -> np.ndarray:
            return weight[numbers]

    x, weight = (np.random.default_rng(seed).standard_normal((4, 32)).astype(np.float32) for seed in (1, 2))
    theirs = x @ weight.T
    theirs[0, 3] += np.float32(0.25)  # a corner, which every sample has
    chosen = Sample.of("blk.0.q", 4, 4)
    error, larger = (
        sample_product(chosen, scale * x, scale * theirs, Weights(), "w", None, native=False)  # type: ignore[arg-type]
        for scale in (np.float32(1), np.float32(16))
    )
    size = np.linalg.norm(x[0].astype(np.float64)) * np.linalg.norm(weight[3].astype(np.float64))
    assert error == pytest.approx(0.25 / size, rel=1e-4)
    assert larger == pytest.approx(error, rel=1e-6)
