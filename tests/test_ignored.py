"""Where llama.cpp computes with another number than the file states, every answer about a side that differs says so."""

from collections.abc import Callable
from pathlib import Path

import pytest
from cli import Cli
from msgspec.structs import replace

from engine.ignored import ignored
from engine.synth.recipe import Value
from engine.weights.gguf_model import GgufModel
from parity.explain.case import ExplainOptions, open_model
from parity.run.ours import OursJob, dump
from reference.client import Reference

TOKENS = (5, 77, 300, 6, 901)
EPSILON = {"attention.layer_norm_rms_epsilon": 1e-2}
SENTENCE = "ε of RMS norms: llama.cpp computes with 0, the file says 0.01 (qwen2vl.attention.layer_norm_rms_epsilon)"


@pytest.mark.parametrize(
    ("name", "key", "stated", "used"),
    [
        ("qwen2vl", "attention.layer_norm_rms_epsilon", 1e-2, (0.0,)),
        ("cogvlm", "rope.freq_base", 5000.0, (10000.0,)),
        ("jina-bert-v2", "attention.max_alibi_bias", 4.0, (8.0,)),
        ("smallthinker", "attention.sliding_window", 5, (4096.0,)),
    ],
)
def test_numbers_that_are_not_read(
    reference: Reference, small_model: Callable[..., Path], name: str, key: str, stated: float, used: tuple[float, ...]
) -> None:
    """ε, RoPE's base, ALiBi and windows that are constants of llama.cpp are found by kind, with both numbers."""
    model = small_model(name, layers=2, settings={key: stated})
    [item] = ignored(reference.graph(model), GgufModel(model).metadata)
    assert (item.key, item.stated, item.used) == (f"{name}.{key}", stated, used)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gemma2", {"attn_logit_softcapping": 7.0, "final_logit_softcapping": 0.0, "attention.sliding_window": 5}),
        ("granite", {"attention.scale": 0.3, "logit_scale": 3.0, "residual_scale": 0.7, "embedding_scale": 5.0}),
        ("llama-yarn", {"rope.scaling.factor": 3.0, "rope.freq_base": 777.0}),
        ("mpt", {"attention.max_alibi_bias": 3.0, "attention.clamp_kqv": 2.5}),
        ("muse-glimmer", {"rope.freq_base": 777.0}),  # its layers without a window do not rotate
    ],
)
def test_numbers_that_are_read(
    reference: Reference, small_model: Callable[..., Path], name: str, settings: dict[str, Value]
) -> None:
    """Caps, scales (also inverted), YaRN's factor, bases, ALiBi and clamps that llama.cpp takes from the file are not accused."""
    model = small_model(name, layers=2, settings=settings)
    assert ignored(reference.graph(model), GgufModel(model).metadata) == ()


@pytest.fixture
def by_the_file(small_model: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """A model whose ε llama.cpp does not read, and the dump of an engine that reads it."""
    model = small_model("qwen2vl", layers=2, settings=EPSILON)
    engine = open_model(model, ExplainOptions(backend="numpy"))
    engine.steps = [
        replace(step, params={**step.params, "eps": 1e-2}) if "eps" in step.params else step for step in engine.steps
    ]
    out = tmp_path / "ours.jsonl"
    dump(engine, OursJob(out, TOKENS, points="all", slice_size=1 << 20))
    return model, out


@pytest.mark.slow
def test_a_right_engine_is_not_called_wrong(parity: Cli, by_the_file: tuple[Path, Path], tmp_path: Path) -> None:
    """`diff --model`, `run --exec`, `isolate`, `explain` and three dumps say the two numbers, and float64 accuses nobody."""
    model, ours = by_the_file
    ref, tokens = tmp_path / "ref.jsonl", ",".join(map(str, TOKENS))
    assert parity("dump", "ref", "--model", model, "--tokens", tokens, "--points", "all", "-o", ref).code == 0
    compared = parity("diff", ours, ref, "--model", model)
    assert compared.code == 1
    assert "computes something else" in compared.out.replace("\n", " ")
    assert "ours is wrong" not in compared.out
    for command in (
        ("diff", ours, ref, "--model", model),
        ("diff", ours, ref, ref, "--model", model),
        (
            "run",
            "--model",
            model,
            "--tokens",
            tokens,
            "--points",
            "all",
            "--exec",
            f"cp {ours} {{out}}",
            "--out",
            tmp_path / "run",
        ),
        ("isolate", ours, "--model", model),
        ("explain", ours, "--model", model),
    ):
        answer = parity(*command)
        assert answer.code == 1, command
        assert SENTENCE in " ".join(answer.out.split()), command


def test_parity_is_not_qualified(parity: Cli, small_model: Callable[..., Path], tmp_path: Path) -> None:
    """Two sides that agree are told nothing of it; `parity model` says it always."""
    model = small_model("qwen2vl", layers=2, settings=EPSILON)
    answer = parity("run", "--model", model, "--tokens", "5,6,7", "--out", tmp_path / "run")
    assert answer.code == 0
    assert "the file says" not in answer.out
    code, facts = parity.json("model", model)
    assert (code, facts["norm_epsilon"]) == (0, 0.01)
    assert facts["not_as_the_file_says"][0].startswith(SENTENCE)


@pytest.mark.slow
def test_steps_written_by_hand_are_checked_too(parity: Cli, small_model: Callable[..., Path], tmp_path: Path) -> None:
    """llama has no soft cap in llama.cpp, whatever the file says: said where sides differ, and by `parity model`."""
    model = small_model("llama3-factors", layers=1, settings={"final_logit_softcapping": 4.0})
    said = "soft cap: llama.cpp computes without, the file says 4 (llama.final_logit_softcapping)"
    engine = open_model(model, ExplainOptions(backend="numpy"))
    assert engine.recorded is None
    engine.steps = [
        replace(step, params={**step.params, "eps": 1e-2}) if "eps" in step.params else step for step in engine.steps
    ]
    ours, ref = tmp_path / "ours.jsonl", tmp_path / "ref.jsonl"
    dump(engine, OursJob(ours, TOKENS, points="all", slice_size=1 << 20))
    assert parity("dump", "ref", "--follow", ours, "--model", model, "-o", ref).code == 0
    for command in (("diff", ours, ref, "--model", model), ("isolate", ours, "--model", model)):
        answer = parity(*command)
        assert answer.code == 1, command
        assert said in " ".join(answer.out.split()), command
    code, facts = parity.json("model", model)
    assert code == 0
    assert facts["not_as_the_file_says"][0].startswith(said)
