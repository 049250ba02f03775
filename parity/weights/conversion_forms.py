"""Tensors that converters take apart, join or put in another order: what each becomes in a GGUF, as views that copy nothing.

Mirrors the `modify_tensors` methods of llama.cpp's convert_hf_to_gguf.py.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from .stored import Stored

Array = NDArray[Any]
_INTERLEAVED = frozenset(("gpt-oss",))  # rows of gate and up in turns
_EXPERTS_TURNED = frozenset(("gpt-oss", "llama4", "qwen3vlmoe"))  # keep [experts, in, out]
_GROUPED = frozenset(("falcon", "gptneox", "bloom"))  # keep queries, keys and values of a head, or of a group, side by side
HALVES = "gate and up taken as halves, though this folder keeps their rows in turns"
TURNS = "gate and up taken in turns, though this folder keeps them as halves"
IN_GROUPS = "left in groups: llama.cpp expects all queries, then all keys, then all values"
GROUPED_HEADS = "value heads left beside their key head: llama.cpp expects the first of each key head, then the second"
HALVES_OF_NORM = "in the order of halves: llama.cpp rotates neighbours here, so that a head's norm is permuted as its rows are"
UNSCALED = "without the multiplier that config.json gives, which llama.cpp expects in the weights"


class ConvertedModel(Struct, frozen=True):
    """What forms depend on: the GGUF's architecture, names of its tensors, numbers of heads (queries, keys), and config.json."""

    architecture: str
    held: frozenset[str]
    heads: tuple[int, int]
    config: dict[str, Any]

    def number(self, key: str) -> int:
        """A whole number of config.json, 0 where there is none."""
        value = self.config.get(key)
        return value if isinstance(value, int) else 0

    def scale(self, key: str, index: int | None = None) -> float:
        """A number of config.json, or one of a list; 1 where there is none."""
        value = self.config.get(key)
        if index is not None:
            value = value[index] if isinstance(value, list) and len(value) > index else None
        return float(value) if isinstance(value, (int, float)) else 1.0


class ConvertedForm(Struct, frozen=True):
    """What a GGUF tensor is made of, one part after the other by rows; `mistakes`: what usual errors would have made of it."""

    parts: tuple[Stored, ...]
    mistakes: tuple[tuple[str, tuple[Stored, ...]], ...] = ()


def forms(name: str, to: str, stored: Stored, model: ConvertedModel) -> dict[str, ConvertedForm]:
    """What a tensor of the folder becomes: a form by GGUF name. Empty for one that is stored as it is.

    `to` is the GGUF name that gguf-py's table gives to `name`, "" if it has none.
    """
    layer = re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", name)
    block = f"blk.{layer[1]}." if layer else ""
    for pattern, convert in _FORMS:
        if re.search(pattern, name):
            try:
                converted = convert(name, to, stored, model)
            except (ValueError, IndexError, OverflowError):  # another shape than this form has
                return {}
            return {key if key == to else block + key: form for key, form in converted.items()}
    return {}


def _latent(name: str, to: str, stored: Stored, model: ConvertedModel) -> dict[str, ConvertedForm]:
    """kv_b_proj [heads · (nope + v), rank]: each head's key part, transposed, and its value part."""
    if not any(held.endswith(".attn_k_b.weight") for held in model.held):
        return {}
    nope, rank = model.number("qk_nope_head_dim"), stored.shape[-1]
    heads = stored.array.reshape(model.number("num_attention_heads"), -1, rank)
    keys, values = heads[:, :nope], heads[:, nope:]
    turned = ("each head's key part not transposed", tuple(stored.view(head.reshape(-1)) for head in keys))
    return {
        "attn_k_b.weight": ConvertedForm((stored.view(keys.swapaxes(1, 2)),), (turned,)),
        "attn_v_b.weight": ConvertedForm((stored.view(values),)),
    }


def _gate_and_up(name: str, to: str, stored: Stored, model: ConvertedModel) -> dict[str, ConvertedForm]:
    """Experts' gate and up in one tensor: as halves, or one row of each in turns."""
    bias = name.endswith("bias")
    array = stored.array if bias or model.architecture not in _EXPERTS_TURNED else stored.array.swapaxes(1, 2)
    half = array.shape[1] // 2
    halves, turns = (array[:, :half], array[:, half:]), (array[:, 0::2], array[:, 1::2])
    interleaved = model.architecture in _INTERLEAVED
    right, wrong = (turns, halves) if interleaved else (halves, turns)
    kind = "bias" if bias else "weight"
    mistake = HALVES if interleaved else TURNS
    return {
        f"ffn_{part}_exps.{kind}": ConvertedForm((stored.view(right[i]),), ((mistake, (stored.view(wrong[i]),)),))
        for i, part in enumerate(("gate", "up"))
    }


def _down(name: str, to: str, stored: Stored, model: ConvertedModel) -> dict[str, ConvertedForm]:
    """Experts' down in one tensor."""
    bias = name.endswith("bias")
    turned = not bias and model.architecture in _EXPERTS_TURNED
    array = stored.array.swapaxes(1, 2) if turned else stored.array
    return {f"ffn_down_exps.{'bias' if bias else 'weight'}": ConvertedForm((stored.view(array),))}


def _halves(name: str, to: str, stored: Stored, model: ConvertedModel) -> dict[str, ConvertedForm]:
    """Gate and up, one after the other: [2 · width, in] or [experts, 2 · width, in]."""
    axis = stored.array.ndim - 2
    gate, up = np.split(stored.array, 2, axis=axis)
    kind = "" if name.startswith("transformer.") else "_exps" if axis else "_shexp"
    if kind == "_shexp" and not model.number("num_local_experts"):
        kind = ""
    return {
        f"ffn_gate{kind}.weight": ConvertedForm((stored.view(gate),)),
        f"ffn_up{kind}.weight": ConvertedForm((stored.view(up),)),
    }


def _shared_down(name: str, to: str, stored: Stored, model: ConvertedModel) -> dict[str, ConvertedForm]:
    """The feed-forward part of a layer without experts has the name of the part that experts share."""
    return {} if model.number("num_local_experts") else {"ffn_down.weight": ConvertedForm((stored,))}


def _experts_in_rows(name: str, to: str, stored: Stored, model: ConvertedModel) -> dict[str, ConvertedForm]:
    """DBRX: [experts · width, hidden] each, of which down is transposed."""
    settings = model.config.get("ffn_config")
    number = settings.get("moe_num_experts") if isinstance(settings, dict) else None
    experts = stored.array.reshape(number if isinstance(number, int) else 0, -1, stored.shape[-1])
    kind = {"w1": "gate", "v1": "up", "w2": "down"}[name[-2:]]
    return {f"ffn_{kind}_exps.weight": ConvertedForm((stored.view(experts.swapaxes(1, 2) if kind == "down" else experts),))}


def _correction(name: str, to: str, stored: Stored, model: ConvertedModel) -> dict[str, ConvertedForm]:
    """The bias of experts' choice, whose name in a GGUF ends with .bias."""
    return {"exp_probs_b.bias": ConvertedForm((stored,))}


def _grouped(name: str, to: str, stored: Stored, model: ConvertedModel) -> dict[str, ConvertedForm]:
    """A fused projection in groups (queries, then a key head and a value head): all queries, all keys, all values."""
    many, few = model.heads
    if model.architecture not in _GROUPED or not few or many % few:
        return {}
    group = stored.array.reshape(few, many // few + 2, -1, *stored.shape[1:])
    parts = tuple(stored.view(part) for part in (group[:, :-2], group[:, -2], group[:, -1]))
    return {to: ConvertedForm(parts, ((IN_GROUPS, (stored,)),))} if to else {}


def _queries_to_gates(name: str, to: str, stored: Stored, model: ConvertedModel) -> dict[str, ConvertedForm]:
    """Qwen3-Next's in_proj_qkvz: for each key head its query, key, values and gates."""
    few, many = model.number("linear_num_key_heads"), model.number("linear_num_value_heads")
    key, value = model.number("linear_key_head_dim"), model.number("linear_value_head_dim") * many // max(few, 1)
    heads = stored.array.reshape(few, 2 * key + 2 * value, -1)
    cuts = (slice(0, key), slice(key, 2 * key), slice(2 * key, 2 * key + value))
    fused = ConvertedForm(tuple(stored.view(heads[:, cut]) for cut in cuts))
    return {"attn_qkv.weight": fused, "attn_gate.weight": ConvertedForm((stored.view(heads[:, 2 * key + value :]),))}


def _value_heads(name: str, to: str, stored: Stored, model: ConvertedModel) -> dict[str, ConvertedForm]:
    """Qwen3.5's linear attention: value heads grouped by key head become the first of each group, the second of each, and so on."""
    few, many = model.number("linear_num_key_heads"), model.number("linear_num_value_heads")
    if model.architecture not in ("qwen35", "qwen35moe") or few == many or not few or many % few:
        return {}
    array, before = stored.array, 0
    if ".in_proj_qkv." in name or ".conv1d." in name:
        before = 2 * few * model.number("linear_key_head_dim")
    if ".out_proj." in name:
        tiled = array.reshape(len(array), few, many // few, -1).swapaxes(1, 2)
    else:
        tiled = array[before:].reshape(few, many // few, -1, *array.shape[1:]).swapaxes(0, 1)
    parts = (stored.view(array[:before]), stored.view(tiled)) if before else (stored.view(tiled),)
    return {to: ConvertedForm(parts, ((GROUPED_HEADS, (stored,)),))} if to else {}


def _norm_of_heads(name: str, to: str, stored: Stored, model: ConvertedModel) -> dict[str, ConvertedForm]:
    """Chameleon's norm of queries and keys: the first head's, permuted as rows are, for every head (`_reverse_hf_permute`)."""
    if model.architecture != "chameleon" or not to:
        return {}
    neighbours = stored.array[0].reshape(2, -1).T
    heads = model.heads[".k_norm." in name]
    every = stored.view(np.broadcast_to(neighbours, (heads, *neighbours.shape)))
    return {to: ConvertedForm((every,), ((HALVES_OF_NORM, (stored,)),))}


def _positions(name: str, to: str, stored: Stored, model: ConvertedModel) -> dict[str, ConvertedForm]:
    """RoBERTa's positions begin after the padding token's."""
    if "roberta" not in str(model.config.get("model_type")) and model.config.get("model_type") != "camembert":
        return {}
    first = model.number("pad_token_id") + 1
    shifted = ("begins with the rows of padding, which llama.cpp does not expect", (stored.view(stored.array[:-first]),))
    return {to: ConvertedForm((stored.view(stored.array[first:]),), (shifted,))}


_FALCON_H1 = (
    ("down_proj", (("mlp_multipliers", 1),)),
    ("gate_proj", (("mlp_multipliers", 0),)),
    ("k_proj", (("key_multiplier", None), ("attention_in_multiplier", None))),
    ("q_proj", (("attention_in_multiplier", None),)),
    ("v_proj", (("attention_in_multiplier", None),)),
    ("o_proj", (("attention_out_multiplier", None),)),
    ("out_proj", (("ssm_out_multiplier", None),)),
    ("lm_head", (("lm_head_multiplier", None),)),
    ("embed_tokens", (("embedding_multiplier", None),)),
)


def _maximal_update(name: str, to: str, stored: Stored, model: ConvertedModel) -> dict[str, ConvertedForm]:
    """Jais: scales of embeddings and logits (`JaisModel.__init__` of conversion/jais.py)."""
    if model.architecture != "jais" or not to:
        return {}
    if name == "lm_head.weight":
        alpha, width = model.scale("mup_output_alpha"), model.scale("mup_width_scale")
        factor = alpha * width if "mup_width_scale" in model.config else model.scale("width_scale")
    else:
        factor = model.scale("mup_embeddings_scale" if "mup_embeddings_scale" in model.config else "embeddings_scale")
    return {to: ConvertedForm((replace(stored, factors=(factor,)),), ((UNSCALED, (stored,)),))}


def _multiplied(name: str, to: str, stored: Stored, model: ConvertedModel) -> dict[str, ConvertedForm]:
    """Falcon-H1: multipliers of activations, which converters apply to the weights."""
    if model.architecture != "falcon-h1" or not to:
        return {}
    unscaled = ((UNSCALED, (stored,)),)
    if "in_proj" in name:
        inner, states = model.number("mamba_d_ssm"), model.number("mamba_n_groups") * model.number("mamba_d_state")
        edges = np.cumsum([inner, inner, states, states]).tolist()
        scale = model.scale("ssm_in_multiplier")
        return {
            to: ConvertedForm(
                tuple(
                    replace(stored, array=part, factors=(scale, model.scale("ssm_multipliers", i)))
                    for i, part in enumerate(np.split(stored.array, edges))
                ),
                unscaled,
            )
        }
    keys = next((keys for word, keys in _FALCON_H1 if word in name), ())
    return {to: ConvertedForm((replace(stored, factors=tuple(model.scale(*key) for key in keys)),), unscaled)} if keys else {}


_FORMS: tuple[tuple[str, Callable[[str, str, Stored, ConvertedModel], dict[str, ConvertedForm]]], ...] = (
    (r"\.kv_b_proj\.weight$", _latent),
    (r"\.experts\.gate_up_proj(_bias)?$", _gate_and_up),
    (r"\.experts\.down_proj(_bias)?$", _down),
    (r"\.(input_linear|ffn\.proj_1)\.weight$", _halves),
    (r"\.shared_mlp\.output_linear\.weight$", _shared_down),
    (r"\.ffn\.experts\.mlp\.(w1|v1|w2)$", _experts_in_rows),
    (r"\.e_score_correction_bias$|\.expert_bias$", _correction),
    (r"\.query_key_value\.(weight|bias)$", _grouped),
    (r"\.in_proj_qkvz\.weight$", _queries_to_gates),
    (r"\.linear_attn\.(?!norm)", _value_heads),
    (r"\.[qk]_norm\.(weight|bias)$", _norm_of_heads),
    (r"\.position_embeddings\.weight$|^embeddings\.position_embeddings\.weight$", _positions),
    (r"\bwte\.weight$|^lm_head\.weight$", _maximal_update),
    (r"", _multiplied),
)


def matrices(stored: Stored, columns: int) -> Iterator[Stored]:
    """A view as matrices of `columns` values per row: a tensor of three dimensions is one for each expert or head."""
    array = stored.array
    if array.ndim < 2:
        rows = array.reshape(-1, columns) if columns and array.size % columns == 0 else array.reshape(1, -1)
        yield stored.view(rows)
    elif array.ndim > 2 and int(np.prod(array.shape[1:])) != columns:
        for inner in array:
            yield from matrices(stored.view(inner), columns)
    else:
        yield stored
