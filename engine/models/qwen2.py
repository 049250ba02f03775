"""Qwen2: NEOX RoPE, biases (of Q, K and V) where the file has them. Mirrors llm_build_qwen2 of llama.cpp."""

from ..blocks import Blocks
from ..graph import Step


def steps(blocks: Blocks) -> list[Step]:
    """The ordered steps of a Qwen2 model."""
    result = blocks.embedding()
    for layer in range(blocks.hp.n_layers):
        result += blocks.attention(layer, result[-1].makes, pairs="neox")
        result += blocks.swiglu_feed_forward(layer)
    return result + blocks.head(result[-1].makes)
