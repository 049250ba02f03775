"""`parity run --hunt`: one command leads a foreign engine from the first divergence to the operation and its cause."""

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli import Cli, refused

ONCE = ("--prompt", "Once upon a time")
needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc")

# Our engine with a fault, as somebody's script: it prints the points that it is asked for, as bare lines or all it has.
SCRIPT = """
import os, sys, json
from pathlib import Path
import numpy as np
from engine.backend import choose
from engine.capture.host import HostStage
from engine.capture.tap import Capture
from engine.faults import CATALOGUE, plant
from engine.transformer import Transformer
from engine.weights.gguf_model import GgufModel

model, tokens, points, fault, layers, noise = sys.argv[1:7]
engine = Transformer(GgufModel(Path(model)), choose("numpy"))
if fault:
    engine.steps = plant(engine.steps, CATALOGUE[fault], tuple(map(int, layers.split(","))) if layers else None)
wanted = [name for name in points.split(",") if name in engine.points] if points else [f"blk.{i}.l_out" for i in range(engine.hp.n_layers)]
if os.environ.get("LACKS") in wanted:
    wanted = []

class Printed:
    def rows(self, rows):
        for t, values in zip(rows.token_idx.tolist(), rows.values):
            moved = values * (1 + np.random.default_rng().random() * 1e-9 * float(noise))
            print(json.dumps({"checkpoint": rows.point, "token_idx": t, "values": moved.astype(float).tolist()}))
    def token(self, token): pass

with Capture(HostStage(Printed(), wanted, engine.backend, slice_size=int(os.environ.get("SLICE", "64")))) as tap:
    engine.forward([int(t) for t in tokens.split(",")], engine.start(), tap)
"""


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., str]:
    """A command line of our engine with a fault, as a foreign one."""
    path = tmp_path / "somebodys.py"
    path.write_text(SCRIPT)

    def line(fault: str = "", layers: str = "", *, points: str = "{points}", noise: int = 0) -> str:
        root = Path(__file__).parents[1]
        return f"PYTHONPATH={root} {sys.executable} {path} {{model}} {{tokens}} '{points}' '{fault}' '{layers}' {noise}"

    return line


@needs_gcc
@pytest.mark.slow
def test_from_garbage_to_the_cause(c_engine: Path, parity: Cli) -> None:
    """Wrong RoPE pairs from layer 7 on: two runs lead from layer outputs to blk.7.q_rope, and explain names them and the layers."""
    line = f"{c_engine} {{model}} {{tokens}} {{out}} late {{points}}"
    code, answer = parity.json("run", *ONCE, "--exec", line, "--hunt", "--out", "h")
    assert (code, answer["verdict"]) == (1, "divergence")
    assert [(run["requested"], run["first_divergence"], run["last_agreement"]) for run in answer["runs"]] == [
        ("default", "blk.10.l_out", "blk.5.l_out"),
        (answer["runs"][0]["next"], "blk.7.q_rope", "blk.7.q"),
    ]
    assert answer["stopped"] == answer["unexplained"] == ""
    (cause,) = answer["explanation"]["causes"]
    assert (cause["fault"], cause["layers"], cause["explained"]) == ("rope-pairs", list(range(7, 24)), 1.0)
    ran = parity("run", *ONCE, "--exec", line, "--hunt", "--out", "h")
    assert ran.code == 1
    for part in ("run 1 ", "run 2 ", "blk.7.q_rope", "cause   rope-pairs", "fix ", "2 runs of your engine"):
        assert part in ran.out
    assert ran.err == ""
    assert {"ours.jsonl", "ref.jsonl", "diff.json", "report.html"} <= {p.name for p in Path("h").iterdir()}


@needs_gcc
def test_a_right_engine_is_parity_after_one_run(c_engine: Path, parity: Cli) -> None:
    """Nothing is hunted where all agree: exit 0 and the usual table."""
    code, answer = parity.json("run", *ONCE, "--exec", f"{c_engine} {{model}} {{tokens}} {{out}} '' {{points}}", "--hunt")
    assert (code, len(answer["runs"]), answer["explanation"]) == (0, 1, None)


@pytest.mark.slow
def test_bare_lines_are_hunted_with_the_prompts_tokens(
    parity: Cli, script: Callable[..., str], synthetic: Callable[..., Path]
) -> None:
    """An engine without header, tokens or sketch: a missing bias in one layer is found and named."""
    model = synthetic(layers=4)
    code, answer = parity.json(
        "run", "--model", model, "--tokens", "5,99,7,300", "--exec", script("no-qkv-bias", "2"), "--hunt", "--compute", "f32"
    )
    assert code == 1
    assert answer["runs"][-1]["first_divergence"] in ("blk.2.q", "blk.2.k", "blk.2.v")
    assert [cause["fault"] for cause in answer["explanation"]["causes"]] == ["no-qkv-bias"]


@pytest.mark.slow
def test_why_it_stops(parity: Cli, script: Callable[..., str], synthetic: Callable[..., Path]) -> None:
    """Where the engine is not told the points, or does not print them, the hunt ends with that sentence and explains what it has."""
    words = ("run", "--model", synthetic(layers=4), "--tokens", "5,99,7,300", "--hunt", "--compute", "f32", "--exec")
    code, answer = parity.json(*words, script("no-qkv-bias", "2", points="blk.0.l_out,blk.3.l_out"))
    assert (code, len(answer["runs"])) == (1, 1)
    assert "put {points} into its command" in answer["stopped"]
    assert answer["explanation"] is not None
    code, answer = parity.json(*words, f"X={{points}} {script('no-qkv-bias', '2', points='blk.0.l_out,blk.3.l_out')}")
    assert (code, len(answer["runs"])) == (1, 2)
    assert "printed none of these points" in answer["stopped"]


@pytest.mark.slow
def test_an_engine_that_has_none_of_the_points(parity: Cli, script: Callable[..., str], synthetic: Callable[..., Path]) -> None:
    """Asked for points that it has none of, an engine writes an empty file: the hunt explains what the earlier runs printed."""
    line = "env LACKS=blk.0.q " + script("no-qkv-bias", "0")
    words = ("run", "--model", synthetic(layers=4), "--tokens", "5,99,7,300", "--hunt", "--compute", "f32", "--exec")
    code, answer = parity.json(*words, line)
    assert (code, len(answer["runs"])) == (1, 1)
    assert "printed none of these points" in answer["stopped"]
    assert answer["explanation"] is not None


@pytest.mark.slow
def test_points_that_are_there_already_are_not_called_missing(
    parity: Cli, script: Callable[..., str], synthetic: Callable[..., Path]
) -> None:
    """A slice that leaves part of the inputs unseen: the hunt asks for wider rows of the program behind `env`, not for points it has."""
    line = "env SLICE=4 " + script("no-qkv-bias", "2")
    words = ("run", "--model", synthetic(layers=4), "--tokens", "5,99,7,300", "--hunt", "--compute", "f32", "--exec")
    code, answer = parity.json(*words, line)
    assert code == 1
    assert re.fullmatch(
        r"somebodys.py printed these points already: print \d+ values per row, or the sketch", answer["stopped"]
    )


@pytest.mark.slow
def test_an_engine_that_does_not_repeat_itself_is_told_so(
    parity: Cli, script: Callable[..., str], synthetic: Callable[..., Path]
) -> None:
    """Two runs with different numbers at one point lead to a note: a comparison would be of two experiments."""
    line = script("no-qkv-bias", "2", points="blk.0.l_out,{points}", noise=1000)
    code, answer = parity.json(
        "run", "--model", synthetic(layers=4), "--tokens", "5,99,7,300", "--hunt", "--compute", "f32", "--exec", line
    )
    assert code == 1
    assert any("its numbers are not reproducible" in note for note in answer["notes"])


def test_points_are_given_by_name(parity: Cli, synthetic: Callable[..., Path], tmp_path: Path) -> None:
    """A point that llama.cpp does not list among those of a glob: {points} are names still, which an engine need not expand."""
    asked, engine = tmp_path / "asked", tmp_path / "engine.py"
    row = '{"checkpoint": "blk.0.q", "token_idx": 0, "values": [1, 2, 3, 4]}'
    engine.write_text(f"import sys\nopen(sys.argv[1], 'w').write(sys.argv[2])\nprint({row!r})\n")
    line = f"{sys.executable} {engine} {asked} {{points}}"
    points = "blk.{0,1}.{q,concat},blk.1.ffn_g*"
    parity("run", "--model", synthetic(layers=2), "--tokens", "5,99", "--points", points, "--hunt", "--exec", line)
    assert asked.read_text().split(",") == ["blk.0.q", "blk.0.concat", "blk.1.q", "blk.1.concat", "blk.1.ffn_gate"]


def test_what_it_refuses(parity: Cli) -> None:
    """Without a foreign engine --hunt is refused: there is nothing to run again."""
    refused(parity("run", *ONCE, "--hunt"), "--hunt", "--exec")


@pytest.mark.slow
@needs_gcc
def test_every_printed_point_is_compared(c_engine: Path, parity: Cli) -> None:
    """`run --exec` records what the engine printed, not the default points only; --points narrows it to what is asked for."""
    line = f"{c_engine} {{model}} {{tokens}} {{out}}"
    code, answer = parity.json("run", *ONCE, "--exec", line)
    assert (code, answer["compared"], answer["missing"]["ours"]["records"]) == (0, 27 * 5, 0)
    code, answer = parity.json("run", *ONCE, "--exec", f"{line} '' {{points}}", "--points", "blk.3.*")
    assert code == 0
    names = {point["checkpoint"] for point in answer["points"]}
    assert {"blk.3.q_rope", "blk.3.kqv_out", "blk.3.l_out"} <= names
    assert all(name.startswith("blk.3.") for name in names)
