"""Every node of llama.cpp's own graphs, computed once more from the operands that it really had."""

from collections.abc import Callable
from pathlib import Path

import pytest
from node_by_node import measured

TOKENS = (100, 107, 114, 121, 128)
LIMIT = 1e-12  # NMSE of one node; docs/operations.md has what each operation reaches
QUICK = ("gpt-oss", "mamba2")  # windows and experts with sinks, states
SLOW = (
    *("deepseek2", "qwen35moe", "rwkv6", "rwkv7", "bert", "t5", "gemma3n", "llama4", "deepseek32", "minicpm3", "kimi-linear"),
    *("phi3-longrope", "grok", "plamo2", "gemma2"),
)


def _proven(model: Path) -> None:
    worst = measured(model, TOKENS, steps=2)
    assert sum(entry.count for entry in worst.values()) > 100
    assert {name: entry for name, entry in worst.items() if entry.error or not entry.nmse <= LIMIT} == {}


@pytest.mark.parametrize("name", QUICK)
def test_every_node_is_computed_as_llama_cpp_computes_it(small_model: Callable[..., Path], name: str) -> None:
    """In a prompt and two decode steps of F32 weights, all nodes are ours to 1e-12."""
    _proven(small_model(name, "f32"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepseek2"])
def test_every_node_of_quantised_weights_too(small_model: Callable[..., Path], name: str) -> None:
    """The same of Q4_K_M weights: products with experts and with stacked matrices round activations as ggml does."""
    _proven(small_model(name, "q4_k_m"))


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_every_node_of_rarer_architectures(small_model: Callable[..., Path], name: str) -> None:
    """The same for architectures with operations of their own, on Q8_0 weights."""
    _proven(small_model(name, "q8_0"))
