"""Every command that takes a dump takes it in every format, under foreign names and counted from anywhere."""

import json
from pathlib import Path

import numpy as np
import pytest
from cli import Cli

from checkpoints.reading.reader import read
from engine.backend import choose
from engine.faults import CATALOGUE, plant
from engine.transformer import Transformer
from engine.weights.gguf_model import GgufModel
from parity.run.ours import OursJob, dump

TOKENS = (2047, 430, 457, 258, 403)
IDS = ",".join(map(str, TOKENS))
ODD = np.random.default_rng(1).standard_normal((5, 8)).astype(np.float32)


def arrays(stories: Path, fault: str | None = None) -> dict[str, np.ndarray]:
    """Whole rows of our engine under an engine's own names, right or with a fault of the catalogue."""
    transformer = Transformer(GgufModel(stories), choose("numpy"))
    if fault is not None:
        transformer.steps = plant(transformer.steps, CATALOGUE[fault], None)
    dump(
        transformer,
        OursJob(Path("whole.jsonl"), TOKENS, points="embd,blk.{0,5,23}.l_out,output_norm,logits", slice_size=1 << 20),
    )
    points = read("whole.jsonl").points
    return {"wte" if name == "embd" else name: rows.values for name, rows in points.items()}


@pytest.mark.slow
def test_follow_takes_arrays_and_foreign_names(stories: Path, parity: Cli) -> None:
    """`dump ref --follow` leads llama.cpp along an .npz with a mapping, leaves out points that it lacks, and says so."""
    np.savez("ours.npz", **arrays(stories), nonsense=ODD)  # type: ignore[arg-type]
    Path("names.toml").write_text('[names]\nwte = "embd"\n')
    ran = parity("dump", "ref", "--follow", "ours.npz", "--map", "names.toml", "--tokens", IDS, "-o", "ref.jsonl")
    assert ran.code == 0, ran.err
    assert "llama.cpp has no such point: nonsense" in ran.err
    code, answer = parity.json("diff", "ours.npz", "ref.jsonl", "--map", "names.toml")
    assert (code, answer["compared"]) == (0, 30)
    assert parity("dump", "ref", "--follow", "ours.npz", "--tokens", IDS, "-o", "two.jsonl").code == 0
    np.savez("none.npz", nonsense=ODD)
    refused = parity("dump", "ref", "--follow", "none.npz", "--tokens", IDS, "-o", "x.jsonl")
    assert refused.code == 2
    assert refused.err.count("\n") == 1


def renamed(source: Path, first: int, split: int = len(TOKENS)) -> str:
    """A dump's records under an engine's own names and counted from `first`, as lines without a header, in two passes."""
    kept = [json.loads(line) for line in source.read_text().splitlines()]
    lines = [line for line in kept if line["type"] == "checkpoint"]
    for line in lines:
        line["checkpoint"] = line["checkpoint"].replace("embd", "wte")
        line["step"] = int(line["token_idx"] >= split)
        line["token_idx"] += first
    return "".join(json.dumps(line) + "\n" for line in lines)


@pytest.mark.slow
def test_run_and_consistency_take_foreign_names(parity: Cli) -> None:
    """`run --exec` and `consistency` take --map and --offset; without an engine of one's own `run` refuses them."""
    Path("names.toml").write_text('[names]\nwte = "embd"\n')
    assert parity("dump", "ours", "--tokens", IDS, "-o", "whole.jsonl").code == 0
    Path("printed.jsonl").write_text(renamed(Path("whole.jsonl"), 7))
    options = ("--map", "names.toml", "--offset", "-7")
    code, answer = parity.json("run", "--tokens", IDS, "--exec", "cp printed.jsonl {out}", "--compute", "f32", *options)
    assert (code, answer["compared"]) == (0, 35)
    assert parity("run", "--tokens", IDS, *options).code == 2
    Path("steps.jsonl").write_text(renamed(Path("whole.jsonl"), 7, split=3))
    code, answer = parity.json("consistency", "printed.jsonl", "steps.jsonl", *options, "--compute", "f32")
    assert (code, answer["checks"][0]["diff"]["compared"]) == (0, 35)


def test_isolate_takes_arrays_and_foreign_names(stories: Path, parity: Cli) -> None:
    """`isolate` judges the whole values in an .npz with an engine's own names: here the final norm and the head."""
    np.savez("ours.npz", **arrays(stories))  # type: ignore[arg-type]
    Path("names.toml").write_text('[names]\nwte = "embd"\n')
    code, answer = parity.json(
        "isolate", "ours.npz", "--map", "names.toml", "--tokens", IDS, "--compute", "f32", "--no-windows"
    )
    proven = {operation["operation"] for operation in answer["operations"] if operation["status"] == "proven"}
    assert (code, {"embd", "output_norm", "logits"} <= proven) == (0, True)


@pytest.mark.slow
def test_explain_takes_arrays_and_foreign_names(stories: Path, parity: Cli) -> None:
    """`explain` names a planted fault from arrays under an engine's own names."""
    np.savez("ours.npz", **arrays(stories, "rope-pairs"))  # type: ignore[arg-type]
    Path("names.toml").write_text('[names]\nwte = "embd"\n')
    code, answer = parity.json("explain", "ours.npz", "--map", "names.toml", "--tokens", IDS)
    assert code == 1
    assert answer["causes"][0]["fault"] == "rope-pairs"


@pytest.mark.slow
def test_a_foreign_engine_is_compared_despite_lint(parity: Cli) -> None:
    """`run --exec` refuses a dump that lint calls unusable, naming the rule; --despite-lint compares it all the same."""
    row = np.random.default_rng(0).standard_normal(10).round(3).tolist()
    row[4] = 1e18  # a device pointer
    lines = [
        json.dumps({"checkpoint": name, "token_idx": t, "values": [x + t for x in row]})
        for name in ("embd", "blk.5.l_out", "blk.23.l_out")
        for t in range(len(TOKENS))
    ]
    Path("broken.jsonl").write_text("\n".join(lines))
    command = ("run", "--exec", "cp broken.jsonl {out}", "--tokens", IDS)
    refused = parity(*command)
    assert refused.code == 2
    assert "your engine's dump" in refused.err
    assert "impossible-size" in refused.err
    code, answer = parity.json(*command, "--despite-lint")
    assert code == 1
    assert answer["first_divergence"]["checkpoint"] == "embd"
