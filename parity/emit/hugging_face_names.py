"""What transformers calls the modules of a model, and the points that their inputs and outputs are."""

from typing import Any

# Converters to GGUF permute the rows of Q and K for these, from halves to neighbours (`permute` in convert_hf_to_gguf.py):
# what llama.cpp calls Q and K is then the same numbers in another order. Known, and undone here.
PERMUTED = frozenset(
    (
        "llama",
        "mistral",
        "mixtral",
        "granite",
        "granitemoe",
        "granitemoehybrid",
        "granitemoeshared",
        "smollm3",
        "arcee",
        "minicpm",
        "olmo",
        "internlm2",
        "xverse",
        "baichuan",
    )
)
# One projection has the queries, keys and values of a head, or of the heads that share a key, one after the other.
BY_GROUPS = frozenset(("falcon", "bloom", "gpt_neox"))
ATTENTIONS = (".self_attn", ".attn", ".self_attention", ".attention")
# Module names inside a layer and what their outputs are; `<` names what goes into the module.
_PLAIN = {
    "input_layernorm": "attn_norm",
    "attention_layernorm": "attn_norm",  # Apertus names norms by what they are for
    "feedforward_layernorm": "ffn_norm",
    "feedforward_layernorm<": "ffn_inp",
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.q_norm": "q_norm",
    "self_attn.k_norm": "k_norm",
    "self_attn.o_proj": "attn_out",
    "self_attn.o_proj<": "kqv_out",
    "self_attn.dense": "attn_out",
    "self_attn.dense<": "kqv_out",
    "post_attention_layernorm": "ffn_norm",
    "post_attention_layernorm<": "ffn_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj<": "ffn_swiglu",
    "mlp": "ffn_out",
    "": "l_out",
}
# What routes tokens to experts; where it is, the feed-forward's output is the experts'.
_ROUTERS = ("mlp.gate", "mlp.router", "block_sparse_moe.gate", "block_sparse_moe.router.layer")
_SHARED = ("shared_experts", "shared_expert")
# A norm after the attention and another after the feed-forward, before each is added (Gemma 2 and 3, GLM-4, OLMo 2).
_SANDWICH = {name: kind for name, kind in _PLAIN.items() if name != "post_attention_layernorm<"} | {
    "post_attention_layernorm": "attn_post_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "pre_feedforward_layernorm<": "ffn_inp",
    "post_feedforward_layernorm": "ffn_post_norm",
}
# AFMoE names the same four norms otherwise.
_DUAL = {name: kind for name, kind in _SANDWICH.items() if not name.startswith(("pre_", "post_feedforward"))} | {
    "pre_mlp_layernorm": "ffn_norm",
    "pre_mlp_layernorm<": "ffn_inp",
    "post_mlp_layernorm": "ffn_post_norm",
}
# OLMo 2 and EXAONE 4 have norms after both halves only: what goes into the first one is the attention's output.
_BEHIND = {name: kind for name, kind in _PLAIN.items() if name.rstrip("<") != "post_attention_layernorm"} | {
    "post_attention_layernorm": "attn_post_norm",
    "post_feedforward_layernorm": "ffn_post_norm",
}
# GLM-4 names them by what they follow; its gate and up projections are one module.
_AFTER = _PLAIN | {
    "post_self_attn_layernorm": "post_attn_norm",
    "post_mlp_layernorm": "post_mlp_norm",
    "mlp.gate_up_proj": "ffn_gate_up",
}
# falcon: attention and feed-forward read the same hidden state, each through a norm of its own in the larger models.
_FALCON = {
    "input_layernorm": "attn_norm",
    "ln_attn": "attn_norm_2",
    "ln_mlp": "attn_norm",
    "self_attention.query_key_value": "qkv",
    "self_attention.dense<": "kqv_out",
    "self_attention.dense": "attn_out",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h<": "ffn_gelu",
    "mlp": "ffn_out",
    "": "l_out",
}
# GPT-NeoX: both halves read the same hidden state, or one after the other; its module of the feed-forward adds nothing.
_NEOX = {
    "input_layernorm": "attn_norm",
    "attention.query_key_value": "qkv",
    "attention.dense<": "kqv_out",
    "attention.dense": "attn_out",
    "post_attention_layernorm": "ffn_norm",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h<": "ffn_gelu",
    "mlp": "ffn_out",
    "": "l_out",
}
# BLOOM's feed-forward module adds the hidden state as well: its output is the layer's.
_BLOOM = {
    "input_layernorm": "attn_norm",
    "self_attention.query_key_value": "qkv",
    "self_attention.dense<": "kqv_out",
    "self_attention.dense": "attn_out",
    "post_attention_layernorm": "ffn_norm",
    "post_attention_layernorm<": "ffn_inp",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h<": "ffn_gelu",
    "mlp.dense_4h_to_h": "ffn_out",
    "": "l_out",
}
# gpt2's names; its three projections are one module, and so are falcon's and phi3's.
_GPT2 = {
    "ln_1": "attn_norm",
    "attn.c_attn": "qkv",
    "attn.c_proj<": "kqv_out",
    "attn.c_proj": "attn_out",
    "ln_2<": "ffn_inp",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj<": "ffn_gelu",
    "mlp": "ffn_out",
    "": "l_out",
}
_OUTSIDE = {
    "embed_tokens": "embd",
    "word_embeddings": "embd",
    "wte": "embd",
    "embed_in": "embd",
    "norm": "output_norm",
    "ln_f": "output_norm",
    "norm_f": "output_norm",
    "final_layer_norm": "output_norm",
    "final_layernorm": "output_norm",
}
GATED = ("hidden_act", "hidden_activation")


def names_of(model: Any) -> "dict[str, str]":
    """Module path -> point for every module of the model whose value is known; a path that ends in "<" is a module's input."""
    modules = dict(model.named_modules())
    paths = list(modules)
    layers = [
        name for name in paths if name.rsplit(".", 1)[-1].isdigit() and name.rsplit(".", 2)[-2] in ("layers", "h", "blocks")
    ]
    embedding = next(path for path, module in modules.items() if module is model.get_input_embeddings())
    points = {embedding: "embd"}
    for layer in layers:
        number = layer.rsplit(".", 1)[-1]
        inside = {path.removeprefix(layer).lstrip(".") for path in paths if path == layer or path.startswith(layer + ".")}
        for name, kind in _table(inside).items():
            if name.rstrip("<") in inside:
                points[f"{layer}.{name}" if name else layer] = f"blk.{number}.{kind}"
        if "self_attn.gate_proj" in inside:  # AFMoE: what the projection reads was multiplied by a gate
            points[f"{layer}.self_attn.gate_proj"] = f"blk.{number}.attn_gate_proj"
            points[f"{layer}.self_attn.o_proj<"] = f"blk.{number}.attn_gated"
        points |= _routed(layer, number, inside, modules)
        if "self_attn.qkv_proj" in inside:
            points[f"{layer}.self_attn.qkv_proj"] = f"blk.{number}.qkv"
    for path in paths:
        leaf = path.rsplit(".", 1)[-1]
        if leaf == "word_embeddings_layernorm":  # BLOOM: what the first layer reads, and what llama.cpp calls the embedding
            points[path] = points.pop(embedding)
        elif leaf in _OUTSIDE and not any(path.startswith(layer + ".") for layer in layers):
            points[path] = _OUTSIDE[leaf]
        elif leaf == "drop" and f"{path.removesuffix(leaf)}wpe" in modules:  # positions were added before the first layer
            points[path] = points.pop(embedding)
    return points


def _routed(layer: str, number: str, inside: "set[str]", modules: "dict[str, Any]") -> "dict[str, str]":
    """The points of a layer's router and experts, which take the place of the feed-forward's."""
    points = {}
    for router in _ROUTERS:
        if router in inside:
            experts = router.split(".")[0]
            # gpt-oss's router has a bias, and llama.cpp calls the sum so: it chooses before the soft max.
            biased = getattr(modules[f"{layer}.{router}"], "bias", None) is not None
            points[f"{layer}.{router}"] = f"blk.{number}.{'ffn_moe_probs' if biased else 'ffn_moe_logits'}"
            shared = next((name for name in _SHARED if f"{experts}.{name}" in inside), None)
            if shared is None:
                points[f"{layer}.{experts}"] = f"blk.{number}.ffn_moe_out"
                continue
            points[f"{layer}.{experts}.experts"] = f"blk.{number}.ffn_moe_out"  # the sum of both is the feed-forward's output
            points[f"{layer}.{experts}.{shared}"] = f"blk.{number}.ffn_shexp"
            if f"{experts}.{shared}_gate" in inside:
                points[f"{layer}.{experts}.{shared}_gate"] = f"blk.{number}.ffn_shexp_gate_inp"
    return points


def _table(inside: "set[str]") -> "dict[str, str]":
    """The names of one layer's modules, by which of them it has."""
    if "ln_1" in inside:
        return _GPT2
    if "attention.query_key_value" in inside:
        return _NEOX
    if "mlp.gelu_impl" in inside:
        return _BLOOM
    if "self_attention.query_key_value" in inside:
        return _FALCON
    if "pre_feedforward_layernorm" in inside:
        return _SANDWICH
    if "pre_mlp_layernorm" in inside:
        return _DUAL
    if "post_self_attn_layernorm" in inside:
        return _AFTER
    if "post_feedforward_layernorm" in inside and "input_layernorm" not in inside:
        return _BEHIND
    if "mlp.gate_proj" in inside or "mlp.gate_up_proj" in inside:
        return _PLAIN
    return {name: kind for name, kind in _PLAIN.items() if kind != "ffn_swiglu"}  # another function, without a gate
