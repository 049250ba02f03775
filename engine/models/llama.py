"""Llama (and Mistral): NORM RoPE, biases where the file has them. Mirrors llm_build_llama of llama.cpp."""

from checkpoints.errors import ModelError

from ..blocks import Blocks
from ..graph import Step


def steps(blocks: Blocks) -> list[Step]:
    """The ordered steps of a Llama model.

    Raises:
        ModelError: a mixture of experts, which this list of steps does not have.
    """
    if "blk.0.ffn_gate_inp.weight" in blocks.tensors:
        raise ModelError(
            "the model is a mixture of experts.", "`parity dump ref` and `parity diff` take it, our engine does not."
        )
    result = blocks.embedding()
    for layer in range(blocks.hp.n_layers):
        result += blocks.attention(layer, result[-1].makes, pairs="norm")
        result += blocks.swiglu_feed_forward(layer)
    return result + blocks.head(result[-1].makes)
