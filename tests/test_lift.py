"""The lift: a graph becomes steps of the engine, which compute what llama.cpp computes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli import Cli, refused
from msgspec.structs import replace

from checkpoints.errors import ModelError
from checkpoints.graph import MovingParam, RecordedGraph, Size
from engine import ops
from engine.backend import choose
from engine.blocks import Blocks
from engine.graph import Step, View
from engine.lift import lift
from engine.models import steps_of
from engine.transformer import Transformer
from engine.weights.gguf_model import GgufModel
from reference.client import Reference

Make = Callable[..., Path]

# One of each family: what is computed, at prompts of which lengths. Windows are of eight positions.
FAMILIES = ("phi3", "olmo2", "stablelm", "granite", "mistral3", "glm4", "chameleon")
MIXTURES = ("qwen3moe", "gpt-oss", "deepseek2", "llama4", "hy_v4", "minimax-m3")
RECURRENT = ("lfm2", "qwen35", "granitehybrid", "minimax-01", "kimi-k3")


def alike(step: Step) -> Step:
    """A step with its numbers rounded to float32, as ggml's parameters are."""
    params = {key: float(np.float32(value)) if isinstance(value, float) else value for key, value in step.params.items()}
    return replace(step, params=params)


@pytest.mark.parametrize("like", ["tiny", "tiny-llama"])
def test_it_is_the_list_written_by_hand(reference: Reference, synthetic: Make, like: str) -> None:
    """For qwen2 and llama the lifted list equals the one written by hand, step by step and in its order."""
    path = synthetic(like)
    model = GgufModel(path)
    lifted = lift(reference.graph(path))
    written = steps_of(model.hyperparameters.architecture, Blocks(model.hyperparameters, model.tensors))
    assert lifted.single is None
    assert [alike(step) for step in lifted.several] == [alike(step) for step in written]


def verdict(parity: Cli, model: Path, *more: str) -> dict[str, Any]:
    """`parity run` of every point, as data."""
    ran = parity("run", "--model", model, "--points", "all", "--format", "json", "--out", "out", *more)
    assert ran.code == 0, ran.out[:2000] + ran.err
    return dict(ran.json)


def ids(count: int) -> str:
    """Token ids that all differ."""
    return ",".join(str(50 + (37 * i + 11) % 1900) for i in range(count))


@pytest.mark.parametrize(
    "name",
    ["qwen3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mixtral", "mamba", *FAMILIES, *MIXTURES, *RECURRENT))],
)
def test_every_point_agrees(parity: Cli, small_model: Make, name: str) -> None:
    """Prompt and decode steps of lifted models agree with llama.cpp at every point, in exact mode."""
    answer = verdict(parity, small_model(name), "--tokens", ids(5), "--generate", "2")
    assert answer["verdict"] == "parity"
    assert answer["compared"] > 300


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 33])
def test_windows_are_crossed(parity: Cli, small_model: Make, count: int) -> None:
    """A prompt longer than the window of attention, and one of a single token; steps after both."""
    assert verdict(parity, small_model("gpt-oss"), "--tokens", ids(count), "--generate", "3")["verdict"] == "parity"


@pytest.mark.slow
def test_streams_of_one_token(parity: Cli, small_model: Make) -> None:
    """A prompt of one token has several streams, which are no embedding, as one of more tokens has: both sides give them one name."""
    model = small_model("qwen4exp", layers=2)
    assert verdict(parity, model, "--tokens", "61")["verdict"] == "parity"
    assert "hc_init" in parity.json("model", model)[1]["points"]


def test_parameters_that_follow_the_length(reference: Reference, small_model: Make) -> None:
    """minimax-01 multiplies by minus the number of tokens, whatever it is; the recording says so, as data too."""
    recorded = reference.graph(small_model("minimax-01", layers=2))
    assert {moving for tensor in recorded.several.tensors for moving in tensor.moving} == {
        MovingParam(0, Size(0, -1), real=True)
    }
    assert RecordedGraph.from_json(json.loads(json.dumps(recorded.to_json()))) == recorded


@pytest.mark.slow
def test_positions_begin_anywhere(parity: Cli, small_model: Make) -> None:
    """`--first-position` moves positions and windows of a lifted model as it does those of a written one."""
    answer = verdict(parity, small_model("mistral3"), "--tokens", ids(12), "--first-position", "300")
    assert answer["verdict"] == "parity"


def test_a_fused_product_is_views(reference: Reference, small_model: Make) -> None:
    """phi3's queries, keys and values are parts of one product; its gate and up projection are read out of one."""
    steps = {step.makes: step for step in lift(reference.graph(small_model("phi3", layers=1))).several}
    assert [steps[f"blk.0.{kind}"].op for kind in "qkv"] == [ops.part] * 3
    halves = steps["blk.0.ffn_swiglu"].reads
    assert steps["blk.0.ffn_swiglu"].op is ops.swiglu
    assert all(isinstance(half, View) for half in halves)


def test_a_fault_in_the_graph_is_seen(parity: Cli, reference: Reference, small_model: Make) -> None:
    """The comparison can fail: another epsilon of one norm changes the logits."""
    path = small_model("qwen3", layers=1)
    recorded = reference.graph(path)
    right = Transformer(GgufModel(path), choose("numpy"), recorded=recorded)
    wrong = Transformer(GgufModel(path), choose("numpy"), recorded=recorded)
    wrong.steps = [
        replace(step, params={**step.params, "eps": 1e-3}) if step.makes == "blk.0.attn_norm" else step for step in wrong.steps
    ]
    tokens = (5, 6, 7)
    assert not np.allclose(right.forward(tokens, right.start()), wrong.forward(tokens, wrong.start()), rtol=1e-4)


def test_an_operation_that_is_lacking_is_named(reference: Reference, small_model: Make) -> None:
    """One line says the operation, where it stands, and what takes the model all the same."""
    recorded = reference.graph(small_model("qwen3", layers=1))
    tensors = tuple(replace(t, op="FLASH_ATTN_EXT") if t.point == "blk.0.kq" else t for t in recorded.several.tensors)
    with pytest.raises(ModelError, match=r"FLASH_ATTN_EXT at blk\.0\.kq of qwen3") as error:
        lift(replace(recorded, several=replace(recorded.several, tensors=tensors)))
    assert "parity dump ref" in error.value.advice


@pytest.mark.slow
def test_layers_that_are_computed_twice_are_refused(reference: Reference, small_model: Make) -> None:
    """Where a pass goes through the same layers again, a point is made from itself; the message names it."""
    recorded = reference.graph(small_model("qwen3", layers=2))
    again = tuple(replace(tensor, point=tensor.point.replace("blk.1.", "blk.0.")) for tensor in recorded.several.tensors)
    with pytest.raises(ModelError, match=r"more than once in a pass: blk\.0\.\w+ is made from itself"):
        lift(replace(recorded, several=replace(recorded.several, tensors=again)))


@pytest.mark.slow
def test_a_model_of_which_llama_cpp_makes_nan_is_refused(parity: Cli, small_model: Make) -> None:
    """A soft cap of 0 is one line, since llama.cpp divides by it: no operation of its own is called wrong, and no engine diverges."""
    path = small_model("gemma2", layers=1, settings={"attn_logit_softcapping": 0.0})
    for command in ("run", "isolate"):
        refused(parity(command, "--model", path, "--tokens", "5,6"), "SCALE", "multiplies by inf", "a soft cap of 0")
    assert parity("weights", "--model", path).code == 0


def test_views_stay_inside_their_value() -> None:
    """A view that reaches beyond its value, as a damaged recording may have it, is an error and no read of other memory."""
    from checkpoints.graph import Size

    t = Size(0, 1)
    view = View("x", (t, Size(4)), (t, Size(2)), (Size(4), Size(1)), Size(3))
    with pytest.raises(ValueError, match="beyond"):
        view.apply(np.zeros((3, 4), np.float32))
    inside = replace(view, offset=Size(2))
    np.testing.assert_array_equal(inside.apply(np.arange(8, dtype=np.float32).reshape(2, 4)), [[2, 3], [6, 7]])


@pytest.mark.slow
def test_an_encoder_sees_both_ways(parity: Cli, small_model: Make) -> None:
    """Encoders have no cache: attention over the whole prompt and the pooled embedding agree."""
    assert verdict(parity, small_model("nomic-bert"), "--tokens", ids(21))["verdict"] == "parity"


@pytest.mark.slow
def test_an_encoder_decoder(parity: Cli, small_model: Make) -> None:
    """t5: the encoder's pass, the decoder's over its cache and the encoder's rows, and tokens generated agree at every point."""
    answer = verdict(parity, small_model("t5"), "--tokens", ids(11), "--generate", "3")
    assert answer["verdict"] == "parity"
    assert {"enc.blk.0.kq_soft_max", "blk.0.cross_kq_soft_max", "blk.0.kq_b"} <= {
        point["checkpoint"] for point in answer["points"]
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepseek32", "glm-dsa"])
def test_sparse_attention(parity: Cli, small_model: Make, name: str) -> None:
    """An indexer chooses eight of the cached positions, also where scores that a ReLU made 0 tie; of fewer it takes all."""
    model = small_model(name, layers=2)
    assert verdict(parity, model, "--tokens", ids(33), "--generate", "2")["verdict"] == "parity"
    assert verdict(parity, model, "--tokens", ids(5))["verdict"] == "parity"


@pytest.mark.slow
def test_a_choice_that_was_not_seen_is_refused(parity: Cli, small_model: Make) -> None:
    """Where sparse attention takes everything that was cached when the graph was recorded, longer prompts are refused."""
    model = small_model("deepseek32", layers=2, context=4096, settings={"attention.indexer.top_k": 600})
    assert verdict(parity, model, "--tokens", ids(12))["verdict"] == "parity"
    refused(parity("run", "--model", model, "--tokens", ids(513)), "only 512 positions were")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3", "bert"])
def test_gelu_of_a_table_is_no_divergence(parity: Cli, small_model: Make, name: str) -> None:
    """ggml looks GELU up in a table of F16: where an argument falls on a step of it, float64 says how coarse the reference is there."""
    answer = verdict(parity, small_model(name), "--tokens", ids(33))
    assert answer["verdict"] == "parity"
    assert any("from float64" in note for note in answer["notes"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen35", "gemma3"])
def test_other_portions_come_out_the_same(parity: Cli, small_model: Make, name: str) -> None:
    """States, windows and GELU's table: chunks and single tokens give what one pass gives."""
    ran = parity("consistency", "--model", small_model(name), "--tokens", ids(9))
    assert ran.code == 0, ran.out
