"""Hugging Face as a side: transformers' own models against llama.cpp and our engine, and what conversion does to them."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from cli import Cli, refused
from hf_convert import convert

from checkpoints.errors import InputError
from checkpoints.reading.reader import read
from parity.emit import source
from parity.emit.hugging_face_names import names_of
from parity.run.hugging_face import HuggingFace, Tokenizer
from parity.run.request import Prompt

PYTHON = os.environ.get("PARITY_HF_PYTHON", "")
TOKENS = (5, 9, 17, 44, 3, 60)
DENSE_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "glm4", "olmo2", "stablelm")
EXACT_FAMILIES = (*DENSE_FAMILIES, "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v2")
# ggml's GELU is a table of F16 (ggml_gelu_f16 in ggml-cpu/vec.h): 9e-8 … 3e-7 an operation, 1.3e-6 at the worst point after
# three layers, measured here on the first three families.
TABLE_FAMILIES, TABLE = ("gemma2", "gemma3", "gpt2", "falcon", "gpt_neox"), "1e-5"

SIX_FAMILIES = (
    "llama",
    "qwen2",
    "qwen3",
    "gemma3",
    "falcon",
    "gpt2",
)  # of which all three sides, and three faults each, are tried

needs_transformers = pytest.mark.skipif(
    not PYTHON, reason="PARITY_HF_PYTHON names no interpreter that has torch and transformers"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that makes a tiny random model of a family with transformers' own classes, and gives its folder."""
    folder = tmp_path_factory.mktemp("families")

    def make(family: str) -> Path:
        place = folder / family
        if not place.exists():
            script = Path(__file__).with_name("hf_make.py")
            subprocess.run([PYTHON, str(script), family, str(place)], check=True, capture_output=True)
        return place

    return make


@pytest.fixture(scope="module")
def dumped(model: Callable[[str], Path]) -> Callable[[str], Path]:
    """A function that gives transformers' own dump of a family's model."""

    def dump(family: str) -> Path:
        out = model(family) / "hf.jsonl"
        if not out.exists():
            HuggingFace(model(family), PYTHON).dump(Prompt(None, TOKENS, ()), out)
        return out

    return dump


@needs_transformers
@pytest.mark.slow
@pytest.mark.parametrize("family", [*EXACT_FAMILIES, *TABLE_FAMILIES])
def test_the_sides_agree_on_a_family(
    family: str, model: Callable[[str], Path], dumped: Callable[[str], Path], parity: Cli, tmp_path: Path
) -> None:
    """What transformers computes from its own folder, llama.cpp computes from the converted file, and on six families our engine, too, at
    every known point.
    """
    gguf, hf = convert(model(family), tmp_path / "model.gguf"), dumped(family)
    sides = ("ours", "ref") if family in SIX_FAMILIES else ("ref",)
    for side in sides:
        ids = ",".join(map(str, TOKENS))
        ran = parity("dump", side, "--model", gguf, "--tokens", ids, "--points", "all", "-o", f"{side}.jsonl")
        assert ran.code == 0, ran.err
    limit = ["--tolerance", TABLE] if family in TABLE_FAMILIES else []
    code, answer = parity.json("diff", *(f"{side}.jsonl" for side in sides), hf, *limit)
    assert (code, answer["verdict"]) == (0, "parity"), answer
    compared = answer["compared"] if len(sides) > 1 else [answer["compared"]]
    assert min(compared) >= 6 * (3 + 3 * 11)  # six positions, three points of the model, at least eleven of each layer


EPS = ({"eps": 1e-4}, "blk.0.attn_norm", "config.json says 1e-0")
SWAPPED = ({"swap": ("blk.1.ffn_gate.weight", "blk.1.ffn_up.weight")}, "blk.1.ffn_gate", "exchanged")


def swapped(a: str, b: str, place: str) -> tuple[dict[str, object], str, str]:
    """Two tensors in each other's place, the first point that shows it, and what the comparison of weights says."""
    return {"swap": (a, b)}, place, "exchanged"


@needs_transformers
@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "changes", "place", "sentence"),
    [
        ("llama", {"skip_permute": True}, "blk.0.q", "not permuted"),
        ("llama", *EPS),
        ("llama", *SWAPPED),
        ("qwen2", {"drop": "blk.1.attn_k.bias"}, "blk.1.k", "the GGUF does not"),
        ("qwen2", *EPS),
        ("qwen2", *swapped("blk.0.attn_k.weight", "blk.0.attn_v.weight", "blk.0.v")),
        ("qwen3", *swapped("blk.0.attn_q_norm.weight", "blk.0.attn_k_norm.weight", "blk.0.q_norm")),
        ("qwen3", *EPS),
        ("qwen3", *SWAPPED),
        ("gemma3", {"skip_norm_offset": True}, "blk.0.attn_norm", "without the 1"),
        ("gemma3", *EPS),
        ("gemma3", *SWAPPED),
        ("falcon", {"skip_groups": True}, "blk.0.q", "left in groups"),
        ("falcon", EPS[0], "blk.0.attn_norm_2", EPS[2]),
        ("falcon", *swapped("blk.1.attn_norm.weight", "blk.1.attn_norm_2.weight", "blk.1.attn_norm_2")),
        ("gpt2", *swapped("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "blk.0.attn_norm")),
        ("gpt2", *EPS),
        ("gpt2", *swapped("blk.1.attn_norm.bias", "blk.1.ffn_norm.bias", "blk.1.attn_norm")),
    ],
)
def test_a_fault_of_conversion_is_located_and_named(
    family: str,
    changes: dict[str, object],
    place: str,
    sentence: str,
    model: Callable[[str], Path],
    dumped: Callable[[str], Path],
    parity: Cli,
    tmp_path: Path,
) -> None:
    """Three faults of a converter in each of six families: the dumps part at the operation that reads what is wrong, and the comparison of
    weights says what it is.
    """
    gguf, hf = convert(model(family), tmp_path / "model.gguf", **changes), dumped(family)
    assert parity("dump", "ref", "--model", gguf, "--follow", hf, "-o", "ref.jsonl").code == 0
    # What another ε changes in the first norm is less than the table of GELU does after it.
    limit = ["--tolerance", TABLE] if family in TABLE_FAMILIES and "eps" not in changes else []
    code, answer = parity.json("diff", hf, "ref.jsonl", *limit)
    assert (code, answer["first_divergence"]["checkpoint"]) == (1, place)
    code, answer = parity.json("weights", "--model", gguf, "--hf", model(family))
    wrong = [tensor for tensor in answer["tensors"] if not tensor["status"].startswith("equal")]
    assert code == 1
    assert wrong
    assert all(sentence in tensor["reason"] for tensor in wrong), wrong


@needs_transformers
@pytest.mark.slow
def test_three_sides_of_a_run_agree(parity: Cli) -> None:
    """`run --with hf`: transformers dequantises the embedded Q8_0 file by itself, and all three agree at every point."""
    code, answer = parity.json(
        "run", "--prompt", "Once upon a time", "--points", "all", "--with", "hf", "--python", PYTHON, "--out", "whole"
    )
    assert (code, answer["verdict"], answer["sides"]) == (0, "parity", ["ours", "llama.cpp", "Hugging Face"])
    assert min(answer["compared"]) > 1500
    assert answer["folder"] == "whole"
    assert {path.name for path in Path("whole").iterdir()} == {
        "ours.jsonl",
        "ref.jsonl",
        "hf.jsonl",
        "diff.json",
        "report.html",
    }
    assert json.loads(Path("whole/diff.json").read_text()) == answer
    assert "<h2>Three sides" in Path("whole/report.html").read_text(encoding="utf-8")
    printed = parity("run", "--prompt", "Once", "--with", "hf", "--python", PYTHON, "--out", "few").out.splitlines()
    assert printed[-1].startswith("few/  report.html  ref.jsonl  ours.jsonl  hf.jsonl  diff.json ")
    assert not any(line.startswith("note") for line in printed), printed


def test_an_interpreter_without_torch_is_one_line(parity: Cli) -> None:
    """What lacks is named, with the command that installs it; nothing is written."""
    bare = parity("dump", "hf", "--python", sys.executable, "--prompt", "hi", "-o", "hf.jsonl")
    assert bare.code == 2
    assert "has no torch, transformers. Run: pip install" in bare.err
    none = parity("dump", "hf", "--python", "no-such-python", "--prompt", "hi", "-o", "hf.jsonl")
    assert none.code == 2
    assert "cannot run no-such-python" in none.err
    assert not Path("hf.jsonl").exists()


def test_a_folder_for_temporary_files_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not the dump that cannot be written, and the message says what to set."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))  # what TMPDIR sets, which a process reads only once
    with pytest.raises(InputError) as caught:
        HuggingFace(Path("m.gguf"), sys.executable).dump(Prompt(None, TOKENS, ()), tmp_path / "hf.jsonl")
    assert "gone" in caught.value.message
    assert "TMPDIR" in caught.value.advice
    assert not (tmp_path / "hf.jsonl").exists()


def test_a_folder_without_a_config_is_one_line(parity: Cli, tmp_path: Path) -> None:
    """A folder that is no model's is refused before anything is started."""
    (tmp_path / "empty").mkdir()
    refused = parity("dump", "hf", "--model", tmp_path / "empty", "--tokens", "1", "-o", "hf.jsonl")
    assert (refused.code, "has no config.json" in refused.err) == (2, True)


@needs_transformers
@pytest.mark.slow
def test_points_by_wildcard_and_some_positions(model: Callable[[str], Path], parity: Cli) -> None:
    """Wildcards and braces choose among the points that the model turns out to have; rows of other positions are left out."""
    dump = (
        "dump",
        "hf",
        "--python",
        PYTHON,
        "--model",
        model("qwen2"),
        "--tokens",
        ",".join(map(str, TOKENS)),
        "-o",
        "hf.jsonl",
    )
    assert parity(*dump, "--points", "blk.{0,2}.*_rope,blk.*.kq_soft_max,logits", "--positions", "1,4").code == 0
    written = read(Path("hf.jsonl"))
    assert sorted(written.points) == sorted(
        [f"blk.{layer}.{letter}_rope" for layer in (0, 2) for letter in "qk"]
        + [f"blk.{layer}.kq_soft_max" for layer in range(3)]
        + ["logits"]
    )
    assert all(rows.token_idx.tolist() == [1, 4] for rows in written.points.values())
    assert [shape[-1] for shape in written.points["blk.0.kq_soft_max"].shapes] == [2, 5]
    assert parity(*dump, "--positions", "last").code == 0
    assert {position for rows in read(Path("hf.jsonl")).points.values() for position in rows.token_idx.tolist()} == {5}
    refused(parity(*dump, "--positions", "9"), "there are positions 0 to 5")
    refused(parity(*dump, "--points", "blk.*.nothing"), "has none of these points")


@needs_transformers
@pytest.mark.slow
def test_a_prompt_is_taken_as_it_is(model: Callable[[str], Path], parity: Cli) -> None:
    """Braces of a prompt are no placeholders, and a NUL passes, as no command line's would; an id outside the vocabulary is one line."""
    text = "Lily {tokens} {model}\0 and {out}"
    Path("prompt.txt").write_text(text, encoding="utf-8")
    dump = ("dump", "hf", "--python", PYTHON, "-o", "hf.jsonl")
    assert parity(*dump, "--prompt-file", "prompt.txt", "--points", "logits").code == 0
    header = read(Path("hf.jsonl")).header
    assert header is not None
    assert header.prompt == text
    refused(parity(*dump, "--model", model("qwen2"), "--tokens", "1,99999"), "token id 99999 is outside the vocabulary")


class Modules:
    """A model of which only the names of its modules are known."""

    def __init__(self, *paths: str) -> None:
        self._modules = {path: object() for path in ("", "model.embed_tokens", *paths)}

    def named_modules(self) -> list[tuple[str, object]]:
        return list(self._modules.items())

    def get_input_embeddings(self) -> object:
        return self._modules["model.embed_tokens"]


@pytest.mark.parametrize(
    ("layer", "inside", "points"),
    [
        ("layers.1", ("post_attention_layernorm", "pre_mlp_layernorm", "post_mlp_layernorm", "mlp.gate_proj"), {
            "post_attention_layernorm": "attn_post_norm", "pre_mlp_layernorm": "ffn_norm", "pre_mlp_layernorm<": "ffn_inp",
            "post_mlp_layernorm": "ffn_post_norm", "mlp.gate_proj": "ffn_gate",
        }),
        ("layers.1", ("self_attn.o_proj", "self_attn.gate_proj"), {
            "self_attn.o_proj": "attn_out", "self_attn.o_proj<": "attn_gated", "self_attn.gate_proj": "attn_gate_proj",
        }),
        ("layers.1", ("attention_layernorm", "feedforward_layernorm"), {
            "attention_layernorm": "attn_norm", "feedforward_layernorm": "ffn_norm", "feedforward_layernorm<": "ffn_inp",
        }),
        ("layers.1", ("mlp", "mlp.gate", "mlp.experts", "mlp.shared_expert", "mlp.shared_expert_gate"), {
            "mlp": "ffn_out", "mlp.gate": "ffn_moe_logits", "mlp.experts": "ffn_moe_out", "mlp.shared_expert": "ffn_shexp",
            "mlp.shared_expert_gate": "ffn_shexp_gate_inp",
        }),
        ("layers.1", ("block_sparse_moe", "block_sparse_moe.router.layer"), {
            "block_sparse_moe": "ffn_moe_out", "block_sparse_moe.router.layer": "ffn_moe_logits",
        }),
        ("blocks.1", ("ffn",), {}),
    ],
    ids=["four norms", "a gate behind the attention", "norms by purpose", "a shared expert with a gate", "a router's layer", "blocks"],
)  # fmt: skip
def test_modules_are_named_by_what_stands_beside_them(layer: str, inside: tuple[str, ...], points: dict[str, str]) -> None:
    """AFMoE's, Apertus', Qwen2 MoE's, Granite MoE's and DBRX' modules are the points that they are, and each layer's output is one."""
    place = f"model.{layer}"
    found = names_of(Modules(place, *(f"{place}.{name}" for name in inside)))
    expected = {f"{place}.{name}": f"blk.1.{kind}" for name, kind in points.items()}
    assert found == {"model.embed_tokens": "embd", place: "blk.1.l_out"} | expected


def test_tokenizers_are_compared_by_ids_and_pieces() -> None:
    """The first different piece is named with both ids, or the lengths where one is the other's beginning."""
    prompt = Prompt("a b", (1, 5, 6), ("<s>", "a", " b"))
    assert Tokenizer((1, 5, 6), ("<s>", "a", " b")).difference(prompt) == ""
    other = Tokenizer((1, 5, 7), ("<s>", "a", "b")).difference(prompt)
    assert "position 2: llama.cpp has 6 ' b', Hugging Face 7 'b'" in other
    assert "llama.cpp makes 3 tokens, Hugging Face 2" in Tokenizer((1, 5), ("<s>", "a")).difference(prompt)
    assert "no tokenizer" in Tokenizer(problem="OSError: none").difference(prompt)


def test_the_emitted_file_is_whole(tmp_path: Path) -> None:
    """It compiles, needs torch and transformers only where it uses them, and its help is to be read without either."""
    script = tmp_path / "parity_hf.py"
    script.write_text(source("hf"), encoding="utf-8")
    code = f"import sys, runpy; sys.argv = ['x', '--help']; runpy.run_path({str(script)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, "--tokens" in done.stdout) == (0, True), done.stderr


def test_three_dumps_name_the_one_that_is_alone(parity: Cli, stories_run: Path, tmp_path: Path) -> None:
    """With a value changed in one of three dumps that agree, that one is alone at that point and nowhere else."""
    lines = (stories_run / "ours.jsonl").read_text(encoding="utf-8").splitlines()
    third = tmp_path / "third.jsonl"
    changed = []
    for line in lines:
        record = json.loads(line)
        if record.get("type") == "header":
            record["source"] = "third"
        if record.get("checkpoint") == "logits" and record["token_idx"] == 2:
            record["values"][3] += 0.5
        changed.append(json.dumps(record))
    third.write_text("\n".join(changed), encoding="utf-8")
    paths = (stories_run / "ours.jsonl", stories_run / "ref.jsonl", third)
    code, answer = parity.json("diff", *paths, "--despite-lint")
    assert (code, answer["sides"]) == (1, ["ours", "llama.cpp", "third"])
    assert {point["checkpoint"]: point["alone"] for point in answer["points"] if point["alone"]} == {"logits": "third"}
    printed = parity("diff", *paths, "--despite-lint").out
    assert re.search(r"divergence at logits: ours and llama.cpp agree to \d\.\de-1\d, third is alone", printed)
    turned = parity("diff", paths[2], paths[0], paths[1], "--despite-lint").out
    for name, named in (("third", "third"), ("ours", "engine"), ("ref", "llama.cpp")):
        assert re.search(rf"^{name} +{named}", turned, re.MULTILINE), turned
    assert parity("diff", paths[0], paths[1], paths[1]).code == 0
    refused = parity("diff", *paths, "--html", "x.html")
    assert (refused.code, "--html needs exactly two dumps" in refused.err) == (2, True)


def test_a_side_is_checked_before_anything_runs(parity: Cli) -> None:
    """`run --with hf` of an interpreter that has no torch, or in native mode, ends before a folder is made."""
    refused = parity("run", "--prompt", "hi", "--with", "hf", "--python", sys.executable, "--out", "folder")
    assert (refused.code, Path("folder").exists()) == (2, False)
    assert parity("run", "--prompt", "hi", "--with", "hf", "--mode", "native").code == 2
    assert HuggingFace(Path("x")).name == "Hugging Face"
