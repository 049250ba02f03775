"""`parity conform`: a matrix of tiny models through an engine, one verdict per cell, one line per cause, resumable by content."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree as ET

import pandas as pd
import pytest
from cli import Cli, refused
from foreign import numpy_engine

SERVER = os.environ.get("PARITY_SERVER_PYTHON", "")
needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc")


@pytest.fixture
def conform(c_engine: Path, parity: Cli) -> Callable[..., tuple[int, dict]]:
    """`parity conform` of the C engine with a fault: (exit code, JSON)."""

    def run(fault: str, *words: str, types: str = "F32,Q8_0") -> tuple[int, dict]:
        line = f"{c_engine} {{model}} {{tokens}} {{out}} '{fault}' {{points}}"
        axes = ("--architectures", "llama,qwen2,qwen3", "--types", types, "--prompts", "short,same")
        return parity.json("conform", "--exec", line, *axes, "--workers", "1", "--out", "c", *words)

    return run


@needs_gcc
def test_what_the_engine_has_is_green_and_all_else_is_refused(conform: Callable[..., tuple[int, dict]]) -> None:
    """Its two architectures in F32 are parity at every operation; other types and architectures are refused in its own words."""
    code, answer = conform("")
    assert (code, answer["verdict"]) == (0, "conforms")
    verdicts = {(cell["architecture"], cell["type"]): cell["verdict"] for cell in answer["cells"]}
    assert verdicts == {
        ("llama", "F32"): "parity", ("qwen2", "F32"): "parity", ("qwen3", "F32"): "refused",
        ("llama", "Q8_0"): "refused", ("qwen2", "Q8_0"): "refused", ("qwen3", "Q8_0"): "refused",
    }  # fmt: skip
    assert {cell["reason"].split(": ")[-1] for cell in answer["cells"] if cell["verdict"] == "refused"} == {
        "it reads F32 weights only.",
        "it computes qwen2 and llama only.",
    }
    assert all(cell["compared"] > 100 for cell in answer["cells"] if cell["verdict"] == "parity")


@needs_gcc
@pytest.mark.slow
def test_one_cause_is_one_line_and_a_fix_runs_again(
    conform: Callable[..., tuple[int, dict]], c_engine: Path, parity: Cli
) -> None:
    """Wrong RoPE pairs: every cell where they can be seen diverges with that cause; a second run keeps all, another engine none."""
    code, answer = conform("rope", types="F32")
    assert code == 1
    assert [(cause["cause"], len(cause["cells"])) for cause in answer["causes"]] == [("rope-pairs", 4)]
    diverging = [cell for cell in answer["cells"] if cell["verdict"] == "divergence"]
    assert {(cell["prompt"], cell["first_divergence"]["checkpoint"]) for cell in diverging} == {
        ("short", "blk.0.q_rope"),
        ("same", "blk.0.q_rope"),
    }
    assert all(Path("c", cell["report"]).is_file() for cell in diverging)
    code, again = conform("rope", types="F32")
    assert (code, again["kept"], again["causes"]) == (1, len(answer["cells"]), answer["causes"])
    assert conform("", types="F32")[1]["kept"] == 0  # another command is another engine
    with c_engine.open("ab") as file:  # … and so is another build of it
        file.write(b"\0")
    assert conform("rope", types="F32")[1]["kept"] == 0
    page = Path("c/index.html").read_text()
    assert "rope-pairs: 4 cells" in page
    assert diverging[0]["report"] in page


@pytest.mark.slow
@needs_gcc
def test_what_it_prints_and_writes(c_engine: Path, parity: Cli) -> None:
    """A screen with one letter for each place, the first failure on stderr, JUnit with skipped cells, a CSV row a cell, Markdown."""
    line = f"{c_engine} {{model}} {{tokens}} {{out}} rope {{points}}"
    words = ("conform", "--exec", line, "--architectures", "qwen2", "--types", "F32,Q8_0", "--prompts", "short", "--out", "c")
    ran = parity(*words, "--junit", "c.xml", "--table", "c.csv")
    assert ran.code == 1
    assert ran.err.startswith("first failure, cell 1 of 2: qwen2 F32 short prefill: divergence at blk.0.q_rope, position 1")
    screen = ran.out.splitlines()
    assert screen[:3] == ["        F32  Q8_0", "qwen2     ✗     –", "– refused · ✗ divergence"]
    assert "causes  rope-pairs: 1 cell · F32" in screen
    assert screen[-1].startswith("2 cells: 1 ✗, 1 refused · ")
    assert all(len(line) <= 80 for line in screen[:-1])
    suite = ET.parse("c.xml").getroot()[0]
    assert (suite.get("failures"), suite.get("skipped"), suite.get("tests")) == ("1", "1", "2")
    table = pd.read_csv("c.csv")
    assert table[["architecture", "type", "verdict", "cause"]].fillna("").values.tolist() == [
        ["qwen2", "F32", "divergence", "rope-pairs"],
        ["qwen2", "Q8_0", "refused", ""],
    ]
    assert "| qwen2 | ✗ | – |" in parity(*words, "--format", "markdown").out


@pytest.mark.slow
def test_our_engine_conforms_in_every_mode(parity: Cli) -> None:
    """Every mode of our engine agrees with llama.cpp for a K type, whose models are wide enough for its blocks."""
    code, answer = parity.json("conform", "--side", "ours", "--architectures", "qwen2", "--types", "Q4_K", "--prompts", "short")
    assert code == 0
    assert {cell["mode"]: cell["verdict"] for cell in answer["cells"]} == dict.fromkeys(
        ("prefill", "decode", "chunked", "batch", "state"), "parity"
    )


@pytest.mark.slow
def test_the_decoder_after_an_encoder_is_led_along_the_prompt(parity: Cli) -> None:
    """Portions, turns and a state of t5 are those of its decoder's tokens; an encoder, which keeps nothing, refuses them and says why."""
    words = ("--types", "F32", "--prompts", "short", "--modes", "decode,batch,state", "--no-explain")
    code, answer = parity.json("conform", "--side", "ours", "--architectures", "t5,t5encoder", *words, "--workers", "1")
    assert code == 0
    verdicts = {(cell["architecture"], cell["mode"]): cell["verdict"] for cell in answer["cells"]}
    assert verdicts == dict.fromkeys((("t5", "decode"), ("t5", "batch"), ("t5", "state"), ("t5encoder", "batch")), "parity") | {
        ("t5encoder", "decode"): "refused",
        ("t5encoder", "state"): "refused",
    }
    assert {cell["reason"] for cell in answer["cells"] if cell["verdict"] == "refused"} == {
        "an encoder computes its whole input in one pass and keeps nothing for another."
    }


def test_a_limit_of_0_gives_json_without_infinity(parity: Cli) -> None:
    """An error infinitely far beyond its limit is the word "Infinity", as in every other answer: JSON has no such number."""
    words = ("--architectures", "llama", "--types", "F32", "--prompts", "one", "--modes", "prefill", "--no-explain")
    code, answer = parity.json("conform", "--side", "ours", *words, "--tolerance", "0")
    assert (code, answer["cells"][0]["verdict"], answer["cells"][0]["of_limit"]) == (1, "divergence", "Infinity")


EVERY_WAY = ("--portions={portions}", "--state={state}")
ONLY = ("--architectures", "llama,qwen2,qwen3", "--workers", "1", "--out", "c")


@pytest.mark.slow
def test_sparse_attention_beyond_its_choice(parity: Cli) -> None:
    """More positions than an indexer chooses: llama.cpp records which, our engine has them as a step of others' and not as a point."""
    words = ("--architectures", "deepseek32", "--types", "F32", "--prompts", "long", "--modes", "prefill", "--no-explain")
    code, answer = parity.json("conform", "--side", "ours", *words, "--workers", "1")
    assert (code, answer["cells"][0]["verdict"]) == (0, "parity")


@pytest.mark.slow
def test_a_numpy_engine_in_all_types_and_modes(parity: Cli) -> None:
    """An engine that dequantises by gguf-py: two architectures in F32 and a K type are green in every mode, others are refused."""
    words = ("--types", "F32,Q4_K", "--prompts", "short")
    code, answer = parity.json("conform", "--exec", numpy_engine(*EVERY_WAY), *ONLY, *words)
    assert code == 0
    verdicts = {(cell["architecture"], cell["type"], cell["mode"]): cell["verdict"] for cell in answer["cells"]}
    modes = ("prefill", "decode", "chunked", "batch", "state")
    assert verdicts == {
        (name, kind, mode): "refused" if name == "qwen3" else "parity"
        for name in ("llama", "qwen2", "qwen3")
        for kind in ("F32", "Q4_K")
        for mode in modes
    }
    assert all(cell["compared"] > 100 for cell in answer["cells"] if cell["verdict"] == "parity" and cell["mode"] != "state")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "cause", "modes"),
    [
        ("rope", "rope-pairs", {"prefill", "decode", "chunked", "batch", "state"}),
        ("pad", "first at kqv_out, in batch only", {"batch"}),
        ("state", "first at kqv_out, in state only", {"state"}),
    ],
)
def test_a_fault_of_the_numpy_engine_is_one_cause(parity: Cli, fault: str, cause: str, modes: set[str]) -> None:
    """Wrong RoPE pairs fail in every cell by one cause; seen padding and a state saved wrong fail in their own mode only."""
    words = ("--architectures", "llama", "--types", "F32", "--prompts", "short", "--workers", "1", "--out", "c")
    code, answer = parity.json("conform", "--exec", numpy_engine(*EVERY_WAY, "--fault", fault), *words)
    verdicts = {cell["mode"]: (cell["verdict"], cell["reason"]) for cell in answer["cells"]}
    every = ("prefill", "decode", "chunked", "batch", "state")
    assert verdicts == {mode: ("divergence" if mode in modes else "parity", "") for mode in every}
    assert code == 1
    assert [cause_found["cause"] for cause_found in answer["causes"]] == [cause]


def test_a_batch_without_numbers_and_a_state_that_is_not_used(parity: Cli, tmp_path: Path) -> None:
    """Lines without `seq`, a state that is not written, and one that is not read each have a sentence of their own."""
    record = '{"checkpoint": "embd", "token_idx": 0, "values": [1.0]}'
    words = ("--architectures", "llama", "--types", "F32", "--prompts", "short", "--workers", "1")
    for body, mode, message in (
        (f"print('{record}')", "batch", "the dump of the batch has no records of sequence 3"),
        (f"print('{record}')", "state", "left no state"),
        (f"open(sys.argv[2], 'w').close(); print('{record}')", "state", "computed positions below 3 again"),
    ):
        (tmp_path / "engine.py").write_text(f"import sys\n{body}\n")
        line = f"{sys.executable} {tmp_path / 'engine.py'} {{sequences}} {{state}}"
        code, answer = parity.json("conform", "--exec", line, *words, "--modes", mode)
        assert code == 1
        assert [cell["verdict"] for cell in answer["cells"]] == ["unusable"]
        assert message in answer["cells"][0]["reason"]


@needs_gcc
@pytest.mark.slow
def test_a_run_is_a_check_of_its_ledger(conform: Callable[..., tuple[int, dict]], parity: Cli) -> None:
    """Two runs with another limit: `drift history` shows each cell, and which came nearer to its limit since the first."""
    words = ("--no-explain",)
    assert conform("", *words, types="F32")[0] == 0
    assert conform("", *words, "--tolerance", "1e-10", types="F32")[0] == 0
    code, history = parity.json("drift", "history", "c", "--since", "0d")
    assert (code, len(history["checks"])) == (0, 2)
    assert history["closer"] == []  # nothing between now and now
    lines = Path("c/ledger.jsonl").read_text().splitlines()
    old, new = json.loads(lines[0]), json.loads(lines[1])
    cell = "qwen2 F32 short prefill"
    old["time"] = "2020-01-01T00:00:00+00:00"
    new["points"][cell]["of_limit"] = 5 * old["points"][cell]["of_limit"]
    Path("c/ledger.jsonl").write_text("\n".join(map(json.dumps, (old, new))) + "\n")
    code, history = parity.json("drift", "history", "c", "--since", "1w")
    assert history["closer"][0]["name"] == cell
    assert history["closer"][0]["now"] == pytest.approx(5 * history["closer"][0]["before"], rel=1e-3)
    screen = parity("drift", "history", "c").out
    assert f"closer  {cell}: " in screen
    refused(parity("drift", "history", "c", "--since", "soon"), "--since 'soon' is not a time")


@pytest.mark.slow
def test_hugging_face_conforms(parity: Cli) -> None:
    """transformers' own models of the tiny files agree with llama.cpp; what it cannot load is refused, which is no failure."""
    python = os.environ.get("PARITY_HF_PYTHON")
    if not python:
        pytest.skip("PARITY_HF_PYTHON names no interpreter with torch and transformers")
    words = ("--architectures", "qwen2,mpt", "--types", "Q8_0", "--prompts", "short", "--workers", "1", "--out", "c")
    code, answer = parity.json("conform", "--side", "hf", "--python", python, *words)
    assert code == 0
    assert [(cell["architecture"], cell["verdict"]) for cell in answer["cells"]] == [("qwen2", "parity"), ("mpt", "refused")]


@pytest.mark.slow
@pytest.mark.skipif(not SERVER, reason="PARITY_SERVER_PYTHON names no interpreter with a completion server")
def test_servers_conform(parity: Cli) -> None:
    """llama-cpp-python's server is parity without its own repeat penalty; that, and a sampler that is not greedy, are seen and named."""
    line = f"{SERVER} {Path(__file__).with_name('servers.py')} llama_cpp {{model}} {{port}}"
    words = ("--side", "server", "--architectures", "qwen3", "--prompts", "short", "--workers", "1", "--out", "c")
    code, answer = parity.json("conform", "--exec", line, *words, "--types", "Q8_0", "--server-json", '{"repeat_penalty": 1}')
    assert code == 0
    assert {cell["mode"]: cell["verdict"] for cell in answer["cells"]} == {"prefill": "parity", "decode": "parity"}
    assert all(cell["compared"] >= 6 for cell in answer["cells"])
    code, answer = parity.json("conform", "--exec", line, *words, "--types", "Q8_0")  # its own default is a penalty of 1.1
    assert [(cause["cause"], cause["cells"]) for cause in answer["causes"]] == [("repeat-penalty", ["qwen3 Q8_0 short decode"])]
    code, answer = parity.json("conform", "--exec", f"{line} temperature", *words, "--types", "Q8_0")
    assert [(cause["cause"], cause["cells"]) for cause in answer["causes"]] == [("sampler", ["qwen3 Q8_0 short decode"])]
    code, answer = parity.json("conform", "--exec", f"{line} no-logprobs", *words, "--types", "Q8_0", "--modes", "prefill")
    assert (code, [cell["verdict"] for cell in answer["cells"]]) == (1, ["unusable"])
    assert "logits_all" in answer["cells"][0]["reason"]


@needs_gcc
@pytest.mark.slow
def test_a_lost_worker_costs_its_cells_only(c_engine: Path, parity: Cli, tmp_path: Path) -> None:
    """Two workers, one killed by the engine that it runs, once: its cells run again, and every cell has its verdict."""
    killer = tmp_path / "killer.sh"
    killer.write_text(f'[ -e once ] || {{ touch once; kill -9 $PPID; }}\nexec {c_engine} "$@"\n')
    line = "sh killer.sh {model} {tokens} {out} '' {points}"
    words = ("--architectures", "llama,qwen2,qwen3", "--types", "F32", "--prompts", "short", "--workers", "2", "--out", "c")
    code, answer = parity.json("conform", "--exec", line, *words)
    assert (code, answer["workers"]) == (0, 2)
    assert Path("once").exists()
    assert [cell["verdict"] for cell in answer["cells"]] == ["parity", "parity", "refused"]
