"""Ten faults in each of twelve architectures: of engines that share no code with ours.

An engine is llama.cpp with a changed file (`changed_files`), or the NumPy engine of `foreign_families`. A case lists the entries of
the catalogue that name it: several if they give the same numbers.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from changed_files import File, permuted, transposed
from foreign_families import Families, lines
from msgspec.structs import replace

from checkpoints.reading.reader import read
from checkpoints.record import Dump, Rows
from reference.client import Reference
from reference.jobs import DumpJob

Change = Callable[[File], None]


@dataclass(frozen=True)
class Case:
    """One fault: a change of the file, or a word that `Families`, the NumPy engine, understands, and the entries that name it."""

    title: str
    how: Change | str
    names: tuple[str, ...]


def number(key: str, value: float) -> Change:
    """Metadata changed."""
    return lambda file: file.set(key, value)


def further(key: str, by: int) -> Change:
    """A count changed."""
    return lambda file: file.set(key, file.number(key) + by)


def each(*endings: str, by: Callable[[np.ndarray], np.ndarray]) -> Change:
    """Tensors changed in all layers that have them."""

    def change(file: File) -> None:
        for ending in endings:
            file.each(ending, by)

    return change


def exchanged(first: str, second: str) -> Change:
    """Two tensors of each layer exchanged."""

    def change(file: File) -> None:
        for left, other in zip(file.named(first), file.named(second), strict=True):
            file.exchange(left, other)

    return change


def layers_exchanged(first: int, second: int) -> Change:
    """All tensors of two layers exchanged."""

    def change(file: File) -> None:
        for name in [name for name in file.tensors if name.startswith(f"blk.{first}.")]:
            file.exchange(name, name.replace(f"blk.{first}.", f"blk.{second}."))

    return change


def permuted_heads(file: File) -> None:
    """Exchange halves and pairs in Q and K, as a converter that permutes them a second time."""
    heads, kv_heads = int(file.number("attention.head_count")), int(file.number("attention.head_count_kv"))
    file.each("attn_q.weight", lambda rows: permuted(rows, heads))
    file.each("attn_k.weight", lambda rows: permuted(rows, kv_heads))


def plus_one(weight: np.ndarray) -> np.ndarray:
    return weight + 1


def ones(weight: np.ndarray) -> np.ndarray:
    return weight * 0 + 1


def zero(weight: np.ndarray) -> np.ndarray:
    return weight * 0


def half(weight: np.ndarray) -> np.ndarray:
    return weight / 2


def next_row(weight: np.ndarray) -> np.ndarray:
    return np.roll(weight, -1, axis=0)


def halves_exchanged(weight: np.ndarray) -> np.ndarray:
    """The two halves of the rows of a matrix, or of each expert's."""
    return np.concatenate(np.split(weight, 2, axis=-2)[::-1], axis=-2)


def in_turn(weight: np.ndarray) -> np.ndarray:
    """Rows of halves laid in turn."""
    first, second = np.split(weight, 2, axis=-2)
    return np.stack([first, second], axis=-2).reshape(weight.shape)


def read_transposed(weight: np.ndarray) -> np.ndarray:
    """The matrix whose memory is read as its transpose."""
    return transposed(weight.reshape(*weight.shape[:-2], weight.shape[-1], weight.shape[-2])).reshape(weight.shape)


def keys_and_values_exchanged(file: File) -> None:
    """The K and V rows of a fused product."""
    size = int(file.number("embedding_length")) // int(file.number("attention.head_count"))
    keys = size * int(file.number("attention.head_count_kv"))

    def change(weight: np.ndarray) -> np.ndarray:
        q, k, v = np.split(weight, [len(weight) - 2 * keys, len(weight) - keys])
        return np.concatenate([q, v, k])

    file.each("attn_qkv.weight", change)


_EPS = Case("ε 1e-3 for 1e-6", number("attention.layer_norm_rms_epsilon", 1e-3), ("norm-epsilon",))
_BASE = Case("RoPE base 500,000", number("rope.freq_base", 5e5), ("rope-base",))
_PERMUTED = Case("rows of Q and K permuted", permuted_heads, ("qk-permuted", "rope-pairs"))
_GATE_UP = Case(
    "ffn_gate and ffn_up exchanged", exchanged("ffn_gate.weight", "ffn_up.weight"), ("gate-up-swapped", "gate-up-split")
)
_MORE = Case("one expert more", further("expert_used_count", 1), ("experts-too-many",))
_FEWER = Case("one expert fewer", further("expert_used_count", -1), ("experts-too-few",))
_PLUS = Case("attn_norm + 1", each("attn_norm.weight", by=plus_one), ("norm-one-plus-weight",))
_HEAD_NORMS = Case(
    "attn_q_norm and attn_k_norm + 1",
    each("attn_q_norm.weight", "attn_k_norm.weight", by=plus_one),
    ("post-norm-one-plus-weight",),
)
_TURNED = Case("attn_output transposed", each("attn_output.weight", by=transposed), ("transposed",))
_MODULO = Case("head h reads key head h % K", "modulo", ("gqa-modulo",))
_PAIRS = Case("the other kind of RoPE's pairs", "pairs", ("rope-pairs", "qk-permuted"))
_NEXT = Case("a position sees the next one", "sees the next", ("mask-shifted",))
_AFTER_ROPE = Case("norm of heads after RoPE", "norm after RoPE", ("head-norm-after-rope",))
_OLD = Case("feed-forward's residual from the layer's input", "old residual", ("residual-old-buffer",))
_CHUNKS = Case("chunks of 4 that don't see each other", "chunks of 4", ("mask-in-chunks",))
_HALF_DOWN = Case("ffn_down halved", each("ffn_down.weight", by=half), ("values-scaled", "multiplier"))
_SWAPPED = Case("layers 1 and 2 exchanged", layers_exchanged(1, 2), ("layers-swapped",))
_HALF_EXPERTS = Case("ffn_down_exps halved", each("ffn_down_exps.weight", by=half), ("values-scaled", "multiplier"))
_EXPERTS_ON = Case(
    "experts one place on",
    each("ffn_gate_exps.weight", "ffn_up_exps.weight", "ffn_down_exps.weight", by=next_row),
    ("experts-order", "router-order"),
)

CASES: dict[str, tuple[Case, ...]] = {
    "qwen3": (
        _EPS, _BASE, _PLUS, _SWAPPED, _PERMUTED, _AFTER_ROPE, _MODULO, _NEXT,
        Case("GELU for SiLU", "gelu for silu", ("activation",)),
        Case("the feed-forward beside attention", "parallel", ("parallel-branches",)),
    ),
    "gemma3": (
        _EPS, _HEAD_NORMS, _GATE_UP, _AFTER_ROPE, _PAIRS, _MODULO,
        Case("window of 9 for 8", further("attention.sliding_window", 1), ("window-off-by-one",)),
        Case("one RoPE base for all layers", "one base", ("rope-base-of-other-layers", "rope-base")),
        Case("branches without their norm", "no post-norm", ("post-norm-missing",)),
        Case(
            "norms of branches + 1", each("post_attention_norm.weight", "post_ffw_norm.weight", by=plus_one), ("post-norm-one-plus-weight",)
        ),
    ),
    "mixtral": (
        _MORE, _FEWER, _HALF_EXPERTS, _OLD,
        Case("the router's rows one place on", each("ffn_gate_inp.weight", by=next_row), ("router-order", "experts-order")),
        Case(
            "gate and up of the experts exchanged",
            exchanged("ffn_gate_exps.weight", "ffn_up_exps.weight"),
            ("gate-up-split", "experts-gate-up-swapped"),
        ),
        Case("down of the experts read as [E, in, out]", each("ffn_down_exps.weight", by=read_transposed), ("experts-layout",)),
        Case("weights of experts not normalised", "not normalised", ("experts-not-normalised",)),
        Case("weights of experts exchanged", "weights exchanged", ("experts-weights-exchanged",)),
        Case("sigmoid for soft max", "sigmoid", ("experts-gating",)),
    ),
    "qwen3moe": (
        _EXPERTS_ON, _MORE, _HALF_EXPERTS, _AFTER_ROPE, _CHUNKS, _SWAPPED,
        Case("attn_norm's weight missing", each("attn_norm.weight", by=ones), ("norm-weight-missing",)),
        Case("weights of experts exchanged", "weights exchanged", ("experts-weights-exchanged",)),
        Case("gate and up read in turn", "gate and up in turn", ("gate-up-split",)),
        Case("norm of heads without weight", each("attn_q_norm.weight", "attn_k_norm.weight", by=ones), ("norm-weight-missing",)),
    ),
    "gpt-oss": (
        _EXPERTS_ON, _MODULO,
        Case("no sinks", each("attn_sinks.weight", by=lambda weight: weight * 0 - 1e30), ("sinks-missing",)),
        Case("sinks of zero", each("attn_sinks.weight", by=zero), ("sinks-missing",)),
        Case("no biases of Q, K, V", each("attn_q.bias", "attn_k.bias", "attn_v.bias", by=zero), ("no-qkv-bias",)),
        Case("RoPE not scaled", number("rope.scaling.factor", 1.0), ("yarn",)),
        Case("window of 7 for 8", further("attention.sliding_window", -1), ("window-off-by-one",)),
        Case("SwiGLU without + 1", "no +1", ("swiglu-clamp",)),
        Case("YaRN without its magnitude", "no magnitude", ("yarn",)),
        Case("YaRN without its ramp", "no ramp", ("yarn",)),
    ),
    "deepseek2": (
        _MORE, _BASE,
        Case("norms of latents + 1", each("attn_kv_a_norm.weight", "attn_q_a_norm.weight", by=plus_one), ("post-norm-one-plus-weight",)),
        Case("the keys' latent without its norm's weight", each("attn_kv_a_norm.weight", by=ones), ("norm-weight-missing",)),
        Case("weights of experts not scaled", number("expert_weights_scale", 1.0), ("experts-scale-missing",)),
        Case("no bias for choosing", each("exp_probs_b.bias", by=zero), ("experts-bias-ignored",)),
        Case("soft max for sigmoid", number("expert_gating_func", 1), ("experts-gating",)),
        Case("attn_k_b one head on", each("attn_k_b.weight", by=next_row), ("latent-absorbed",)),
        Case("attn_v_b read transposed", each("attn_v_b.weight", by=read_transposed), ("latent-absorbed",)),
        Case("no shared expert", each("ffn_down_shexp.weight", by=zero), ("shared-expert-missing",)),
    ),
    "phi3": (
        _EPS, _BASE, _TURNED, _MODULO, _PAIRS, _CHUNKS,
        Case("K and V of the product exchanged", keys_and_values_exchanged, ("fused-qkv-order",)),
        Case("gate and up of the product exchanged", each("ffn_up.weight", by=halves_exchanged), ("gate-up-split",)),
        Case("gate and up in turn", each("ffn_up.weight", by=in_turn), ("gate-up-split",)),
        Case("ffn_norm + 1", each("ffn_norm.weight", by=plus_one), ("norm-one-plus-weight",)),
    ),
    "qwen35": (
        _EPS, _BASE, _GATE_UP, _HEAD_NORMS,
        Case("layers 0 and 1 exchanged", layers_exchanged(0, 1), ("layers-swapped",)),
        Case("taps of the convolution reversed", each("ssm_conv1d.weight", by=lambda weight: weight[..., ::-1]), ("convolution-taps",)),
        Case("no decay", each("ssm_a", by=zero), ("delta-gate-missing",)),
        Case("time steps without bias", each("ssm_dt.bias", by=zero), ("time-step-bias-missing",)),
        Case("ssm_norm + 1", each("ssm_norm.weight", by=plus_one), ("post-norm-one-plus-weight",)),
        Case(
            "taps of the convolution one place on",
            each("ssm_conv1d.weight", by=lambda weight: np.roll(weight, 1, axis=-1)),
            ("convolution-taps",),
        ),
    ),
    "lfm2": (
        _EPS, _BASE, _GATE_UP, _HEAD_NORMS, _TURNED, _HALF_DOWN,
        Case(
            "taps of the convolution reversed", each("shortconv.conv.weight", by=lambda weight: weight[..., ::-1]), ("convolution-taps",)
        ),
        Case(
            "taps of the convolution one place on",
            each("shortconv.conv.weight", by=lambda weight: np.roll(weight, 1, axis=-1)),
            ("convolution-taps",),
        ),
        Case("attn_norm's weight missing", each("attn_norm.weight", by=ones), ("norm-weight-missing",)),
        Case("rows of K permuted", lambda file: file.each("attn_k.weight", partial(permuted, heads=2)), ("qk-permuted", "rope-pairs")),
    ),
    "granite": (
        _EPS, _GATE_UP, _PERMUTED, _MODULO, _OLD, _NEXT,
        Case("residuals not scaled", number("residual_scale", 1.0), ("multiplier",)),
        Case("embeddings not scaled", number("embedding_scale", 1.0), ("multiplier",)),
        Case("logits not scaled", number("logit_scale", 1.0), ("multiplier",)),
        Case("scores scaled by 1/√32", number("attention.scale", 32**-0.5), ("attn-scale",)),
    ),
    "gemma2": (
        _EPS, _BASE, _GATE_UP, _PERMUTED, _SWAPPED, _PLUS,
        Case("attn_norm's weight missing", each("attn_norm.weight", by=ones), ("norm-weight-missing",)),
        Case("window of 9 for 8", further("attention.sliding_window", 1), ("window-off-by-one",)),
        Case("scores capped at 2 for 50", number("attn_logit_softcapping", 2.0), ("attn-softcap", "softcap-value")),
        Case("logits capped at 10 for 30", number("final_logit_softcapping", 10.0), ("logits-softcap", "softcap-value")),
    ),
    "glm4moe": (
        _EPS, _BASE, _MORE, _FEWER, _EXPERTS_ON, _HALF_EXPERTS,
        Case("soft max for sigmoid", number("expert_gating_func", 1), ("experts-gating",)),
        Case("no bias for choosing", each("exp_probs_b.bias", by=zero), ("experts-bias-ignored",)),
        Case("no shared expert", each("ffn_down_shexp.weight", by=zero), ("shared-expert-missing",)),
        Case("weights of experts doubled", number("expert_weights_scale", 2.0), ("multiplier", "experts-scale-missing", "values-scaled")),
    ),
}  # fmt: skip


def dump_of(case: Case, right: Path, tokens: tuple[int, ...], reference: Reference, folder: Path) -> Dump:
    """What an engine with this fault prints at the default points: sixteen values per row, and nothing about itself."""
    out = folder / "foreign.jsonl"
    if isinstance(case.how, str):
        return bare(Families(right, case.how, "f32").run(tokens), out)
    file = File(right)
    case.how(file)
    reference.dump(DumpJob(model=file.write(folder / "changed.gguf"), out=out, tokens=tokens, points="default"))
    dump = read(out)
    return Dump(dump.path, None, {name: stripped(rows) for name, rows in dump.points.items()})


def bare(values: dict[str, np.ndarray], out: Path) -> Dump:
    """The dump of an engine that prints these values."""
    out.write_text("".join(json.dumps(line) + "\n" for line in lines(values)))
    return read(out)


def stripped(rows: Rows) -> Rows:
    """Records without a sketch and statistics."""
    return replace(rows, sketch=None, stats={})


def every() -> Iterator[tuple[str, Case]]:
    """All cases, with the recipe of their model."""
    for recipe, cases in CASES.items():
        yield from ((recipe, case) for case in cases)
