"""`parity run` from a prompt to a verdict: real models, real llama.cpp, exact mode's limits."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cli import Cli
from dumps import DIFFERENCE_KEYS, VERDICT_KEYS
from foreign import numpy_engine
from slow import slow_but

from checkpoints.reading.reader import read

ONCE = ("--prompt", "Once upon a time")
TYPES = (
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "IQ4_NL", "IQ4_XS",
)  # fmt: skip


def worst(answer: dict, point: str | None = None) -> float:
    return max(compared["worst"]["nmse"] for compared in answer["points"] if point in (None, compared["checkpoint"]))


def test_the_first_command_of_the_readme_is_parity(parity: Cli) -> None:
    """`parity run --prompt "Once upon a time"` exits 0 with the default points, worst NMSE under 1e-10, logits under 1e-9."""
    code, answer = parity.json("run", *ONCE)
    assert (code, answer["verdict"], answer["compared"]) == (0, "parity", 35)
    assert [point["checkpoint"] for point in answer["points"]] == [
        "embd", "blk.0.l_out", "blk.5.l_out", "blk.10.l_out", "blk.23.l_out", "output_norm", "logits",
    ]  # fmt: skip
    assert worst(answer) <= 1e-10
    assert answer["missing"]["ours"]["records"] == answer["missing"]["ref"]["records"] == 0
    assert sorted(path.name for path in Path(answer["folder"]).iterdir()) == [
        "diff.json",
        "ours.jsonl",
        "ref.jsonl",
        "report.html",
    ]


def test_the_text_names_model_sides_points_and_verdict(parity: Cli) -> None:
    """What a person reads: one screen with the model, both sides, a row per point and the verdict; nothing on stderr."""
    ran = parity("run", *ONCE)
    assert ran.code == 0
    assert ran.err == ""
    for part in ("stories-14m", "qwen2, 24 layers", "llama.cpp", "blk.23.l_out", "top-1 5/5", "parity: 35 of 35 records agree"):
        assert part in ran.out
    assert len(ran.out.splitlines()) <= 24


def test_every_point_agrees(parity: Cli) -> None:
    """With --points all every operation's output of every layer is within the limit, not only the layer outputs."""
    code, answer = parity.json("run", *ONCE, "--points", "all", "--out", "all")
    assert (code, answer["compared"]) == (0, 5 * (24 * 19 + 3))
    assert worst(answer) <= 1e-10


@pytest.mark.slow
def test_every_greedy_choice_of_64_tokens_agrees(parity: Cli) -> None:
    """Led along 64 generated tokens, our engine would have chosen each of them itself."""
    code, answer = parity.json("run", *ONCE, "--generate", "64", "--out", "g")
    assert code == 0
    assert answer["choices"]["known"] == answer["choices"]["agree"] >= 64
    ours, ref = read("g/ours.jsonl"), read("g/ref.jsonl")
    assert len(ref.tokens) == 64
    assert [token.top[0][0] for token in ours.tokens] == [token.id for token in ref.tokens]
    assert "".join(token.text for token in ref.tokens).startswith(", there was a little girl named Lily.")
    assert ours.points["logits"].decode.sum() == 64


@pytest.mark.parametrize("kind", slow_but(TYPES, "Q8_0"))
def test_every_weight_type_is_exact(parity: Cli, quantized: Callable[[str], Path], kind: str) -> None:
    """Our engine dequantises the original file itself and equals llama.cpp on its F32 twin, whatever the type."""
    code, answer = parity.json("run", "--model", quantized(kind), *ONCE)
    assert (code, answer["verdict"]) == (0, "parity")
    assert worst(answer) <= 1e-10


SHAPES = [
    ("tiny", {"layers": 1}),
    ("tiny", {"layers": 5, "tied": True}),
    ("tiny", {"heads": 4, "kv_heads": 4}),
    ("tiny", {"heads": 7, "kv_heads": 1, "width": 224}),
    ("tiny-llama", {"layers": 5, "heads": 4, "kv_heads": 2}),
    ("tiny-llama", {"tied": True, "head_size": 32, "kv_heads": 1}),
    ("tiny-llama", {"biases": True}),
    ("tiny-llama", {"rope_factors": True, "rope_base": 500000.0}),
]


@pytest.mark.parametrize(("like", "shape"), SHAPES, ids=lambda value: value if isinstance(value, str) else "-".join(value))
def test_every_shape_is_exact_at_every_point(parity: Cli, synthetic: Callable[..., Path], like: str, shape: dict) -> None:
    """Both architectures in every grouping, tied and not, with biases and factors: all points of a 33-token prompt agree."""
    tokens = ",".join(str(17 * i % 2000) for i in range(33))
    code, answer = parity.json("run", "--model", synthetic(like, **shape), "--tokens", tokens, "--points", "all")
    assert (code, answer["verdict"]) == (0, "parity"), answer["first_divergence"]


@pytest.mark.parametrize("count", slow_but([1, 2, 33, 500], 1, 2, 33))
def test_prompts_of_every_length(parity: Cli, count: int) -> None:
    """Prompts of 1, 2, 33 and 500 tokens agree at every position."""
    tokens = ",".join(["2047", *(str(100 + 31 * i % 1900) for i in range(count - 1))])
    code, answer = parity.json("run", "--tokens", tokens)
    assert (code, answer["compared"]) == (0, 7 * count)


def test_positions_near_the_end_of_a_long_context(parity: Cli, synthetic: Callable[..., Path]) -> None:
    """At positions near 32,768 the rotation's angles are ggml's own, product by product."""
    model = synthetic("tiny", context=32768)
    code, answer = parity.json(
        "run", "--model", model, "--tokens", "5,6,7,8,9", "--first-position", "32763", "--points", "all", "--out", "far"
    )
    assert (code, answer["verdict"]) == (0, "parity")
    assert sorted(set(read("far/ref.jsonl").points["blk.0.q_rope"].token_idx.tolist())) == list(range(32763, 32768))


def test_layers_that_do_not_exist_are_replaced_and_said(parity: Cli, synthetic: Callable[..., Path]) -> None:
    """In a model of five layers the points are 0 and the last; the answer says what was taken instead of 5, 10 and 23."""
    ran = parity("run", "--model", synthetic("tiny", layers=5), *ONCE)
    assert ran.code == 0
    assert "blk.4.l_out" in ran.out
    assert "the model has 5 layers: 0 and 4 were recorded instead of 0, 5, 10 and 23" in ran.out


def test_native_mode_compares_the_files_own_types(parity: Cli) -> None:
    """In native mode llama.cpp computes with the Q8_0 weights: the difference is its rounding, within the native limit."""
    code, answer = parity.json("run", *ONCE, "--mode", "native")
    assert (code, answer["mode"]) == (0, "native")
    assert 1e-7 < worst(answer, "logits") < answer["limits"]["logits"]


def test_full_tensors_are_what_the_records_are_slices_of(parity: Cli) -> None:
    """With --full both sides write whole tensors; each record's values are their first, its statistics theirs."""
    from checkpoints.tensors import TensorReader

    code, answer = parity.json("run", *ONCE, "--full", "--out", "full")
    assert code == 0
    for side in ("ours", "ref"):
        tensors, dump = TensorReader(f"full/{side}.safetensors"), read(f"full/{side}.jsonl")
        for name, rows in dump.points.items():
            whole = tensors.get(name)
            np.testing.assert_array_equal(whole.reshape(5, -1)[:, :16], rows.values)
            np.testing.assert_allclose(np.linalg.norm(whole.reshape(5, -1).astype(float), axis=1), rows.stats["l2"], rtol=1e-12)
    assert answer["choices"]["rows"] == 5
    assert answer["choices"]["kl"] < 1e-9


def test_positions_and_slice(parity: Cli) -> None:
    """--positions and --slice say which rows are recorded and how much of each, on both sides."""
    code, answer = parity.json("run", *ONCE, "--positions", "1,3", "--slice", "5", "--out", "some")
    assert (code, answer["compared"]) == (0, 14)
    rows = read("some/ref.jsonl").points["logits"]
    assert rows.token_idx.tolist() == [1, 3]
    assert rows.counts.tolist() == [5, 5]


def test_dump_both_sides_and_diff_them(parity: Cli) -> None:
    """`dump ours`, `dump ref --follow` and `diff` are the parts of `run`: same verdict, and a table of every record."""
    assert parity("dump", "ours", *ONCE, "--points", "blk.{0..2}.{q,k_rope}", "-o", "a.jsonl").code == 0
    assert parity("dump", "ref", "--follow", "a.jsonl", "-o", "b.jsonl").code == 0
    ran = parity("diff", "a.jsonl", "b.jsonl", "--table", "t.csv")
    assert ran.code == 0
    assert "30 of 30 records agree" in ran.out
    assert len(Path("t.csv").read_text().splitlines()) == 31


@pytest.mark.slow
def test_a_foreign_engine_is_run_with_the_twin(parity: Cli, tmp_path: Path) -> None:
    """--exec fills in the F32 twin, the ids and the output; what the command writes is our side."""
    script = tmp_path / "my_engine.py"
    script.write_text(
        "import subprocess, sys, pathlib\n"
        "model, tokens, out = sys.argv[1:]\n"
        "assert pathlib.Path(model).stat().st_size > 50e6, 'not the F32 twin'\n"
        "from parity.__main__ import run\n"
        "sys.exit(run(['dump', 'ours', '--model', model, '--tokens', tokens, '-o', out]))\n"
    )
    command = f"{sys.executable} {script} {{model}} {{tokens}} {{out}}"
    code, answer = parity.json("run", *ONCE, "--exec", command)
    assert (code, answer.get("compared")) == (0, 35), answer


def test_json_is_one_object_and_nothing_else(parity: Cli) -> None:
    """--format json prints one JSON object on stdout, with the contract's keys."""
    ran = parity("run", *ONCE, "--format", "json")
    answer = json.loads(ran.out)
    assert {"schema", *VERDICT_KEYS} <= set(answer)
    assert set(answer["worst"]) >= DIFFERENCE_KEYS


@pytest.mark.slow
def test_parity_on_the_twin_says_that_dequantisers_did_not_run(parity: Cli) -> None:
    """An engine that was given the F32 copy of a quantised file is told once how to run its own dequantisers; in native mode, not."""
    run = ("run", "--tokens", "1,403,407", "--exec", numpy_engine(), "--compute", "f32", "--points", "default")
    for mode, times in (("exact", 1), ("native", 0)):
        code, answer = parity.json(*run, "--mode", mode)
        assert code == 0
        assert sum("dequantisers did not run" in note for note in answer["notes"]) == times
