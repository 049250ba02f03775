"""Changed GGUF files played by llama.cpp: mistakes of a converter, or of an engine that reads one number for another, are named."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from changed_files import File
from faulty_engines import Case, Change, dump_of, each, exchanged, further, number
from msgspec.structs import replace
from planted import PATIENT, tokens_of

from checkpoints.reading.reader import read
from parity.explain.explain import explain
from reference.client import Reference
from reference.jobs import DumpJob


def _by_group(rows: np.ndarray) -> np.ndarray:
    """The rows of four query heads and two key/value heads, fused, laid group by group."""
    heads = rows.reshape(8, -1, rows.shape[1])
    return heads[[0, 1, 4, 6, 2, 3, 5, 7]].reshape(rows.shape)


def _half_of_head_1(matrix: np.ndarray) -> np.ndarray:
    """The output's matrix [D, 4 · 48] with half of what it takes from head 1."""
    return np.concatenate([matrix[:, :48], matrix[:, 48:96] * np.float32(0.5), matrix[:, 96:]], axis=1)


def _expert_2(matrices: np.ndarray) -> np.ndarray:
    """The experts' matrices [E, out, in] with those of expert 2 half as large again."""
    return matrices * np.where(np.arange(len(matrices)) == 2, np.float32(1.5), np.float32(1))[:, None, None]


@dataclass(frozen=True)
class _Named:
    """A changed file of a recipe's model, the entry that names it, and the layers that are wrong (None: all)."""

    recipe: str
    case: Case
    layers: tuple[int, ...] | None = None


def _of_layers(ending: str, first: int, second: int) -> Change:
    """A tensor exchanged between two layers."""
    return lambda file: file.exchange(f"blk.{first}.{ending}", f"blk.{second}.{ending}")


def _every_third(file: File) -> None:
    """Every third layer without a window, where it is every sixth."""
    file.add("attention.sliding_window_pattern", 3)


def _twice_as_many_heads(file: File) -> None:
    """Eight heads and four for keys and values, half as wide, where there are four and two."""
    for count in ("head_count", "head_count_kv"):
        further(f"attention.{count}", 4 if count == "head_count" else 2)(file)


_EPS, _EPS_OF_LAYER_NORM = number("attention.layer_norm_rms_epsilon", 1e-4), number("attention.layer_norm_epsilon", 1e-4)
_SHOWN = (
    _Named("gemma3", Case("ε 1e-4 for 1e-6, after a table of float16", _EPS, ("norm-epsilon",))),
    _Named("deepseek32", Case("ε 1e-4, in a model that chooses keys", _EPS, ("norm-epsilon",))),
    _Named("llama4", Case("ε 1e-4, of norms without a weight, too", _EPS, ("norm-epsilon",))),
    _Named("phimoe", Case("ε 1e-4, of norms with names of their own", _EPS, ("norm-epsilon",))),
    _Named("rwkv7", Case("ε 1e-4, of all norms but the heads' own", _EPS_OF_LAYER_NORM, ("norm-epsilon",))),
    _Named("gemma3", Case("a head's columns of the output product", each("attn_output.weight", by=_half_of_head_1), ("head-multiplier",))),
    _Named("gpt-oss", Case("sinks 1.3 times as large", each("attn_sinks.weight", by=lambda sinks: sinks * 1.3), ("sinks-multiplier",))),
    _Named("gpt-oss", Case("one expert more", further("expert_used_count", 1), ("experts-too-many",))),
    _Named("deepseek2", Case("two experts more", further("expert_used_count", 2), ("experts-too-many",))),
    _Named("olmoe", Case("expert 2 alone, where it is chosen", each("ffn_down_exps.weight", by=_expert_2), ("expert-multiplier",))),
    _Named("gemma3", Case("another base in layers with a window", number("rope.freq_base_swa", 2e4), ("rope-base",)), (0, 1, 2, 3, 4, 6)),
    _Named("gptneox", Case("branches one after the other", number("use_parallel_residual", False), ("sequential-branches",))),
    _Named("phi3", Case("QKV laid by group", each("attn_qkv.weight", by=_by_group), ("fused-qkv-by-group",))),
    _Named("qwen3", Case("norms of heads exchanged", exchanged("attn_q_norm.weight", "attn_k_norm.weight"), ("norms-exchanged",))),
    _Named("qwen35", Case("twice as many dimensions rotated", number("rope.dimension_count", 16), ("rope-dims",))),
    _Named("qwen2-yarn", Case("YaRN of twice the context", number("rope.scaling.original_context_length", 256), ("yarn",))),
    _Named("granite", Case("norms of layers 0 and 1 exchanged", _of_layers("ffn_norm.weight", 0, 1), ("layers-swapped",))),
    _Named("gpt-oss", Case("sinks of layers 1 and 2 exchanged", _of_layers("attn_sinks.weight", 1, 2), ("layers-swapped",))),
    _Named(
        "gemma3",
        Case(
            "norms before and after attention exchanged",
            exchanged("attn_norm.weight", "post_attention_norm.weight"),
            ("norms-exchanged",),
        ),
    ),
    _Named("glm4", Case("query biases × 1.005", each("attn_q.bias", by=lambda bias: bias * np.float32(1.005)), ("bias-multiplier",))),
    _Named("mamba2", Case("decays × 1.1", each("ssm_a", by=lambda decay: decay * np.float32(1.1)), ("decay-multiplier",))),
    _Named("glm4", Case("twice as many heads", _twice_as_many_heads, ("head-count",))),
    _Named("gemma3", Case("every third layer without a window", _every_third, ("window-pattern",))),
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("shown", _SHOWN, ids=lambda shown: f"{shown.recipe}: {shown.case.title}")
def test_a_changed_file_is_named(shown: _Named, small_model: Callable[..., Path], reference: Reference, tmp_path: Path) -> None:
    """From sixteen values per row at the default points, and no word about the engine: one cause, in its layers, and nothing is left."""
    model = small_model(shown.recipe, kind="f32")
    tokens = tokens_of(model, 12, seed=7)
    explanation = explain(dump_of(shown.case, model, tokens, reference, tmp_path), model, replace(PATIENT, tokens=tokens))
    assert explanation.remaining is None
    assert [cause.named.fault for cause in explanation.causes] == list(shown.case.names)
    assert explanation.causes[0].named.layers == shown.layers


@pytest.mark.slow
def test_layers_that_agree_have_no_cause(small_model: Callable[..., Path], reference: Reference, tmp_path: Path) -> None:
    """Of two layers, three apart, whose norms are exchanged, each is named alone: an offset is said of no layer that agrees."""
    model = small_model("gemma3", kind="f32")
    tokens = tokens_of(model, 12, seed=7)
    file = File(model)
    _of_layers("ffn_norm.weight", 1, 4)(file)
    out = tmp_path / "foreign.jsonl"
    reference.dump(DumpJob(model=file.write(tmp_path / "changed.gguf"), out=out, tokens=tokens, points="all"))
    explanation = explain(replace(read(out), header=None), model, replace(PATIENT, tokens=tokens))
    assert explanation.remaining is None
    causes = [(cause.named.fault, cause.named.parameters["by"], cause.named.layers) for cause in explanation.causes]
    assert causes == [("layer-offset", 3, (1,)), ("layer-offset", -3, (4,))]


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "more"), [("deepseek2", 2), ("mixtral", 1)])
def test_more_experts_are_named_where_their_weights_were_recorded(
    small_model: Callable[..., Path], reference: Reference, tmp_path: Path, recipe: str, more: int
) -> None:
    """The sum of the weights is one of more experts, too: no operation in front of it is in question."""
    model, out = small_model(recipe, kind="f32"), tmp_path / "foreign.jsonl"
    tokens = tokens_of(model, 12, seed=7)
    file = File(model)
    further("expert_used_count", more)(file)
    reference.dump(DumpJob(model=file.write(tmp_path / "changed.gguf"), out=out, tokens=tokens, points="all"))
    explanation = explain(replace(read(out), header=None), model, replace(PATIENT, tokens=tokens))
    assert explanation.remaining is None
    assert [(cause.named.fault, cause.named.parameters) for cause in explanation.causes] == [
        ("experts-too-many", {"count": more})
    ]


def _next_norm(file: File) -> None:
    file.tensors["output_norm.weight"][...] = file.tensors["blk.3.ffn_norm.weight"]


def _halves_of_fused_queries(file: File) -> None:
    file.each("attn_qkv.weight", lambda rows: np.concatenate([rows[64:128], rows[:64], rows[128:]]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "change", "law"),
    [
        (
            "qwen3",
            _next_norm,
            "the value is what this operation makes with blk.3.ffn_norm.weight instead of output_norm.weight",
        ),
        ("qwen35", _halves_of_fused_queries, "element i is the right element i + 64 (16 of 256 elements recorded)"),
    ],
)
def test_a_law_says_what_the_records_show(
    small_model: Callable[..., Path], reference: Reference, tmp_path: Path, recipe: str, change: Change, law: str
) -> None:
    """Another norm's weight is named, and sixteen elements from elsewhere are no row that is rolled: two parts may be exchanged."""
    model, out = small_model(recipe, kind="f32"), tmp_path / "foreign.jsonl"
    tokens, file = tokens_of(model, 12, seed=7), File(model)
    change(file)
    reference.dump(DumpJob(model=file.write(tmp_path / "changed.gguf"), out=out, tokens=tokens, points="all"))
    explanation = explain(replace(read(out), header=None), model, replace(PATIENT, tokens=tokens))
    assert explanation.law == law
