"""Groups of steps that architectures share. An architecture's own file combines them and adds its peculiarities."""

from collections.abc import Mapping
from math import inf
from typing import Protocol

from checkpoints.errors import ModelError
from checkpoints.points import in_layer

from . import ops
from .graph import POSITIONS, TOKENS, History, RowsOf, Step
from .weights.gguf_model import Hyperparameters

ROPE_FACTORS = "rope_freqs.weight"


class HasShape(Protocol):
    """A tensor of a file, of which only the shape matters."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Row-major."""


class Blocks:
    """Builds a model's steps, checking that each weight exists and has the shape that the step needs.

    Raises (each method):
        ModelError: a weight is missing or has another shape; the message names it.
    """

    def __init__(self, hyperparameters: Hyperparameters, tensors: Mapping[str, HasShape]) -> None:
        self.hp = hyperparameters
        self.tensors = tensors

    def weight(self, name: str, *shape: int) -> str:
        """A required weight of this shape."""
        if name not in self.tensors:
            raise ModelError(
                f"the model has no tensor {name}.", "Is it really of the architecture that it names? Convert it again."
            )
        if self.tensors[name].shape != shape:
            raise ModelError(
                f"{name} has shape {list(self.tensors[name].shape)}, but the metadata require {list(shape)}.",
                "Metadata and tensors contradict each other: convert the model again.",
            )
        return name

    def optional(self, name: str, *shape: int) -> str | None:
        """A weight that models of this architecture may lack; None if this one does."""
        return self.weight(name, *shape) if name in self.tensors else None

    def embedding(self) -> list[Step]:
        """tokens -> embd."""
        name = self.weight("token_embd.weight", self.hp.n_vocab, self.hp.n_embd)
        return [Step("embd", ops.get_rows, (TOKENS,), (RowsOf(name),))]

    def norm(self, makes: str, reads: str, weight: str) -> Step:
        """RMSNorm with the model's epsilon."""
        if not 0 < self.hp.eps < inf:
            key = f"{self.hp.architecture}.attention.layer_norm_rms_epsilon"
            raise ModelError(f"the metadata have no usable {key}.", "Convert the model again.")
        return Step(makes, ops.rms_norm, (reads,), (self.weight(weight, self.hp.n_embd),), {"eps": self.hp.eps})

    def linear(self, makes: str, reads: str, weight: str, shape: tuple[int, int]) -> Step:
        """A projection of shape (out, in), with a bias if the file has one."""
        bias = self.optional(f"{weight}.bias", shape[0])
        return Step(makes, ops.linear, (reads,), (self.weight(f"{weight}.weight", *shape), bias))

    def rope(self, makes: str, reads: str, heads: int, pairs: str) -> Step:
        """Rotary position embedding; the frequency factors are used if the file has them."""
        hp = self.hp
        factors = self.optional(ROPE_FACTORS, hp.rope_dims // 2)
        params = {"heads": heads, "dims": hp.rope_dims, "base": hp.rope_base, "scale": hp.rope_scale, "pairs": pairs}
        return Step(makes, ops.rope, (reads, POSITIONS), (factors,), params)

    def attention(self, layer: int, reads: str, *, pairs: str) -> list[Step]:
        """Grouped-query attention with RoPE and a KV cache: from the layer's input `reads` to `ffn_inp`."""
        hp = self.hp

        def at(kind: str) -> str:
            return in_layer(layer, kind)

        q_width, k_width, v_width = hp.n_heads * hp.head_size, hp.n_kv_heads * hp.head_size, hp.n_kv_heads * hp.value_size
        heads = {"heads": hp.n_heads, "kv_heads": hp.n_kv_heads}
        return [
            self.norm(at("attn_norm"), reads, at("attn_norm.weight")),
            self.linear(at("q"), at("attn_norm"), at("attn_q"), (q_width, hp.n_embd)),
            self.linear(at("k"), at("attn_norm"), at("attn_k"), (k_width, hp.n_embd)),
            self.linear(at("v"), at("attn_norm"), at("attn_v"), (v_width, hp.n_embd)),
            self.rope(at("q_rope"), at("q"), hp.n_heads, pairs),
            self.rope(at("k_rope"), at("k"), hp.n_kv_heads, pairs),
            Step(at("k_read"), ops.cached, (History(at("k_rope")),)),
            Step(at("v_read"), ops.cached, (History(at("v")),)),
            Step(at("kq"), ops.attention_scores, (at("q_rope"), at("k_read")), (), heads, axis=1),
            Step(
                at("kq_soft_max"),
                ops.causal_soft_max,
                (at("kq"), POSITIONS, History(POSITIONS)),
                (),
                {"scale": hp.head_size**-0.5},
                axis=1,
            ),
            Step(at("kqv_out"), ops.weighted_values, (at("kq_soft_max"), at("v_read")), (), {"kv_heads": hp.n_kv_heads}),
            self.linear(at("attn_out"), at("kqv_out"), at("attn_output"), (hp.n_embd, hp.n_heads * hp.value_size)),
            Step(at("ffn_inp"), ops.add, (at("attn_out"), reads)),
        ]

    def swiglu_feed_forward(self, layer: int) -> list[Step]:
        """Gate, up, SiLU, down and residual: from `ffn_inp` to `l_out`."""
        hp = self.hp

        def at(kind: str) -> str:
            return in_layer(layer, kind)

        return [
            self.norm(at("ffn_norm"), at("ffn_inp"), at("ffn_norm.weight")),
            self.linear(at("ffn_gate"), at("ffn_norm"), at("ffn_gate"), (hp.n_ff, hp.n_embd)),
            self.linear(at("ffn_up"), at("ffn_norm"), at("ffn_up"), (hp.n_ff, hp.n_embd)),
            Step(at("ffn_swiglu"), ops.swiglu, (at("ffn_gate"), at("ffn_up"))),
            self.linear(at("ffn_out"), at("ffn_swiglu"), at("ffn_down"), (hp.n_embd, hp.n_ff)),
            Step(at("l_out"), ops.add, (at("ffn_out"), at("ffn_inp"))),
        ]

    def head(self, reads: str) -> list[Step]:
        """Final norm and output matrix; the embedding is also the output matrix if the file has no other (tied)."""
        hp = self.hp
        own = self.optional("output.weight", hp.n_vocab, hp.n_embd)
        matrix = own or self.weight("token_embd.weight", hp.n_vocab, hp.n_embd)
        return [
            self.norm("output_norm", reads, "output_norm.weight"),
            Step("logits", ops.linear, ("output_norm",), (matrix, self.optional("output.bias", hp.n_vocab))),
        ]
