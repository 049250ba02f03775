"""`parity model` of architectures that are not written by hand: what the graph says, layer by layer, in words."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli import Cli

from engine.synth.recipes import RECIPES


def layers(parity: Cli, model: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """All facts, and those of the layers by their span."""
    code, facts = parity.json("model", model)
    assert code == 0
    return facts, facts["layers_by_kind"]


@pytest.mark.slow
def test_windows_bases_and_caps(parity: Cli, small_model: Callable[..., Path]) -> None:
    """gemma3: the pattern of windows, both RoPE bases, norms with their widths, the embedding's scale; gemma2: both soft caps."""
    facts, kinds = layers(parity, small_model("gemma3"))
    assert set(kinds) == {"0–4, 6", "5"}
    assert kinds["0–4, 6"]["attention"]["sees"] == "the last 8 positions, itself included"
    assert kinds["5"]["attention"]["sees"] == "all earlier positions"
    assert "base 10000" in kinds["0–4, 6"]["rope"]
    assert "base 1e+06" in kinds["5"]["rope"]
    assert kinds["5"]["after_rope"] == "q_rope, k_rope"
    assert "attn_q_norm over 48" in kinds["5"]["norms"]["RMS, ε 1e-06"]
    assert kinds["5"]["activation"] == "GEGLU of 192"
    assert facts["scales_outside_layers"] == ["embd × 11.3137"]
    facts, kinds = layers(parity, small_model("gemma2", layers=2))
    assert facts["logit_soft_cap"] == 30
    assert kinds["0"]["attention"]["attention_soft_cap"] == 50


@pytest.mark.slow
def test_experts(parity: Cli, small_model: Callable[..., Path]) -> None:
    """deepseek2: one dense layer, then experts with sigmoid gating, a selection bias, a scale and a shared one; only parts of queries and
    keys are rotated; gpt-oss: sinks."""
    _, kinds = layers(parity, small_model("deepseek2", layers=2))
    assert "experts" not in kinds["0"]
    assert kinds["0"]["after_rope"] == "q_pe, k_pe"
    assert kinds["1"]["experts"] == {
        "used": 2, "gating": "sigmoid", "experts": 8, "weights_normalised": True, "weights_scale": 1.5, "selection_bias": True,
        "shared_expert": "without a gate",
    }  # fmt: skip
    _, kinds = layers(parity, small_model("gpt-oss", layers=2))
    assert kinds["0"]["attention"]["attention_sinks"] == "attn_sinks.weight"
    assert kinds["0"]["experts"]["gating"] == "softmax over the chosen"
    assert kinds["0"]["activation"] == "SWIGLU_OAI (α 1.702, limit 7) of 96"
    assert "YaRN from 128 positions, mix 1, β 32 and 1, cos and sin times 1.34657" in kinds["0"]["rope"]


@pytest.mark.slow
def test_an_activation_that_is_squared_is_said(parity: Cli, small_model: Callable[..., Path]) -> None:
    """nemotron: whoever reads RELU writes a ReLU that is not squared."""
    _, kinds = layers(parity, small_model("nemotron", layers=1))
    assert kinds["0"]["activation"] == "RELU, squared"


@pytest.mark.slow
def test_states_and_long_context(parity: Cli, small_model: Callable[..., Path]) -> None:
    """qwen35: convolutions, states and a layer with attention whose RoPE has sections; mamba has no attention at all; longrope;
    falcon-h1's files have RoPE factors that llama.cpp does not read.
    """
    _, kinds = layers(parity, small_model("qwen35"))
    assert kinds["0–2"]["states"]["recurrence"] == "GATED_DELTA_NET, 4 heads, head h takes query and key h mod 2"
    assert kinds["0–2"]["states"]["convolution"] == "4 positions"
    assert kinds["3"]["rope"] == "8 of 32 dimensions, base 10000, interleaved sections 2, 1, 1, 0"
    facts, kinds = layers(parity, small_model("mamba", layers=2))
    assert [(key, value) for key, value in facts.items() if key.startswith("rope")] == [("rope", "none")]
    assert kinds["0–1"]["states"]["recurrence"] == "SSM_SCAN, 256 heads, which share B and C"
    assert "attention" not in kinds["0–1"]
    assert layers(parity, small_model("falcon-h1"))[0]["rope_factors"] is False
    _, kinds = layers(parity, small_model("phi3-longrope", layers=1))
    assert "cos and sin times 1.19, frequency factors rope_factors_long.weight" in kinds["0"]["rope"]


@pytest.mark.slow
def test_encoders(parity: Cli, small_model: Callable[..., Path]) -> None:
    """bert sees every position and ends in pooled rows; t5 has points of its encoder and of its decoder."""
    facts, kinds = layers(parity, small_model("bert", layers=1))
    assert kinds["0"]["attention"]["sees"] == "every position"
    assert list(facts["points"])[-1] == "result_embd_pooled"
    code, facts = parity.json("model", small_model("t5", layers=1))
    assert code == 0
    assert {"enc.blk.0.kqv_out", "blk.0.kqv_out", "logits"} <= set(facts["points"])


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_architecture_is_described(parity: Cli, small_model: Callable[..., Path], name: str) -> None:
    """No architecture is refused, every layer of its graph is in one of the spans, and llama.cpp ignores no number but those known."""
    code, facts = parity.json("model", small_model(name))
    assert code == 0
    assert len(facts["points"]) > 10
    assert ("not_as_the_file_says" in facts) == (name in {"qwen2vl", "smallthinker"})
    if facts.get("steps") == "read from llama.cpp's graph":  # the rest are lists written by hand
        assert facts.get("layers_by_kind") or facts["graph"].startswith("not recorded")


def test_the_epsilon_of_layer_norm(parity: Cli, small_model: Callable[..., Path]) -> None:
    """LayerNorm's ε is read from its own key."""
    code, facts = parity.json("model", small_model("gpt2", layers=1))
    assert (code, facts["norm_epsilon"]) == (0, 1e-5)
    assert "not_as_the_file_says" not in facts
