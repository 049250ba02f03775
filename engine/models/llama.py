"""Llama (and Mistral): NORM RoPE, biases where the file has them. Mirrors llm_build_llama of llama.cpp."""

from ..blocks import Blocks
from ..graph import Step


def steps(blocks: Blocks) -> list[Step]:
    """The ordered steps of a Llama model."""
    result = blocks.embedding()
    for layer in range(blocks.hp.n_layers):
        result += blocks.attention(layer, result[-1].makes, pairs="norm")
        result += blocks.swiglu_feed_forward(layer)
    return result + blocks.head(result[-1].makes)
