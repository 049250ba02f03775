"""Engines that share no code with ours: wrong ones are named, right ones accused of nothing. All cases: benchmarks/ten_faults.py."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from changed_files import File
from cli import Cli
from faulty_engines import CASES, Case, bare, dump_of
from foreign_families import HABITS, Families
from msgspec.structs import replace
from planted import PATIENT, tokens_of

from engine.synth.recipes import recipe
from parity.explain.explain import explain
from reference.client import Reference

ENGINE = Path(__file__).with_name("foreign_families.py")
SHOWN = {  # a fault of the file, or of the NumPy engine, for each of the ten
    "qwen3": "norm of heads after RoPE",
    "gemma3": "the other kind of RoPE's pairs",
    "mixtral": "one expert more",
    "qwen3moe": "experts one place on",
    "gpt-oss": "YaRN without its ramp",
    "deepseek2": "attn_k_b one head on",
    "phi3": "K and V of the product exchanged",
    "qwen35": "no decay",
    "lfm2": "taps of the convolution reversed",
    "granite": "residuals not scaled",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWN)
def test_a_foreign_engines_fault_is_named(
    name: str, small_model: Callable[..., Path], reference: Reference, tmp_path: Path
) -> None:
    """From sixteen values per row at the default points, and no word about the engine; one cause, and nothing is left."""
    case = next(case for case in CASES[name] if case.title == SHOWN[name])
    model = small_model(name, kind="f32")
    tokens = tokens_of(model, 16, seed=7)
    explanation = explain(dump_of(case, model, tokens, reference, tmp_path), model, replace(PATIENT, tokens=tokens))
    assert explanation.remaining is None
    assert len(explanation.causes) == 1
    assert {named.fault for named in (explanation.causes[0].named, *explanation.causes[0].equivalent)} & set(case.names)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arithmetic"), [("gemma3", "f32"), ("gpt-oss", "f32"), ("gpt-oss", "bf16"), ("mixtral", "f16")]
)
def test_a_right_foreign_engine_is_not_accused(
    name: str, arithmetic: str, small_model: Callable[..., Path], tmp_path: Path
) -> None:
    """In whatever arithmetic: no cause, and a place that differs is one that the arithmetic explains."""
    model = small_model(name, kind="f32")
    assert recipe(name).architecture in HABITS
    tokens = tokens_of(model, 16, seed=8)
    dump = bare(Families(model, arithmetic=arithmetic).run(tokens), tmp_path / "right.jsonl")
    explanation = explain(dump, model, replace(PATIENT, tokens=tokens))
    assert not explanation.causes
    assert explanation.first is None or explanation.precision_only


@pytest.mark.slow
def test_a_near_tie_of_experts_is_no_fault(small_model: Callable[..., Path], reference: Reference, tmp_path: Path) -> None:
    """Two experts whose scores differ in the last bits: an engine that takes the other one is not accused."""
    file = File(small_model("mixtral", kind="f32"))
    router = file.tensors["blk.1.ffn_gate_inp.weight"]
    router[1] = np.nextafter(router[0], np.float32(np.inf))
    model = file.write(tmp_path / "near.gguf")
    tokens = tokens_of(model, 16, seed=8)
    untouched = Case("right", lambda _file: None, ())
    dumps = [dump_of(untouched, model, tokens, reference, tmp_path)]
    dumps += [bare(Families(model, arithmetic=kind).run(tokens), tmp_path / f"{kind}.jsonl") for kind in ("f32", "f16")]
    for dump in dumps:
        assert not explain(dump, model, replace(PATIENT, tokens=tokens)).causes


@pytest.mark.slow
def test_run_explains_an_engine_that_it_starts(parity: Cli, small_model: Callable[..., Path], tmp_path: Path) -> None:
    """`run --exec` finds the divergence of a NumPy engine, and `explain` names it from that run's dump."""
    model = small_model("qwen3", kind="f32")
    line = f"{sys.executable} {ENGINE} {{model}} {{tokens}} {{out}} modulo"
    ran = parity("run", "--model", str(model), "--tokens", "1,5,9,200,33,7", "--exec", line, "--out", str(tmp_path / "run"))
    assert ran.code == 1
    explained = parity("explain", str(tmp_path / "run" / "ours.jsonl"), "--model", str(model), "--tokens", "1,5,9,200,33,7")
    assert "gqa-modulo" in explained.out
