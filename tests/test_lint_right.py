"""Lint has no finding on right dumps: our engine's and llama.cpp's, of any type, prompt and set of points."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cli import Cli
from lint_faults import PROMPT, bf16_bits, bf16_of, right_dump, whole_dump
from msgspec.structs import replace
from other_models import write_model

from checkpoints.reading.reader import read
from checkpoints.record import Dump
from engine.backend import choose
from engine.transformer import Transformer
from engine.weights.gguf_model import GgufModel
from parity.lint.lint import lint
from parity.lint.model_facts import ModelFacts, open_model
from parity.run.ours import OursJob, dump
from reference.client import Reference
from reference.jobs import DumpJob


@pytest.fixture(scope="module")
def transformer(stories: Path) -> Transformer:
    return Transformer(GgufModel(stories), choose("numpy"))


@pytest.fixture(scope="module")
def facts(stories: Path) -> ModelFacts:
    return open_model(stories)


@pytest.fixture(scope="module")
def right(transformer: Transformer, tmp_path_factory: pytest.TempPathFactory) -> Dump:
    return right_dump(transformer, tmp_path_factory.mktemp("right") / "ours.jsonl")


@pytest.fixture(scope="module")
def whole(transformer: Transformer, tmp_path_factory: pytest.TempPathFactory) -> Dump:
    return whole_dump(transformer, tmp_path_factory.mktemp("whole") / "ours.jsonl")


def test_a_right_dump_has_no_finding(right: Dump, whole: Dump, facts: ModelFacts) -> None:
    """Every point of a right run, prefill and decode, sliced and whole, is clean, with the model file and without."""
    for source in (right, whole):
        assert lint(source).findings == ()
        assert lint(source, facts).findings == ()


def test_right_values_rounded_to_half_precision_are_not_called_misread(right: Dump) -> None:
    """Activations of an F16 or BF16 engine, printed exactly, are clean."""
    for convert in (lambda x: x.astype(np.float16), lambda x: bf16_of(bf16_bits(x))):
        points = {
            name: replace(rows, values=np.asarray(convert(rows.values), dtype=np.float32), stats={}, sketch=None)
            for name, rows in right.points.items()
        }
        assert lint(replace(right, points=points)).findings == ()


def test_a_prompt_of_one_repeated_token_is_clean(transformer: Transformer, facts: ModelFacts, tmp_path: Path) -> None:
    """Where every token is the same, equal vectors at successive positions are what a right engine computes."""
    out = tmp_path / "same.jsonl"
    dump(transformer, OursJob(out, (410,) * 6, points="all"))
    assert lint(read(out), facts).findings == ()


def test_positions_that_were_asked_for_are_not_missing(transformer: Transformer, tmp_path: Path) -> None:
    """`--positions 0,3,7` and `last` leave gaps in all points alike: no finding."""
    for positions in ((0, 3, 7), "last"):
        out = tmp_path / "some.jsonl"
        dump(transformer, OursJob(out, PROMPT, positions=positions))
        assert lint(read(out)).findings == ()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Q4_0", "BF16"])
def test_quantised_models_of_llama_cpp_are_clean(
    kind: str, quantized: Callable[[str], Path], reference: Reference, tmp_path: Path
) -> None:
    """llama.cpp's own dumps of every node, in the file's own types, with generated tokens, have no finding."""
    model, out = quantized(kind), tmp_path / "ref.jsonl"
    reference.dump(DumpJob(model=model, out=out, tokens=PROMPT, mode="native", points="all", generate=2, threads=1))
    report = lint(read(out), model)
    assert report.findings == ()


@pytest.mark.slow
def test_what_the_sweep_found_stays_clean(
    transformer: Transformer, reference: Reference, stories: Path, tmp_path: Path
) -> None:
    """Logits of ids that never occur beside likely ones, and choices of a near tie that our engine is led along, are right."""
    text = "the cat sat on the mat, the cat sat on the mat, no no no no no no no no no no no no"
    tokens = reference.tokenize(stories, text).ids
    ref, ours = tmp_path / "ref.jsonl", tmp_path / "ours.jsonl"
    job = DumpJob(stories, ref, tokens, mode="native", generate=16, threads=1)
    generated = reference.dump(job).generated
    dump(transformer, OursJob(ours, tokens, generated=generated))
    for path in (ref, ours):
        assert lint(read(path), stories).findings == ()


@pytest.mark.parametrize("arch", ["qwen3", "gemma3"])
def test_architectures_that_our_engine_lacks_are_clean(arch: str, stories: Path, reference: Reference, tmp_path: Path) -> None:
    """Every node of models with norms of their own, scaled embeddings and names outside the vocabulary has no finding."""
    model, out = write_model(tmp_path / f"{arch}.gguf", arch, stories), tmp_path / "ref.jsonl"
    reference.dump(DumpJob(model, out, PROMPT, points="all", generate=4, threads=1))
    assert lint(read(out)).findings == ()
    assert lint(read(out), model).findings == ()


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["gemma3n", "rwkv7"])
def test_shared_caches_and_zero_states_are_right_where_the_model_says_so(
    arch: str, small_model: Callable[..., Path], parity: Cli, tmp_path: Path
) -> None:
    """Layers that read one cache, and states that begin with zeros, are no finding in our own dump of every point."""
    model, out = small_model(arch), tmp_path / "ours.jsonl"
    parity("dump", "ours", "--model", model, "--tokens", "5,9,33,2,18", "--points", "all", "-o", out)
    ran = parity("lint", out, "--model", model)
    assert (ran.code, ran.out.startswith("clean")) == (0, True), ran
